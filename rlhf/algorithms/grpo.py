"""Group relative policy optimisation (Shao et al., 2402.03300): the group is the baseline, no critic.

Advantage of every token: (r - mean) / (std + 1e-6) over its group, with the population's standard deviation (as Megatron; verl and NeMo
take the sample's). The paper averages over each response's tokens first, then over responses; grpo.mean="token" averages over all tokens
of the global batch at once (DAPO, 2503.14476).
"""

from __future__ import annotations

import numpy as np

from rlhf.algorithms.functional import clipped_surrogate, kl_k3, mean_loss
from rlhf.config import Config
from rlhf.contracts import Algorithm, Batch, Loss, Output, Sample, Sums, groups


class GRPO(Algorithm):
    online = True

    def __init__(self, config: Config):
        self.config = config.grpo
        self.models = {"policy": "train"}
        self.state = {}
        self.streams = ("old_logp",)
        if self.config.kl:
            self.models["reference"] = "frozen"
            self.streams += ("ref_logp",)

    def credit(self, samples: list[Sample]) -> tuple[list[Sample], Sums]:
        for group in groups(samples):
            rewards = np.array([s.reward for s in group])
            for sample, advantage in zip(group, (rewards - rewards.mean()) / (rewards.std() + 1e-6), strict=True):
                sample.advantages = np.where(sample.mask, advantage, 0.0).astype(np.float32)
        return samples, {}

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        c, x = self.config, batch.streams
        loss, clipped = clipped_surrogate(out.logp, x["old_logp"], x["advantages"], c.clip_low, c.clip_high)
        metrics = {"clipped": clipped, "entropy": out.entropy}
        if c.kl:
            metrics["kl"] = kl_k3(out.logp, x["ref_logp"])
            loss = loss + c.kl * metrics["kl"]
        return mean_loss(loss, batch, c.mean, **metrics)
