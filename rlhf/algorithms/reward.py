"""Reward model (Ouyang et al., 2203.02155, eq. 1): Bradley-Terry over all pairs of a prompt's scored responses.

The loss of a pair is -log sigmoid(s_i - s_j - rm.margin (r_i - r_j)). s is the model's score of the whole text, r is
the score in the data set, and r_i > r_j (margin: Llama 2, 2307.09288, eq. 2). The loss is averaged over all pairs of
the global batch. The paper instead gives all prompts the same weight.

The samples end at the token at which the score is read (contracts.scored). Tokens after it are not seen.

rm.lm adds to the loss of each pair rm.lm times the mean negative log-prob of the tokens of its group's best response.
Among equal scores, the first response is the best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.algorithms.functional import pair_loss, wins
from rlhf.config import Config
from rlhf.contracts import Algorithm, Batch, Loss, Output
from rlhf.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Reward modelling (2203.02155): Bradley-Terry over the pairs of each prompt's scored responses."""

    margin: float = 0.0  # required lead of the better response per unit of score difference in the data (2307.09288)
    lm: float = 0.0  # weight of the language-model loss on the best response of each prompt; 0 needs no output layer


class RM(Algorithm):
    summary = "reward model: a scalar head learns which of a prompt's responses people prefer"
    form = "scored"
    section = "rm", Keys
    whole_groups = True
    aligns = False
    models = {"reward": "train"}

    def __init__(self, config: Config):
        super().__init__(config)
        self.keys: Keys = config.sections["rm"]
        if self.keys.lm:
            self.with_lm = ("reward",)

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        c, (better, worse) = self.keys, batch.pairs
        score, owned = batch.at_last(out.value), batch.owned()  # [S]
        margin = score[better] - score[worse]  # [pairs]
        loss = -F.logsigmoid(margin - c.margin * (batch.reward[better] - batch.reward[worse]))
        metrics = {"accuracy": wins(margin), "margin": margin}
        if c.lm:
            metrics["lm_loss"] = nll = _nll(batch, out)[_best(batch)[better]]
            loss = loss + c.lm * nll
        found = pair_loss(loss, better, batch, **metrics)
        found.metrics["score"] = (score.detach() * owned).sum(), owned.sum()
        return found


def _nll(batch: Batch, out: Output) -> Tensor:
    """Return the mean negative log-prob of each response's tokens [S], without the position that scored() added."""
    response = 1 - batch.last
    return -batch.seq_sum(out.logp * response) / batch.seq_sum(response).clamp(min=1.0)


def _best(batch: Batch) -> Tensor:
    """Return the index of the best response in each sequence's group [S]."""
    rewards = torch.where(batch.group[:, None] == batch.group, batch.reward, float("-inf"))
    return rewards.argmax(1) if len(rewards) else batch.group
