"""The formulas the algorithms share. Every function is elementwise or per sample, and tested against published numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.contracts import Batch, Loss


def mean_loss(per_token: Tensor, batch: Batch, unit: str = "token", **metrics: Tensor) -> Loss:
    """Mean of per_token [T] over the learned tokens of the global batch, or (unit "sequence") of each response's own mean over its tokens.

    metrics [T] are averaged over tokens in both cases.
    """
    tokens = batch.mask.sum()
    pairs = {name: ((value.detach() * batch.mask).sum(), tokens) for name, value in metrics.items()}
    weight, count = batch.mask, tokens
    if unit == "sequence":
        lengths = F.pad(batch.seq_sum(batch.mask), (0, 1), value=1.0)  # the padding is segment S
        weight, count = batch.mask / lengths.clamp(min=1.0)[batch.segment], batch.last.sum()
    total = (per_token * weight).sum()
    return Loss(total, count, {"loss": (total.detach(), count), **pairs})


def clipped_surrogate(logp: Tensor, old_logp: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic surrogate (1707.06347, eq. 7): -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(logp - old_logp).

    Returns the loss [T], and 1.0 where the clipped branch was taken [T].
    """
    ratio = (logp - old_logp).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(plain, clipped), (clipped < plain).float()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) for tokens of the policy [T]: e^d - d - 1 with d = ref - policy.

    Non-negative and unbiased; not clamped.
    """
    d = ref_logp - logp
    return d.exp() - d - 1
