"""Kahneman-Tversky optimisation (Ethayarajh et al., 2402.01306, eqs. 7 and 8): each response is desirable or not.

The reward of a response is beta (log policy - log reference), summed over its tokens. It is compared with a reference
point z: the mean of the summed log-ratios of the step before its updates, at least 0. The loss of a response is weight
(1 - sigmoid(beta (ratio - z))) if it is desirable, else weight (1 - sigmoid(beta (z - ratio))). It is averaged over the
global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rlhf.config import Between, Config
from rlhf.contracts import Algorithm, Batch, Loss, Output, Sample, Sums, Total, alone
from rlhf.lazy import np, torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Kahneman-Tversky optimisation (2402.01306)."""

    beta: Annotated[float, Between(1e-6)] = 0.1  # weight of the KL to the reference
    desirable: float = 1.0  # weight of desirable responses
    undesirable: float = 1.0  # weight of undesirable responses


class KTO(Algorithm):
    summary = "Kahneman-Tversky optimisation: desirable and undesirable responses, not compared with each other"
    form = "pairs"
    section = "kto", Keys
    models = {"policy": "train", "reference": "frozen"}
    streams = ("old_logp", "ref_logp")

    def __init__(self, config: Config):
        super().__init__(config)
        self.keys: Keys = config.sections["kto"]

    def credit(self, samples: list[Sample], total: Total = alone) -> tuple[list[Sample], Sums]:
        ratios = [float((s.old_logp - s.ref_logp)[s.mask].sum()) for s in samples]
        summed, count = total(np.array([sum(ratios), len(ratios)])).tolist()
        self.state["z"] = max(0.0, summed / count)
        return samples, {"kl": (sum(ratios), float(len(ratios)))}

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        c, desirable = self.keys, batch.reward > 0  # [S]
        ratio = batch.seq_sum(out.logp - batch.streams["ref_logp"])  # [S]
        gain = c.beta * (ratio - self.state["z"])
        weight = torch.where(desirable, c.desirable, c.undesirable) * batch.owned()
        total = (weight * (1 - torch.sigmoid(torch.where(desirable, gain, -gain)))).sum()
        count = batch.owned().sum()
        return Loss(
            total, count, {"loss": (total.detach(), count), "gain": ((gain.detach() * batch.owned()).sum(), count)}
        )
