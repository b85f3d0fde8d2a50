"""Triton kernels for the memory-bound operations of a decoder and its optimizer.

Each kernel reads its inputs once and writes its outputs once. Only rlhf.model.operations calls them. It also has the
same operations in plain torch. All arithmetic is in float32, for tensors of any dtype. The kernels follow Liger Kernel
(2410.10989) and take the shapes that megatron-core uses.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # number of elements that one program keeps in registers
PROGRAMS = 528  # of a kernel whose programs loop over rows: four per multiprocessor of a Hopper GPU, which has 132


@triton.jit
def _rotate(
    x,
    out,
    cos,
    sin,
    stride_token,
    stride_head,
    sign,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, H)[:, None], tl.arange(0, W)[None, :]
    real = (head < HEADS) & (column < HALF)
    c = tl.load(cos + token * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + column, mask=column < HALF, other=0.0).to(tl.float32) * sign
    source = x + token * stride_token + head * stride_head + column
    a = tl.load(source, mask=real, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=real, other=0.0).to(tl.float32)
    target = out + (token * HEADS + head) * (2 * HALF) + column
    tl.store(target, (a * c - b * s).to(out.dtype.element_ty), mask=real)
    tl.store(target + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=real)


class Rotate(torch.autograd.Function):
    """Rotate x [T, heads, d] (any strides of tokens and heads) by tables [T, 1, d / 2]: result [T, heads, d].

    Backward rotates the gradient by the negative angles.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return Rotate.turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return Rotate.turn(grad, cos, sin, -1.0), None, None

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        tokens, heads, width = x.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        blocks = {"H": triton.next_power_of_2(heads), "W": triton.next_power_of_2(width // 2)}
        if tokens:
            _rotate[(tokens,)](x, out, cos, sin, x.stride(0), x.stride(1), sign, HEADS=heads, HALF=width // 2, **blocks)
        return out


@triton.jit
def _swiglu(x, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    gate = tl.load(x + row * 2 * width + column, mask=real, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=real)


@triton.jit
def _swiglu_backward(grad, x, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    g = tl.load(grad + row * width + column, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * width + column, mask=real, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=real, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    slope = open_ * (1.0 + gate * (1.0 - open_))
    tl.store(out + row * 2 * width + column, (g * up * slope).to(out.dtype.element_ty), mask=real)
    tl.store(out + row * 2 * width + width + column, (g * gate * open_).to(out.dtype.element_ty), mask=real)


class SwiGLU(torch.autograd.Function):
    """Compute silu(gate) * up [..., f] from x [..., 2 f], which has gate first, then up."""

    BLOCK = 1024

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        if out.numel():
            _swiglu[(out.numel() // width, triton.cdiv(width, SwiGLU.BLOCK))](x, out, width, BLOCK=SwiGLU.BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        width, out = x.shape[-1] // 2, torch.empty_like(x)
        if out.numel():
            grid = (out.numel() // (2 * width), triton.cdiv(width, SwiGLU.BLOCK))
            _swiglu_backward[grid](grad.contiguous(), x, out, width, BLOCK=SwiGLU.BLOCK)
        return out


@triton.jit
def _rms_norm(x, weight, out, scale, rows, stride, eps, WIDTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    row, column = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None], tl.arange(0, W)[None, :]
    real = (row < rows) & (column < WIDTH)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    value = tl.load(x + row * stride + column, mask=real, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(value * value, 1)[:, None] / WIDTH + eps)
    tl.store(scale + row, r, mask=row < rows)
    tl.store(out + row * WIDTH + column, (value * r * w).to(out.dtype.element_ty), mask=real)


@triton.jit
def _rms_norm_backward(
    grad, x, weight, scale, out, weight_grad, rows, stride, WIDTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    column = tl.arange(0, W)[None, :]
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    total = tl.zeros((R, W), tl.float32)
    for first in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = (first + tl.arange(0, R)).to(tl.int64)[:, None]
        real = (row < rows) & (column < WIDTH)
        r = tl.load(scale + row, mask=row < rows, other=0.0)
        unit = tl.load(x + row * stride + column, mask=real, other=0.0).to(tl.float32) * r
        g = tl.load(grad + row * WIDTH + column, mask=real, other=0.0).to(tl.float32)
        total += g * unit
        g = g * w
        slope = r * (g - unit * (tl.sum(g * unit, 1)[:, None] / WIDTH))
        tl.store(out + row * WIDTH + column, slope.to(out.dtype.element_ty), mask=real)
    column = tl.arange(0, W)
    tl.store(weight_grad + tl.program_id(0) * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)


class RMSNorm(torch.autograd.Function):
    """Compute x / sqrt(mean(x^2) + eps) * weight from x [..., h] and weight [h]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        out, scale = x.new_empty(x.shape), x.new_empty(len(flat), dtype=torch.float32)
        blocks = RMSNorm.blocks(flat)
        if len(flat):
            grid = (triton.cdiv(len(flat), blocks["R"]),)
            _rms_norm[grid](flat, weight, out, scale, len(flat), flat.stride(0), eps, WIDTH=flat.shape[1], **blocks)
        ctx.save_for_backward(flat, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, weight, scale = ctx.saved_tensors
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        blocks = RMSNorm.blocks(flat)
        programs = min(PROGRAMS, triton.cdiv(len(flat), blocks["R"]))
        parts = torch.empty(programs, len(weight), dtype=torch.float32, device=grad.device)
        if programs:
            _rms_norm_backward[(programs,)](
                grad.contiguous(),
                flat,
                weight,
                scale,
                out,
                parts,
                len(flat),
                flat.stride(0),
                WIDTH=flat.shape[1],
                **blocks,
            )
        return out, parts.sum(0).to(weight.dtype), None

    @staticmethod
    def blocks(flat: Tensor) -> dict[str, int]:
        width = triton.next_power_of_2(flat.shape[1])
        return {"R": max(1, BLOCK // width), "W": width, "num_warps": 8}


@triton.jit
def _softmax_sums(logits, column, top, total, weighted, label, scale, stride, real, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m, s, u = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    for first in range(0, real, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + place, mask=place < real, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(m, tl.max(x, 0))
        shrink = tl.exp(m - higher)
        shifted = tl.where(place < real, x - higher, 0.0)
        e = tl.where(place < real, tl.exp(shifted), 0.0)
        # update sum e^(x - m) (x - m) for the new maximum `higher`
        u = tl.where(s > 0.0, (u + (m - higher) * s) * shrink, 0.0) + tl.sum(e * shifted, 0)
        s = s * shrink + tl.sum(e, 0)
        m = higher
    own = tl.load(column + row)
    held = (own >= 0) & (own < real)
    tl.store(label + row, tl.load(logits + row * stride + own, mask=held, other=0.0).to(tl.float32) * scale)
    tl.store(top + row, m)
    tl.store(total + row, s)
    tl.store(weighted + row, u)


@triton.jit
def _logp_slope(logits, column, lse, grad, scale, stride, width, real, BLOCK: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + place, mask=place < real, other=float("-inf")).to(tl.float32) * scale
    slope = tl.where((place == tl.load(column + row)) & (place < real), 1.0, 0.0) - tl.exp(x - tl.load(lse + row))
    slope = slope * (tl.load(grad + row) * scale)
    tl.store(logits + row * stride + place, slope.to(logits.dtype.element_ty), mask=place < width)


def softmax_sums(logits: Tensor, column: Tensor, real: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return m = max x, sum e^(x - m), sum e^(x - m) (x - m) and x[column], all [T] float32.

    x is logits * scale over the first `real` columns of logits [T, V]. The kernel reads logits once. column [T] selects
    one column per token; x[column] is 0 if it is not one of the first `real` columns.
    """
    top, total, weighted, label = (
        torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    if len(logits):
        _softmax_sums[(len(logits),)](
            logits, column, top, total, weighted, label, scale, logits.stride(0), real, BLOCK=BLOCK, num_warps=8
        )
    return top, total, weighted, label


def logp_slope(logits: Tensor, column: Tensor, lse: Tensor, grad: Tensor, real: int, scale: float) -> Tensor:
    """Overwrite logits [T, V] with grad * d log softmax(logits * scale)[column] / d logits, and return them.

    grad, column and lse (log-sum-exp over all columns) are [T]. The result is 0 from column `real` on.
    """
    tokens, width = logits.shape
    if tokens:
        _logp_slope[(tokens, triton.cdiv(width, BLOCK))](
            logits, column, lse, grad, scale, logits.stride(0), width, real, BLOCK=BLOCK, num_warps=8
        )
    return logits


@triton.jit
def _adamw(p, grad, mean, square, count, keep, size, root, part1, beta2, part2, eps, scale, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < count
    g = tl.load(grad + place, mask=real) * scale
    m = tl.load(mean + place, mask=real)
    m += (g - m) * part1
    v = tl.load(square + place, mask=real) * beta2 + g * g * part2
    tl.store(mean + place, m, mask=real)
    tl.store(square + place, v, mask=real)
    x = tl.load(p + place, mask=real)
    tl.store(p + place, x * keep - size * m / (tl.sqrt(v) / root + eps), mask=real)


def adamw(
    p: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    keep: float,
    size: float,
    root: float,
    betas: tuple[float, float],
    eps: float,
    scale: float,
) -> None:
    """Update the moments `mean` and `square` with grad * scale, then p, all in place.

    p becomes p * keep - size * mean / (sqrt(square) / root + eps). This moves 28 bytes per element. The fused AdamW of
    torch uses at most 320 blocks per launch, and also writes the scaled gradients.
    """
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in (p, grad, mean, square)), (
        "adamw takes whole float32 tensors"
    )
    constants = (keep, size, root, 1 - betas[0], betas[1], 1 - betas[1], eps, scale)
    if p.numel():
        _adamw[(triton.cdiv(p.numel(), 1024),)](p, grad, mean, square, p.numel(), *constants, BLOCK=1024)
