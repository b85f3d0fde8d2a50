"""One rank: the sequence-parallel linear layers against one whole product (tests/gpu/test_linear.py)."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rlhf import configuration
from rlhf.parallel.mesh import Mesh

# isort: split
from rlhf.model.linear import _Column, _Row
from rlhf.parallel.exchange import direct

TOKENS, WIDTH, INNER = (40, 1280), 256, 512  # of both numbers of tokens, the second lets the workspace grow


def main() -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    mesh = Mesh(configuration.load("sft", [f"parallel.tp={ranks}"]).parallel, 1)
    torch.manual_seed(0)
    up, down = (torch.randn(shape, device=mesh.device) / 16 for shape in ((INNER, WIDTH), (WIDTH, INNER)))
    for tokens in TOKENS * 2:
        x, slope = (torch.randn(tokens, 1, WIDTH, device=mesh.device) for _ in range(2))
        for dtype in (torch.float32, torch.bfloat16):
            compare(mesh, *(t.to(dtype) for t in (up, down, x, slope)))
    expected = mesh.device.type == "cuda"
    assert direct(mesh.tp_group) == expected, "these ranks should reach each other's memory"
    print("linear holds", flush=True)


def compare(mesh: Mesh, up: Tensor, down: Tensor, x: Tensor, slope: Tensor) -> None:
    """Outputs, and gradients of inputs and weights, in autograd's way and into float32 sums."""

    def part(t: Tensor, dim: int) -> Tensor:
        return t.chunk(mesh.layout.tp, dim)[mesh.tp_rank].contiguous()

    whole = [t.double().requires_grad_() for t in (x, up, down)]
    out = whole[0] @ whole[1].t() @ whole[2].t()
    grads = torch.autograd.grad(out, whole, slope.double())
    expected = [part(out, 0), part(grads[0], 0), part(grads[1], 0), part(grads[2], 1)]
    for summed in (False, True):
        mine = [part(t, dim).requires_grad_() for t, dim in ((x, 0), (up, 0), (down, 1))]
        if summed:
            for weight in mine[1:]:
                weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
        y = _Row.apply(_Column.apply(mine[0], mine[1], mesh.tp_group), mine[2], mesh.tp_group)
        found = [y, *torch.autograd.grad(y, mine, part(slope, 0))]
        if summed:
            found[2:] = [weight.main_grad - 1 for weight in mine[1:]]
        for got, want in zip(found, expected, strict=True):
            error = (got.double() - want).norm() / want.norm()
            assert error < (1e-5 if x.dtype == torch.float32 else 1e-2), (
                f"{tuple(want.shape)} {x.dtype} summed={summed}: off by {error:.2g}"
            )


if __name__ == "__main__":
    main()
