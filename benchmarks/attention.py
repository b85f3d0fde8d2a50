"""Measure and check the attention kernels on packed rows, forward and backward.

    python benchmarks/attention.py                                   one GPU: 16k tokens; rows of 4k, lognormal rows
    python benchmarks/attention.py --tokens 512 --length 64          on a CPU: the padded path alone

FLOPs are those of causal attention: half of the square, times 3.5 for forward and backward, because backward recomputes
the scores.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import Tensor
from train import draw

from rlhf.data.packing import pack
from rlhf.model import attention
from rlhf.model.attention import PackedRow


class CuDNN(torch.autograd.Function):
    """cuDNN's kernel on packed rows. Rounds up the number of sequences and the longest length, to reuse plans."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
        found = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, starts, starts, longest, longest, True, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, found[0], found[1], found[6], found[7], starts)
        ctx.longest = longest
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, starts = ctx.saved_tensors
        bounds = (None, starts, starts, ctx.longest, ctx.longest, 0.0, True)
        return *torch.ops.aten._cudnn_attention_backward(grad, *saved, *bounds), None, None


def cudnn(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    starts = F.pad(F.pad(ends, (1, 0)), (0, -len(ends) % 16), value=int(ends[-1])).to(q.device)
    return CuDNN.apply(q, k, v, starts, 1 << (max(lengths) - 1).bit_length())


def ways(device: torch.device, row: PackedRow, lengths: list[int]) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {}
    if device.type == "cuda":
        found["flash"] = lambda q, k, v: attention._flash(q, k, v, row)
        found["cudnn"] = lambda q, k, v: cudnn(q, k, v, lengths)
    else:
        found["padded"] = lambda q, k, v: attention._padded(q, k, v, row)
    if row.even:
        found["even"] = lambda q, k, v: attention._even(q, k, v, row)
    return found


def gap(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def measure(a: argparse.Namespace, varied: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    samples = draw(a.tokens, a.length, 100, varied)
    lengths = [len(s.mask) for s in samples]
    batch = pack(samples, device=device)
    torch.manual_seed(1)
    inputs = [
        torch.randn(sum(lengths), a.heads, a.width, device=device, dtype=dtype).requires_grad_() for _ in range(3)
    ]
    upstream = torch.randn_like(inputs[0])
    exact = [x.detach().float().requires_grad_() for x in inputs]
    out = attention._padded(*exact, PackedRow(spans=batch.spans))
    wanted = [out, *torch.autograd.grad(out, exact, upstream.float())]
    wanted = [x.detach() for x in wanted]
    forward_flops = 2 * a.heads * a.width * sum(n * n for n in lengths)
    for name, way in ways(device, PackedRow(spans=batch.spans), lengths).items():
        result: dict[str, Any] = {
            "tokens": a.tokens,
            "length": a.length,
            "sequences": len(samples),
            "heads": a.heads,
            "width": a.width,
        }
        try:
            out = way(*inputs)
            found = [out, *torch.autograd.grad(out, inputs, upstream)]
            forward = record.seconds(partial(way, *inputs), a.repeat)
            both = record.seconds(lambda way=way: torch.autograd.grad(way(*inputs), inputs, upstream), a.repeat)
        except RuntimeError as error:  # this torch, cuDNN or device has no such kernel
            record.say(
                "attention",
                f"{'lognormal' if varied else 'fixed'}, {name}",
                result | {"error": str(error).splitlines()[0]},
            )
            continue
        gaps = dict(zip(("gap", "gap_q", "gap_k", "gap_v"), map(gap, found, wanted), strict=True))
        result |= {"forward_s": forward, "backward_s": both - forward, "forward_tflops": forward_flops / forward / 1e12}
        result |= {"tflops": 3.5 * forward_flops / both / 1e12, **gaps}
        record.say("attention", f"{'lognormal' if varied else 'fixed'}, {name}", result)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=16384)
    p.add_argument("--length", type=int, default=4096)
    p.add_argument("--heads", type=int, default=32)
    p.add_argument("--width", type=int, default=128)
    p.add_argument("--repeat", type=int, default=10)
    a = p.parse_args()
    for varied in (False, True):
        measure(a, varied)
    os._exit(0)


if __name__ == "__main__":
    main()
