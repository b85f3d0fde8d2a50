"""Splits samples over data-parallel replicas and micro-batches, and packs them. Only pack() makes inputs and labels.

The split is a pure function of the samples' lengths and groups. rlhf.data.shares sends the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapreplace

import numpy as np
import torch
from torch import Tensor

from rlhf.contracts import STREAMS, AllSum, Batch, Sample, Spans, groups, worth


def cost(length: int, hidden: int) -> float:
    """Return the FLOPs of a sequence, relative to the FLOPs of one token without attention.

    Matrix products grow with the length L, and causal attention grows with L^2.
    """
    return length * (1.0 + length / (12.0 * hidden))


def balance(costs: Sequence[float], shares: int) -> list[list[int]]:
    """Split items into shares of about equal cost (longest processing time first). Return the indices of each share."""
    loads = [(0.0, share) for share in range(shares)]  # a heap; among equal loads, the first share comes first
    dealt: list[list[int]] = [[] for _ in range(shares)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, share = loads[0]
        heapreplace(loads, (load + costs[item], share))
        dealt[share].append(item)
    return [sorted(items) for items in dealt]


def fill(lengths: Sequence[int], budget: int, least: int = 1) -> list[list[int]]:
    """Split the items into bins of at most `budget` tokens. Return the indices of each bin.

    There are at least `least` bins. An item that is longer than the budget gets its own bin.
    """
    count = max(least, -(-sum(lengths) // budget))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        loads = [(0, b) for b in range(count)]  # a heap; among equal loads, the first bin comes first
        bins: list[list[int]] = [[] for _ in range(count)]
        for item in order:
            load, emptiest = loads[0]
            if load and load + lengths[item] > budget:
                break
            heapreplace(loads, (load + lengths[item], emptiest))
            bins[emptiest].append(item)
        else:
            return [sorted(items) for items in bins]
        count += 1


def deal(lengths: Sequence[int], group: Sequence[int], dp: int, hidden: int) -> list[list[int]]:
    """Deal samples of these lengths and groups to the data-parallel replicas. Groups stay whole.

    Return the indices of the samples of each replica.
    """
    members: dict[int, list[int]] = {}  # in order of first appearance
    for i, number in enumerate(group):
        members.setdefault(number, []).append(i)
    items = list(members.values())
    dealt = balance([sum(cost(lengths[i], hidden) for i in indices) for indices in items], dp)
    return [[i for m in share for i in items[m]] for share in dealt]


def shares(samples: Sequence[Sample], dp: int, hidden: int) -> list[list[Sample]]:
    """Return the samples of each data-parallel replica. Groups stay whole."""
    dealt = deal([len(s.mask) for s in samples], [s.group for s in samples], dp, hidden)
    return [[samples[i] for i in share] for share in dealt]


def microbatches(
    share: Sequence[Sample], budget: int, whole_groups: bool, largest: Callable[[int], int] = lambda count: count
) -> list[list[Sample]]:
    """Split one replica's samples into micro-batches of at most `budget` tokens.

    largest(count) returns the largest count of all replicas, which call it together. So all replicas get the same
    number of micro-batches. Some micro-batches of a short share are empty.
    """
    units = groups(share) if whole_groups else [[sample] for sample in share]
    sizes = [sum(len(s.mask) for s in unit) for unit in units]
    bins, count = fill(sizes, budget), 0
    while (most := largest(len(bins))) != count:  # fill() may need more than `count` bins, so repeat until all agree
        count = most
        if len(bins) < count:
            bins = fill(sizes, budget, count)
    return [[s for u in items for s in units[u]] for items in bins]


def pack(
    samples: Sequence[Sample],
    *,
    cp: tuple[int, int] = (0, 1),
    multiple: int = 1,
    device: torch.device | str = "cpu",
    cp_sum: AllSum = lambda x: x,
) -> Batch:
    """Pack whole samples into one micro-batch. With cp=(rank, size), return this rank's slice of it.

    The row is padded to a multiple of `multiple` tokens (times 2 x cp size with context parallelism). The padding is
    its own segment. Without samples, the row is padding only. With context parallelism, the row is cut into 2 x size
    chunks. Rank r takes chunks r and 2 x size - 1 - r, which balances causal attention.
    """
    rank, size = cp
    lengths = [len(s.mask) for s in samples]
    assert all(n == len(s.tokens) - 1 > 0 for s, n in zip(samples, lengths, strict=True)), (
        "a sample needs two tokens and a mask over its labels"
    )
    unit = multiple * (2 * size if size > 1 else 1)
    padding = -sum(lengths) % unit or (unit if not samples else 0)
    segments = [*lengths, padding] if padding else lengths

    def row(parts: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate([*(np.asarray(p, dtype) for p in parts), np.zeros(padding, dtype)])

    places = _places(sum(segments), rank, size)

    def move(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if torch.device(device).type == "cuda":  # copies from pinned memory are asynchronous
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    def local(array: np.ndarray) -> Tensor:
        return move(array[places])

    streams = {}
    for name in STREAMS:
        parts = [getattr(s, name) for s in samples]
        if all(p is not None for p in parts):  # also true without samples: a row of padding has every stream
            streams[name] = local(row(parts, np.float32))
    return Batch(
        inputs=local(row([s.tokens[:-1] for s in samples], np.int64)),
        labels=local(row([s.tokens[1:] for s in samples], np.int64)),
        positions=local(np.concatenate([np.arange(n, dtype=np.int64) for n in segments])),
        places=move(places),
        spans=_spans(segments, rank, size),
        mask=local(row([s.mask for s in samples], np.float32)),
        last=local(row([_last(s.mask) for s in samples], np.float32)),
        segment=local(np.repeat(np.arange(len(segments), dtype=np.int64), segments)),
        group=move(np.array([s.group for s in samples], np.int64)),
        reward=move(worth([s.reward for s in samples])),
        pairs=move(_pairs(samples)),
        streams=streams,
        cp_sum=cp_sum,
    )


def unpack(row: np.ndarray, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Split a stream over a whole row [T] into one array [L] per sample."""
    return np.split(row, np.cumsum([len(s.mask) for s in samples]))[:-1]


def _pairs(samples: Sequence[Sample]) -> np.ndarray:
    """Return the pairs of Batch.pairs. On the device, their number would need a synchronization."""
    group = np.array([s.group for s in samples], np.int64)
    reward = worth([s.reward for s in samples])
    return np.stack(np.nonzero((group[:, None] == group) & (reward[:, None] > reward)))


def _last(mask: np.ndarray) -> np.ndarray:
    last = np.zeros(len(mask), np.float32)
    if mask.any():
        last[np.flatnonzero(mask)[-1]] = 1.0
    return last


def _chunks(total: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Return the chunks of the row that a CP rank holds, as (start, end)."""
    if size == 1:
        return [(0, total)]
    width = total // (2 * size)
    return [(c * width, (c + 1) * width) for c in (rank, 2 * size - 1 - rank)]


def _places(total: int, rank: int, size: int) -> np.ndarray:
    return np.concatenate([np.arange(start, end) for start, end in _chunks(total, rank, size)])


def _spans(segments: Sequence[int], rank: int, size: int) -> Spans:
    spans, offset = Spans([], [], [], []), 0
    ends = np.cumsum(segments)
    for start, end in _chunks(int(ends[-1]), rank, size):
        for first, last in zip(ends - segments, ends, strict=True):
            a, b = max(start, int(first)), min(end, int(last))
            if a < b:
                spans.q_starts.append(offset + a - start)
                spans.q_lengths.append(b - a)
                spans.k_starts.append(int(first))
                spans.k_lengths.append(b - int(first))
        offset += end - start
    return spans
