"""The memory-bound operations of a decoder and its optimizer.

Only this file chooses between fused kernels (on a GPU) and plain torch. Both give the same results up to rounding: the
kernels keep intermediate values in float32, and plain torch rounds them to the dtype of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.model import rope

fusing = True  # benchmarks set it to False before they build a model, to compare


def fused(x: Tensor) -> bool:
    """Return whether operations on x use the fused kernels."""
    return fusing and x.is_cuda


def sound(weights: Iterable[Tensor]) -> bool:
    """Return whether no weight is NaN or so large that its square is infinite in float32.

    A model with such large weights still has finite outputs, because its norms divide by infinity. But it cannot learn.
    """
    return _largest(weights) < 1e19


def finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no number is NaN or infinite."""
    return _largest(tensors) < math.inf


def _largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest absolute value, or NaN if a number is NaN. Synchronizes with the device once."""
    return float(torch.nn.utils.get_total_norm([tensor for tensor in tensors if tensor.numel()], norm_type=math.inf))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rope.rotate of x [T, heads, d] by tables [T, 1, d / 2]."""
    if fused(x):
        from rlhf.model import kernels

        return kernels.Rotate.apply(x, cos, sin)
    return rope.rotate(x, cos, sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight for x [..., h] and weight [h] (1910.07467)."""
    if fused(x):
        from rlhf.model import kernels

        return kernels.RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up [..., f] for x [..., 2 f], which has gate first, then up (2002.05202)."""
    if fused(x):
        from rlhf.model import kernels

        return kernels.SwiGLU.apply(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def softmax_sums(logits: Tensor, column: Tensor, real: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return m = max x, sum e^(x - m), sum e^(x - m) (x - m) and x[column], all [T] float32. May overwrite logits.

    x is logits * scale over the first `real` columns of logits [T, V]. column [T] selects one column per token;
    x[column] is 0 if it is not one of the first `real` columns. Log-probs and entropies are computed from these values.
    """
    if fused(logits):
        from rlhf.model import kernels

        return kernels.softmax_sums(logits, column, real, scale)
    held = (column >= 0) & (column < real)
    x = logits.float().mul_(scale)
    label = torch.where(held, x.gather(1, (column * held)[:, None])[:, 0], 0.0)
    x = x[:, :real]
    top = x.amax(-1) if real else x.new_full((len(x),), float("-inf"))
    shifted = x.sub_(top[:, None])
    e = shifted.exp()
    total = e.sum(-1)
    return top, total, e.mul_(shifted).sum(-1), label


def logp_slope(logits: Tensor, column: Tensor, lse: Tensor, grad: Tensor, real: int, scale: float) -> Tensor:
    """Return grad [T] * d log softmax(logits * scale)[column] / d logits, in the dtype of logits [T, V].

    May overwrite logits. lse [T] is the log-sum-exp over all columns of all ranks. column may be on another rank. The
    result is 0 from column `real` on.
    """
    if fused(logits):
        from rlhf.model import kernels

        return kernels.logp_slope(logits, column, lse, grad, real, scale)
    held = (column >= 0) & (column < real)
    slope = logits.float().mul_(scale).sub_(lse[:, None]).exp_().neg_()
    slope[:, real:] = 0.0
    slope.scatter_add_(1, (column * held)[:, None], held.float()[:, None])
    return slope.mul_((grad * scale)[:, None]).to(logits.dtype)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left.T @ right to total [m, n] float32 in place. left is [T, m], right [T, n].

    On a GPU, the matrix product itself adds to total.
    """
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    elif fused(total):
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left.t() @ right)


def adamw(
    p: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    scale: float,
) -> None:
    """Make one AdamW update of p and its moments in place, with the gradient grad * scale (1711.05101).

    moments: the means of the gradient and of its square. `step` counts the updates from 1.
    """
    keep, size, root = 1 - lr * decay, lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)
    mean, square = moments
    if fused(p):
        from rlhf.model import kernels

        kernels.adamw(p, grad, mean, square, keep, size, root, betas, eps, scale)
        return
    grad = grad * scale
    mean.lerp_(grad, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    p.mul_(keep).addcdiv_(mean, square.sqrt().div_(root).add_(eps), value=-size)
