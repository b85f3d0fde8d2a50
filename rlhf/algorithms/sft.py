"""Supervised fine-tuning: minimise the negative log-likelihood of demonstrations, averaged over learned tokens."""

from __future__ import annotations

from rlhf.algorithms.functional import mean_loss
from rlhf.contracts import Algorithm, Batch, Loss, Output


class SFT(Algorithm):
    summary = "supervised fine-tuning on prompts and responses"
    form = "demonstrations"
    aligns = False
    models = {"policy": "train"}

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        return mean_loss(-out.logp, batch, entropy=out.entropy)
