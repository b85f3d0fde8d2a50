"""Packing: what every rank trains on, and how it is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import samples

from rlhf.data.packing import balance, fill, microbatches, pack, shares, unpack


def test_alignment_by_hand() -> None:
    """inputs and labels are the tokens one apart, every stream belongs to its label, and padding is a segment of its own."""
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
    for part in parts:  # every query of a span sits at the end of its keys
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


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_microbatches_are_a_partition_with_equal_counts(dp: int) -> None:
    made = samples(20)
    shared = shares(made, dp, hidden=64)
    cut = microbatches(shared, budget=128, whole_groups=False)
    assert len({len(bins) for bins in cut}) == 1
    assert sorted(id(s) for bins in cut for b in bins for s in b) == sorted(map(id, made))
    assert all(sum(len(s.mask) for s in b) <= 128 for bins in cut for b in bins)
    homes = {}
    for rank, share in enumerate(shared):
        for s in share:
            assert homes.setdefault(s.group, rank) == rank, "a group was split over data-parallel ranks"


def test_whole_groups_share_a_microbatch() -> None:
    cut = microbatches(shares(samples(12), 2, hidden=64), budget=150, whole_groups=True)
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
    loads = [sum(b) for b in [[list(range(1, 41))[i] for i in share] for share in balance([float(x) for x in range(1, 41)], 4)]]
    assert max(loads) - min(loads) <= 2
