"""Meshes without process groups and without megatron-core: of one rank, and of several ranks as threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

from rlhf.errors import UserError


def agree(mistake: str) -> None:
    if mistake:
        raise UserError(mistake)


ALONE: Any = SimpleNamespace(
    rank=0,
    world=1,
    dp_rank=0,
    place_in_replica=(0, 1),
    is_first_in_replica=True,
    is_first_on_node=True,
    replicas=[[0]],
    all_gather=lambda value: [value],
    exchange=lambda parts: parts,
    total=lambda x: x,
    largest=lambda count: count,
    gatherer=lambda size: lambda value: [value],
    agree=agree,
)


def together(replicas: list[list[int]], call: Callable[[Any], Any]) -> list[Any]:
    """Return call(mesh) of every rank, by rank. `replicas`: the ranks of each data-parallel replica."""
    world = sum(map(len, replicas))
    values, barrier = [None] * world, Barrier(world, timeout=20)

    def run(rank: int) -> Any:
        def all_gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        (replica,) = (number for number, ranks in enumerate(replicas) if rank in ranks)
        place, first = replicas[replica].index(rank), [ranks[0] for ranks in replicas]
        mesh = SimpleNamespace(
            rank=rank,
            world=world,
            dp_rank=replica,
            place_in_replica=(place, len(replicas[replica])),
            is_first_in_replica=place == 0,
            replicas=replicas,
            all_gather=all_gather,
            exchange=lambda parts: [sent[rank] for sent in all_gather(parts)],
            total=lambda x: sum(part for rank, part in enumerate(all_gather(x)) if rank in first),
            largest=lambda count: max(all_gather(count)),
        )
        return call(mesh)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))
