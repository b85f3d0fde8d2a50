"""Supervised fine-tuning: maximise the log-likelihood of demonstrations, averaged over learned tokens."""

from __future__ import annotations

from rlhf.algorithms.functional import mean_loss
from rlhf.config import Config
from rlhf.contracts import Batch, Loss, Output, Sample


class SFT:
    online = False
    whole_groups = False

    def __init__(self, config: Config):
        self.models = {"policy": "train"}
        self.streams: tuple[str, ...] = ()

    def credit(self, samples: list[Sample]) -> list[Sample]:
        return samples

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        return mean_loss(-out.logp, batch, entropy=out.entropy)
