"""megatron-core's linear layers for ranks that split the tokens (sequence parallelism), with transfers that go on beside products.

megatron-core gathers all tokens before a product and sums the ranks' results after another. Here products are cut by ranks instead: while
tokens that are there are multiplied, the others come, and while the last part is multiplied, the results of the first go.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import rlhf.parallel.mesh  # noqa: F401  (first: it lets megatron-core be imported where there is no CUDA)

# isort: split
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from rlhf.model import operations
from rlhf.parallel.exchange import exchange


class ColumnLinear(ColumnParallelLinear):
    """x [T / tp, ..., in], gathered, times the transpose of weight [out / tp, in] -> [T, ..., out / tp]."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        out = _Column.apply(input_, self.weight, self.tp_group)
        return out if self.bias is None else out + self.bias, None


class RowLinear(RowParallelLinear):
    """x [T, ..., in / tp] times the transpose of weight [out, in / tp], summed over the ranks -> [T / tp, ..., out]."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        assert self.bias is None, "a bias would be added on every rank"
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
        inputs = AllGather(
            x.contiguous(), ctx.group, whole=True
        )  # they come during the next product, and its results go during the last
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
    """All ranks' x [T / tp, ..., k], on their way; with `whole` they will stand in one tensor."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup, whole: bool = False):
        self.x, self.me, self.size = x, group.rank(), group.size()
        self.turn = exchange(x, group)
        for step in [*range(1, self.size), *[0] * whole]:
            self.turn.send(step, x)

    def matmul(self, matrix: Tensor) -> Tensor:
        """[T, ..., k] matrix [k, n] -> [T, ..., n], this rank's own part first."""
        out = self.x.new_empty(self.size, *self.x.shape[:-1], matrix.shape[1])
        for step in range(self.size):
            part = self.turn.receive(step) if step else self.x
            torch.mm(part.flatten(0, -2), matrix, out=out[(self.me - step) % self.size].flatten(0, -2))
        return out.flatten(0, 1)

    def whole(self) -> Tensor:
        """[T, ..., k], which lasts until the exchange after the next one."""
        for step in range(self.size):
            self.turn.receive(step)
        return self.turn.parts.flatten(0, 1)


class ReduceScatter:
    """The parts of x [T, ..., k] matrix [k, n], each on its way to the rank that gets its sum."""

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
        """Over all ranks, of this rank's part [T / tp, ..., n]."""
        for step in range(1, self.size):
            self.own += self.turn.receive(step)
        return self.own


def _weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Of weight [n, k], from the gradient [T, ..., n] of its output and its input [T, ..., k].

    Where megatron-core keeps a float32 sum in weight.main_grad, it is added there, and what is returned is not read.
    """
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if not (operations.fusing and hasattr(weight, "main_grad")):
        return grad.t() @ x
    operations.accumulate(weight.main_grad, grad, x)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)
