"""One rank: the linear layers that exchange tokens, against whole products (tests/test_linear.py)."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rlhf import configuration
from rlhf.parallel import exchange
from rlhf.parallel.mesh import Mesh

# isort: split
from rlhf.model.linear import _Column, _Row

exchange.GRAIN = 2**14
TOKENS, WIDTH, INNER = (40, 1280), 256, 512  # the second number of tokens makes the slots grow
TURNS = 200


def main() -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    mesh = Mesh(configuration.load("sft", [f"parallel.tp={ranks}"]).parallel, 1)
    torch.manual_seed(0)
    up, down = (torch.randn(shape, device=mesh.device) / 16 for shape in ((INNER, WIDTH), (WIDTH, INNER)))
    for tokens in TOKENS * 2:
        x, slope = (torch.randn(tokens, 1, WIDTH, device=mesh.device) for _ in range(2))
        for dtype in (torch.float32, torch.bfloat16):
            compare(mesh, *(t.to(dtype) for t in (up, down, x, slope)))
    endure(mesh, up, down)
    assert exchange.direct(mesh.tp_group) == (mesh.device.type == "cuda"), (
        "these ranks should reach each other's memory"
    )
    print("linear holds", flush=True)


def part(mesh: Mesh, t: Tensor, dim: int) -> Tensor:
    return t.chunk(mesh.layout.tp, dim)[mesh.tp_rank].contiguous()


def compare(mesh: Mesh, up: Tensor, down: Tensor, x: Tensor, slope: Tensor) -> None:
    """Compare outputs, and gradients of inputs and weights, by autograd and as float32 sums."""
    whole = [t.double().requires_grad_() for t in (x, up, down)]
    out = whole[0] @ whole[1].t() @ whole[2].t()
    grads = torch.autograd.grad(out, whole, slope.double())
    expected = [part(mesh, t, dim) for t, dim in ((out, 0), (grads[0], 0), (grads[1], 0), (grads[2], 1))]
    for summed in (False, True):
        mine = [part(mesh, t, dim).requires_grad_() for t, dim in ((x, 0), (up, 0), (down, 1))]
        if summed:
            for weight in mine[1:]:
                weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
        y = _Row.apply(_Column.apply(mine[0], mine[1], mesh.tp_group), mine[2], mesh.tp_group)
        found = [y, *torch.autograd.grad(y, mine, part(mesh, slope, 0))]
        if summed:
            found[2:] = [weight.main_grad - 1 for weight in mine[1:]]
        for got, want in zip(found, expected, strict=True):
            error = (got.double() - want).norm() / want.norm()
            within = 1e-5 if x.dtype == torch.float32 else 1e-2
            assert error < within, f"{tuple(want.shape)} {x.dtype} summed={summed}: off by {error:.2g}"


@torch.no_grad()
def endure(mesh: Mesh, up: Tensor, down: Tensor) -> None:
    """Make many calls without waiting on the host, while ranks are delayed in turn.

    No rank may overwrite data that another has not read.
    """
    xs = torch.randn(TURNS, 64, 1, WIDTH, device=mesh.device)
    mine = [part(mesh, x, 0) for x in xs]
    shards = part(mesh, up, 0), part(mesh, down, 1)
    found = []
    for turn, x in enumerate(mine):
        if mesh.device.type == "cuda" and turn // 3 % mesh.layout.tp == mesh.tp_rank:
            torch.cuda._sleep(500_000)  # cycles: a quarter of a millisecond
        found.append(_Row.apply(_Column.apply(x, shards[0], mesh.tp_group), shards[1], mesh.tp_group))
    for turn, (x, y) in enumerate(zip(xs, found, strict=True)):
        want = part(mesh, x.double() @ up.double().t() @ down.double().t(), 0)
        assert (y.double() - want).norm() < 1e-5 * want.norm(), f"turn {turn}"


if __name__ == "__main__":
    main()
