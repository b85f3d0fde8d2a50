"""Direct preference optimisation (Rafailov et al., 2305.18290). The loss is a mean over all pairs of the global batch.

The implicit reward of a response is beta (log policy - log reference), summed over its tokens. Options:
  smoothing  cDPO. As in OpenRLHF and NeMo, the loss is not divided by 1 - 2 smoothing.
  loss=ipo   IPO (2310.12036) of summed log-ratios, as in the paper. TRL averages the log-ratios over tokens.
  SimPO      (2405.14734) is reference = false, length_normalise = true and a margin.
  sft        RPO (2404.19733). Adds to the loss sft times the mean negative log-prob of the chosen response's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf.algorithms.functional import pair_loss, preference, seq_mean, wins
from rlhf.config import Config
from rlhf.contracts import Algorithm, Batch, Form, Loss, Output
from rlhf.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Direct preference optimisation (2305.18290), offline and online (2402.04792)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # ipo: 2310.12036
    beta: float = 0.1  # a higher value keeps the policy closer to the reference
    smoothing: float = 0.0  # assumed share of pairs whose labels are swapped (cDPO)
    reference: bool = True  # false: use log-probs instead of log-ratios to the reference (SimPO, 2405.14734)
    length_normalise: bool = False  # average log-probs over tokens instead of summing them (SimPO)
    margin: float = 0.0  # required lead of the chosen response's implicit reward (SimPO's gamma)
    sft: float = 0.0  # weight of the language-model loss on the chosen response, averaged over its tokens
    pairs: Literal["best_worst", "all"] = "best_worst"  # online: pairs of each group; equal rewards make no pair


class DPO(Algorithm):
    summary = "direct preference optimisation on pairs of responses"
    form: ClassVar[Form] = "pairs"
    section = "dpo", Keys
    whole_groups = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.keys: Keys = config.sections["dpo"]
        c = self.keys
        if not c.beta:
            raise UserError("dpo.beta=0 gives every pair the same loss: set it above 0, for example to 0.1")
        if c.smoothing >= 0.5:
            raise UserError(f"dpo.smoothing={c.smoothing} assumes that half of the labels or more are wrong: lower it")
        if c.loss == "ipo" and (c.smoothing or c.margin):
            given = f"dpo.smoothing={c.smoothing} and dpo.margin={c.margin}"
            raise UserError(f"dpo.loss=ipo does not support {given}: set both to 0, or set dpo.loss=sigmoid")
        self.models = {"policy": "train", "reference": "frozen"} if c.reference else {"policy": "train"}
        self.streams = ("ref_logp",) if c.reference else ()

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        c, (chosen, rejected) = self.keys, batch.pairs
        logp = out.logp - batch.streams["ref_logp"] if c.reference else out.logp  # [T]
        ratio = seq_mean(logp, batch) if c.length_normalise else batch.seq_sum(logp)  # [S]
        h = ratio[chosen] - ratio[rejected]  # [pairs]
        loss = preference(h, c.loss, c.beta, c.smoothing, c.margin)
        metrics = {
            "accuracy": wins(h),
            "margin": c.beta * h,
            "chosen_reward": c.beta * ratio[chosen],
            "rejected_reward": c.beta * ratio[rejected],
        }
        if c.sft:
            metrics["sft_loss"] = nll = -seq_mean(out.logp, batch)[chosen]
            loss = loss + c.sft * nll
        return pair_loss(loss, chosen, batch, **metrics)
