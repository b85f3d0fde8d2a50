"""megatron-core's linear layers for sequence parallelism, with transfers that overlap with matrix products.

megatron-core gathers all tokens before the product of a column-parallel layer, and sums the ranks' results after the
product of a row-parallel layer. Here each product is split into one part per rank. While one part is multiplied, the
inputs of the next parts arrive, or the results of earlier parts are sent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import rlhf.parallel.mesh  # noqa: F401  (must be first: megatron-core can then be imported without CUDA)

# isort: split
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from rlhf.model import operations
from rlhf.parallel.exchange import exchange


class ColumnLinear(ColumnParallelLinear):
    """All-gather x [T / tp, ..., in], and multiply it by weight.T of weight [out / tp, in]: [T, ..., out / tp]."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        out = _Column.apply(input_, self.weight, self.tp_group)
        return out if self.bias is None else out + self.bias, None


class RowLinear(RowParallelLinear):
    """Multiply x [T, ..., in / tp] by weight.T of weight [out, in / tp], and reduce-scatter: [T / tp, ..., out]."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        assert self.bias is None, "each rank would add the bias"
        return _Row.apply(input_, self.weight, self.tp_group), None


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return AllGather(x.contiguous(), group).matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        # The inputs arrive during the product in ReduceScatter. Its results are sent during the last product.
        inputs = AllGather(x.contiguous(), ctx.group, whole=True)
        grad_x = ReduceScatter(grad, weight, ctx.group)
        grad_weight = _weight_gradient(weight, grad, inputs.whole())
        return grad_x.sum(), grad_weight, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return ReduceScatter(x, weight.t(), group).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grads = AllGather(grad.contiguous(), ctx.group, whole=True)
        grad_x = grads.matmul(weight)
        return grad_x, _weight_gradient(weight, grads.whole(), x), None


class AllGather:
    """An all-gather in progress of each rank's x [T / tp, ..., k]. With `whole`, whole() can return one tensor."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup, whole: bool = False):
        self.x, self.me, self.size = x, group.rank(), group.size()
        self.turn = exchange(x, group)
        for step in [*range(1, self.size), *[0] * whole]:
            self.turn.send(step, x)

    def matmul(self, matrix: Tensor) -> Tensor:
        """Return the gathered x times matrix [k, n]: [T, ..., n]. This rank's own part is computed first."""
        out = self.x.new_empty(self.size, *self.x.shape[:-1], matrix.shape[1])
        for step in range(self.size):
            part = self.turn.receive(step) if step else self.x
            torch.mm(part.flatten(0, -2), matrix, out=out[(self.me - step) % self.size].flatten(0, -2))
        return out.flatten(0, 1)

    def whole(self) -> Tensor:
        """Return the gathered x [T, ..., k]. It is valid until the second exchange after this one begins."""
        for step in range(self.size):
            self.turn.receive(step)
        return self.turn.parts.flatten(0, 1)


class ReduceScatter:
    """A reduce-scatter in progress of x [T, ..., k] times matrix [k, n]. Each rank gets the sum of its part."""

    def __init__(self, x: Tensor, matrix: Tensor, group: dist.ProcessGroup):
        me, self.size = group.rank(), group.size()
        parts = x.unflatten(0, (self.size, -1))
        for step in range(1, self.size):
            part = parts[(me + step) % self.size] @ matrix
            if step == 1:
                self.turn = exchange(part, group)
            self.turn.send(step, part)
        self.own = parts[me] @ matrix

    def sum(self) -> Tensor:
        """Return this rank's part [T / tp, ..., n], summed over all ranks."""
        for step in range(1, self.size):
            self.own += self.turn.receive(step)
        return self.own


def _weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of weight [n, k] from the output's gradient [T, ..., n] and the input x [T, ..., k].

    If megatron-core has a float32 buffer weight.main_grad, the gradient is added there, and the result is not used.
    """
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if not (operations.fusing and hasattr(weight, "main_grad")):
        return grad.t() @ x
    operations.accumulate(weight.main_grad, grad, x)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)
