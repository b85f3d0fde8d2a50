"""The process groups of the ranks. Other files get process groups from here only. rlhf.parallel.layout has their order.

The ranks of a tensor-parallel group are consecutive, in training and in an engine. So these groups are inside one node.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf import progress
from rlhf.config import Parallel
from rlhf.errors import UserError
from rlhf.parallel import cpu, objects
from rlhf.parallel.layout import Layout

cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (after the CPU hook)

PATIENCE = 3600.0  # seconds
T = TypeVar("T")


class Mesh:
    """This rank's coordinates and process groups, and the collectives of the program."""

    def __init__(self, parallel: Parallel, seed: int, patience: float = PATIENCE):
        """Initialize torch.distributed (with RANK, WORLD_SIZE, MASTER_* as torchrun sets them) and make all groups.

        patience: seconds that a collective waits for the other ranks.
        """
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.world)))
        model = parallel.tp * parallel.pp * parallel.cp
        assert self.world % model == 0 and parallel.dp in (0, self.world // model), (
            f"{self.world} ranks do not fit {parallel}"
        )
        self.layout = Layout(parallel.tp, parallel.pp, parallel.cp, self.world // model)
        self.tp_rank, self.cp_rank, self.dp_rank, self.pp_rank = self.layout.coordinates(self.rank)
        self.place, self.replicas = self.layout.place(self.rank), self.layout.replicas()
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            _meet("nccl" if self.device.type == "cuda" else "gloo", patience)
        progress.enter("making the process groups")
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            context_parallel_size=parallel.cp,
        )
        # Sequence parallelism forks the state of the random tracker even with dropout 0.
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.cp_group = parallel_state.get_context_parallel_group()
        self.dp_group = parallel_state.get_data_parallel_group()
        self.pp_group = parallel_state.get_pipeline_model_parallel_group()
        # Python objects are sent over gloo, without the device.
        self._objects = dist.group.WORLD if self.device.type == "cpu" else dist.new_group(backend="gloo")

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    @property
    def is_first_on_node(self) -> bool:
        return self.rank % self.ranks_per_node == 0

    @property
    def place_in_replica(self) -> tuple[int, int]:
        """Return this rank's index in its data-parallel replica, in order of world ranks, and the replica's size."""
        ranks = self.replicas[self.dp_rank]
        return ranks.index(self.rank), len(ranks)

    @property
    def is_first_in_replica(self) -> bool:
        return self.place_in_replica[0] == 0

    def cp_sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over the context-parallel ranks. The gradient is summed over them too."""
        return _SumBoth.apply(x, self.cp_group) if self.layout.cp > 1 else x

    def from_last_stage(self, x: Tensor) -> Tensor:
        """Broadcast x (allocated on every stage) from the last pipeline stage, in place."""
        if self.layout.pp > 1:
            dist.broadcast(x, dist.get_global_rank(self.pp_group, self.layout.pp - 1), group=self.pp_group)
        return x

    def cp_gather(self, x: Tensor) -> Tensor:
        """Concatenate x[n, ...] of all context-parallel ranks along dim 0."""
        if self.layout.cp == 1:
            return x
        out = x.new_empty(self.layout.cp * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=self.cp_group)
        return out

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank. Values must be small Python objects that can be pickled.

        Every value takes as much time and memory as the largest one.
        """
        return [value] if self.world == 1 else objects.gather(value, self._objects, self.world)

    def exchange(self, parts: Sequence[list[T]]) -> list[list[T]]:
        """Send the list parts[r] to each rank r. Return the lists that all ranks sent to this one, by rank."""
        return [parts[0]] if self.world == 1 else objects.exchange(parts, self._objects, self.rank)

    def total(self, x: np.ndarray) -> np.ndarray:
        """Return the sum of x over the replicas, in their order. The ranks of a replica must have the same x."""
        return np.sum(
            [part for part in self.all_gather(x if self.is_first_in_replica else None) if part is not None], 0
        )

    def largest(self, count: int) -> int:
        """Return the largest `count` of all ranks."""
        return max(self.all_gather(count))

    def gatherer(self, size: int) -> Callable[[Any], list[Any]]:
        """Return a function like all_gather() for groups of `size` consecutive ranks. All ranks must call this."""
        if size in (1, self.world):
            return self.all_gather if size == self.world else lambda value: [value]
        group, _ = dist.new_subgroups(size, backend="gloo")
        return lambda value: objects.gather(value, group, size)

    def first_on_node(self, call: Callable[[], T]) -> T:
        """Return call(). The first rank of each node calls it first, then the other ranks, which can use its files.

        A UserError of one rank is raised on all ranks.
        """
        for turn in (True, False):
            mistake = ""
            if self.is_first_on_node == turn:
                try:
                    value = call()
                except UserError as error:
                    mistake = str(error)
            self.agree(mistake)
        return value

    def agree(self, mistake: str) -> None:
        """Raise UserError on all ranks if one rank passes a message. `mistake` is "" on a rank without a message."""
        if mistakes := [said for said in self.all_gather(mistake) if said]:
            raise UserError(mistakes[0])

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self._objects)

    def nodes(self) -> list[int]:
        """Return the node of each world rank."""
        return [rank // self.ranks_per_node for rank in range(self.world)]

    def subgroup(self, size: int) -> dist.ProcessGroup | None:
        """Return this rank's group of `size` consecutive ranks; None if size is 1. All ranks must call this."""
        if size == 1:
            return None
        return dist.new_subgroups(size)[0]


def _meet(backend: str, patience: float = PATIENCE) -> None:
    """Initialize torch.distributed. Raises UserError if the ranks cannot connect."""
    progress.enter(progress.MEETING)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=patience))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise UserError(f"{place}: the ranks cannot connect there ({reason}); set another address or port") from None


def lost(error: RuntimeError) -> str:
    """Return the reason if the error means that another rank was lost, else "".

    gloo, which all_gather() and barrier() use, has no exception type for this.
    """
    first = str(error).splitlines()[0] if str(error) else ""
    return (
        re.sub(r"^\[.*?\] |\. This is .*", "", first)
        if isinstance(error, dist.DistNetworkError) or "gloo/transport" in first
        else ""
    )


class _SumBoth(torch.autograd.Function):
    """All-reduce in forward and in backward. All ranks use the sum, so their gradients of it are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
