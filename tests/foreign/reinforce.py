"""REINFORCE (Williams, 1992) with the mean reward of the step as its baseline."""

from __future__ import annotations

from rlhf.algorithms.functional import mean_loss
from rlhf.contracts import Algorithm, Batch, Loss, Output, Sample, Sums, Total, alone
from rlhf.lazy import np


class Reinforce(Algorithm):
    summary = "REINFORCE: sample, verify, update; the baseline is the mean reward of the step"
    form = "prompts"
    online = True
    rule = "math"
    models = {"policy": "train"}

    def credit(self, samples: list[Sample], total: Total = alone) -> tuple[list[Sample], Sums]:
        rewards, count = total(np.array([sum(s.reward for s in samples), len(samples)])).tolist()
        baseline = rewards / count
        for sample in samples:
            sample.advantages = np.where(sample.mask, sample.reward - baseline, 0.0).astype(np.float32)
        return samples, {"baseline": (baseline, 1.0)}

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        return mean_loss(-batch.streams["advantages"] * out.logp, batch, entropy=out.entropy)
