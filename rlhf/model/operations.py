"""The memory-bound operations of a decoder and its optimizer: fused kernels on a GPU, plain torch elsewhere. Only here is that chosen.

Both compute the same to rounding: the kernels keep in float32 what plain torch rounds to the tensors' dtype in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.model import rope

fusing = True  # benchmarks turn it off, before a model is built, to compare


def fused(x: Tensor) -> bool:
    return fusing and x.is_cuda


def sound(weights: Iterable[Tensor]) -> bool:
    """Whether weights can be computed with: none is NaN, and none so large that its square is infinite in float32.

    A model of such finite weights still says finite things, as its norms divide by infinity, but it learns nothing any more.
    """
    return _largest(weights) < 1e19


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number is NaN or infinite."""
    return _largest(tensors) < math.inf


def _largest(tensors: Iterable[Tensor]) -> float:
    """The largest magnitude, with one device synchronisation; NaN if one number is."""
    return float(torch.nn.utils.get_total_norm([tensor for tensor in tensors if tensor.numel()], norm_type=math.inf))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rope.rotate of x [T, heads, d] by tables [T, 1, d / 2]."""
    if fused(x):
        from rlhf.model import kernels

        return kernels.Rotate.apply(x, cos, sin)
    return rope.rotate(x, cos, sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., h] over the root of its mean square, times weight [h] (1910.07467)."""
    if fused(x):
        from rlhf.model import kernels

        return kernels.RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2 f] holds gate, then up -> silu(gate) up [..., f] (2002.05202)."""
    if fused(x):
        from rlhf.model import kernels

        return kernels.SwiGLU.apply(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def softmax_sums(logits: Tensor, column: Tensor, real: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What log-probs and entropies are made of, for x = logits [T, V] scale over the first `real` columns.

    m = max x, sum e^(x - m), sum e^(x - m) (x - m) and x[column] (0 where column is none of those), all [T] float32. Overwrites logits.
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
    """grad [T] times d log softmax(logits scale)[column] / d logits, in the dtype of logits [T, V], which are overwritten.

    lse [T] is the log-sum-exp over all columns of all ranks; column may lie on another rank; columns from `real` on get 0.
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
    """total [m, n] float32 += left [T, m].T @ right [T, n], in place; on a GPU within the matrix product itself."""
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
    """Update p and both moments of its gradient in place, by the gradient grad * scale (1711.05101); `step` counts from 1."""
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
