"""Packing: the samples of each rank, and their micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from meshes import together
from models import samples

from rlhf.contracts import Sample, groups
from rlhf.data.packing import balance, cost, fill, microbatches, pack, shares, unpack


def test_alignment_by_hand() -> None:
    """Labels are the next tokens, streams are aligned with labels, and padding is a separate segment."""
    first, second = samples(2)
    batch = pack([first, second], multiple=64)
    n = len(first.mask)
    assert batch.inputs[:n].tolist() == first.tokens[:-1].tolist()
    assert batch.labels[:n].tolist() == first.tokens[1:].tolist()
    assert batch.positions[: n + 1].tolist() == [*range(n), 0]
    total = n + len(second.mask)
    assert len(batch.inputs) % 64 == 0
    assert batch.mask[total:].sum() == 0
    assert set(batch.segment[total:].tolist()) == {2}
    assert batch.streams["old_logp"][n : n + 2].tolist() == second.old_logp[:2].tolist()
    assert batch.last.nonzero()[:, 0].tolist() == [np.flatnonzero(first.mask)[-1], n + np.flatnonzero(second.mask)[-1]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_parallel_slices_make_the_row(size: int) -> None:
    made = samples(5)
    whole = pack(made, multiple=8)
    parts = [pack(made, cp=(rank, size), multiple=8) for rank in range(size)]
    row = torch.full((max(int(p.places.max()) for p in parts) + 1,), -1)
    for part in parts:
        row[part.places] = part.inputs
    total = sum(len(s.mask) for s in made)
    assert row[:total].tolist() == whole.inputs[:total].tolist()
    for part in parts:  # the last query of a span is the last of its keys
        spans = part.spans
        assert sum(spans.q_lengths) == len(part.inputs)
        for q, nq, k, nk in zip(spans.q_starts, spans.q_lengths, spans.k_starts, spans.k_lengths, strict=True):
            assert part.places[q : q + nq].tolist() == list(range(k + nk - nq, k + nk))
            assert part.positions[q].item() == nk - nq


def test_unpack_returns_each_samples_stream() -> None:
    made = samples(4)
    batch = pack(made, multiple=16)
    for sample, stream in zip(made, unpack(batch.streams["old_logp"].numpy(), made), strict=True):
        assert np.array_equal(stream, sample.old_logp)


def cut_by_all(
    made: Sequence[Sample], dp: int, hidden: int, budget: int, whole_groups: bool
) -> list[list[list[Sample]]]:
    """Return the micro-batches of all replicas, which agree on their number: [replica][micro-batch][sample]."""
    shared = shares(made, dp, hidden)
    return together(
        [[rank] for rank in range(dp)],
        lambda mesh: microbatches(shared[mesh.rank], budget, whole_groups, mesh.largest),
    )


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_microbatches_are_a_partition_with_equal_counts(dp: int) -> None:
    made = samples(20)
    shared = shares(made, dp, hidden=64)
    cut = cut_by_all(made, dp, 64, 128, False)
    assert len({len(bins) for bins in cut}) == 1
    assert sorted(id(s) for bins in cut for b in bins for s in b) == sorted(map(id, made))
    assert all(sum(len(s.mask) for s in b) <= 128 for bins in cut for b in bins)
    homes = {}
    for rank, share in enumerate(shared):
        for s in share:
            assert homes.setdefault(s.group, rank) == rank, "a group was split over data-parallel ranks"


def test_whole_groups_share_a_microbatch() -> None:
    cut = cut_by_all(samples(12), 2, 64, 150, True)
    homes = {}
    for rank, bins in enumerate(cut):
        for i, b in enumerate(bins):
            for s in b:
                assert homes.setdefault(s.group, (rank, i)) == (rank, i)


def test_an_item_over_the_budget_gets_a_bin_of_its_own() -> None:
    bins = fill([50, 500, 60, 40], budget=100)
    assert [1] in bins
    assert all(sum([50, 500, 60, 40][i] for i in b) <= 100 for b in bins if b != [1])


def test_balance_is_even() -> None:
    loads = [
        sum(b)
        for b in [[list(range(1, 41))[i] for i in share] for share in balance([float(x) for x in range(1, 41)], 4)]
    ]
    assert max(loads) - min(loads) <= 2


def balance_by_hand(costs: Sequence[float], shares: int) -> list[list[int]]:
    """The first version of balance(): every item looks at all loads."""
    loads, dealt = [0.0] * shares, [[] for _ in range(shares)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        share = min(range(shares), key=lambda s: (loads[s], s))
        loads[share] += costs[item]
        dealt[share].append(item)
    return [sorted(items) for items in dealt]


def fill_by_hand(lengths: Sequence[int], budget: int, least: int = 1) -> list[list[int]]:
    """The first version of fill(): every item looks at all bins."""
    count = max(least, -(-sum(lengths) // budget))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        loads, bins = [0] * count, [[] for _ in range(count)]
        for item in order:
            emptiest = min(range(count), key=lambda b: (loads[b], b))
            if loads[emptiest] and loads[emptiest] + lengths[item] > budget:
                break
            loads[emptiest] += lengths[item]
            bins[emptiest].append(item)
        else:
            return [sorted(items) for items in bins]
        count += 1


def cut_by_hand(
    samples: Sequence[Sample], dp: int, hidden: int, budget: int, whole_groups: bool
) -> list[list[list[Sample]]]:
    """The first version of shares() and microbatches().

    The number of bins grows by one until every share fits.
    """
    members = groups(samples)
    dealt = balance_by_hand([sum(cost(len(s.mask), hidden) for s in group) for group in members], dp)
    shared = [[sample for i in items for sample in members[i]] for items in dealt]
    units = [groups(share) if whole_groups else [[s] for s in share] for share in shared]
    lengths = [[sum(len(s.mask) for s in unit) for unit in share] for share in units]
    count = max(len(fill_by_hand(share, budget)) for share in lengths)
    while any(len(fill_by_hand(share, budget, count)) > count for share in lengths):
        count += 1
    cut = [fill_by_hand(share, budget, count) for share in lengths]
    return [[[s for i in items for s in units[r][i]] for items in bins] for r, bins in enumerate(cut)]


def test_heaps_deal_and_fill_as_by_hand() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        lengths = rng.integers(
            1, rng.choice([3, 30, 300]), rng.integers(0, 60)
        ).tolist()  # many equal lengths, because few are possible
        count, budget = int(rng.integers(1, 9)), int(rng.integers(1, 400))
        costs = [cost(n, 8) for n in lengths]
        assert balance(costs, count) == balance_by_hand(costs, count)
        assert fill(lengths, budget, count) == fill_by_hand(lengths, budget, count)


def test_microbatches_are_those_cut_by_hand() -> None:
    """All kinds of lengths, groups and layouts are tested. Some shares need more micro-batches than others."""
    rng = np.random.default_rng(2)
    (base,) = samples(1)
    apart = 0
    for turn in range(300):
        lengths = rng.integers(1, rng.choice([3, 30, 300]), rng.integers(1, 50)).tolist()
        made = [replace(base, mask=np.ones(n, bool), group=int(rng.integers(0, 12))) for n in lengths]
        dp, hidden, budget, whole = int(rng.integers(1, 6)), 8, int(rng.integers(20, 400)), bool(turn % 2)
        wanted = [[list(map(id, b)) for b in bins] for bins in cut_by_hand(made, dp, hidden, budget, whole)]
        cut = cut_by_all(made, dp, hidden, budget, whole)
        assert [[list(map(id, b)) for b in bins] for bins in cut] == wanted
        shared = shares(made, dp, hidden)
        apart += len({len(fill([len(s.mask) for s in share], budget)) for share in shared}) > 1
    assert apart > 20
