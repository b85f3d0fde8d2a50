"""Samples on their way to the replicas that work on them: each gets its share, in order, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from meshes import ALONE, together

from rlhf.algorithms.functional import moments, running_deviation, whiten
from rlhf.contracts import Sample, Text
from rlhf.data.packing import deal, shares
from rlhf.data.shares import costs, deliver, headers, redeal
from rlhf.metrics import first
from rlhf.parallel.layout import Layout, Place
from rlhf.parallel.mesh import Mesh

HIDDEN, GROUPS, SIBLINGS = 16, 11, 3
LAYOUTS = [[[0]], [[0], [1], [2]], [[0, 1], [2, 3]], [[0, 1, 4, 5], [2, 3, 6, 7]]]  # the last: tp2 pp2 dp2


def sample(group: int, member: int) -> Sample:
    length = 4 + (7 * group + 5 * member) % 23
    version = np.where(np.arange(length) < 2, -1, group % 3).astype(np.int32)
    text = Text(group, {"answer": "4"}, f"prompt {group}", f"response {member}")
    tokens = np.arange(length + 1, dtype=np.int32) + 100 * group + 10 * member
    return Sample(tokens, version >= 0, group, reward=float(member), text=text, version=version)


EVERYTHING = {(g, k): sample(g, k) for g in range(GROUPS) for k in range(SIBLINGS)}


def told(samples: list[Sample]) -> list[tuple]:
    return [(s.group, s.reward, s.tokens.tolist(), s.version.tolist(), s.text.response, s.text.record) for s in samples]


def without_records(samples: list[Sample]) -> list[tuple]:
    return [(*known, {}) for *known, _ in told(samples)]


def delivered(mesh: Any, received: list[int] | None = None) -> list[Sample]:
    """Deliver the samples, which ranks have made in turns. The siblings of a group are made on different ranks."""
    made = {key: s for n, (key, s) in enumerate(EVERYTHING.items()) if n % mesh.world == mesh.rank}
    exchange = mesh.exchange

    def counted(parts: list[list]) -> list[list]:
        found = exchange(parts)
        if received is not None:
            received[mesh.rank] = sum(map(len, found))
        return found

    mesh.exchange = counted
    try:
        return deliver(mesh, made, headers(mesh, made), HIDDEN)
    finally:
        mesh.exchange = exchange


@pytest.mark.parametrize("replicas", LAYOUTS)
def test_each_replica_gets_its_share_and_no_more(replicas: list[list[int]]) -> None:
    """Every rank of a replica gets the samples that shares() gives it, in order, without records of the data set."""
    wanted = [without_records(part) for part in shares(list(EVERYTHING.values()), len(replicas), HIDDEN)]
    received = [0] * sum(map(len, replicas))
    found = together(replicas, lambda mesh: delivered(mesh, received))
    for replica, ranks in enumerate(replicas):
        assert all(told(found[rank]) == wanted[replica] for rank in ranks)
        assert all(received[rank] == len(wanted[replica]) for rank in ranks)


def test_headers_are_the_same_on_every_rank() -> None:
    def known(mesh: Any) -> Any:
        mine = {key: s for n, (key, s) in enumerate(EVERYTHING.items()) if n % mesh.world != 1}
        return headers(mesh, mine if mesh.rank == 0 else {k: v for k, v in EVERYTHING.items() if k not in mine})

    found = together([[0], [1], [2]][:2], known)
    assert found[0] == found[1]
    assert [header[:2] for header in found[0]] == list(EVERYTHING)
    for header, s in zip(found[0], EVERYTHING.values(), strict=True):
        assert (header.length, header.reward) == (len(s.mask), s.reward)
        assert header.versions == {s.group % 3: len(s.mask) - 2}


@pytest.mark.parametrize("replicas", LAYOUTS)
def test_each_update_is_dealt_anew(replicas: list[list[int]]) -> None:
    """Two passes of three updates. Each update's groups are dealt by their cost, as if all samples were on one rank."""
    rng = np.random.default_rng(1)
    updates = [sorted(part.tolist()) for _ in range(2) for part in np.array_split(rng.permutation(GROUPS), 3)]
    updates.append([])

    def dealt(mesh: Any) -> list[list[tuple]]:
        share = delivered(mesh)
        known = costs(mesh, share, HIDDEN)
        assert list(known) == list(range(GROUPS))
        return [told(batch) for batch in redeal(mesh, share, known, updates)]

    found = together(replicas, dealt)
    for n, numbers in enumerate(updates):
        batch = [s for s in EVERYTHING.values() if s.group in numbers]
        wanted = [without_records(part) for part in shares(batch, len(replicas), HIDDEN)]
        assert all(found[rank][n] == wanted[r] for r, ranks in enumerate(replicas) for rank in ranks)


def test_one_update_of_all_groups_moves_nothing() -> None:
    def check(mesh: Any) -> None:
        share = delivered(mesh)
        known, exchange = costs(mesh, share, HIDDEN), mesh.exchange
        sent: list[Any] = []
        mesh.exchange = lambda parts: exchange(sent.append(parts) or parts)
        (batch,) = redeal(mesh, share, known, [list(known)])
        assert [id(s) for s in batch] == [id(s) for s in share]
        assert not any(part for parts in sent for part in parts)

    together([[0, 1], [2, 3]], check)


@pytest.mark.parametrize("count", [-1, 1, 7, 100])
def test_the_first_samples_go_to_rank_0(count: int) -> None:
    everything = without_records(list(EVERYTHING.values()))
    found = together([[0, 1], [2, 3]], lambda mesh: told(first(mesh, delivered(mesh), count)))
    assert found == [everything if count < 0 else everything[:count], [], [], []]


def test_statistics_are_those_of_all_replicas() -> None:
    """A replica without samples takes part, too."""
    values = np.random.default_rng(2).normal(3, 2, 40).astype(np.float32)
    parts = np.split(values, [7, 7, 25])  # the second is empty

    def spread(mesh: Any) -> tuple:
        part, state = parts[mesh.rank], dict[str, float]()
        made = [Sample(np.zeros(len(part) + 1), np.ones(len(part), bool), 0, advantages=part)] if len(part) else []
        deviations = [running_deviation(state, part, mesh.total) for _ in range(2)]
        whiten(made, mesh.total)
        return moments(part, mesh.total), deviations, state, [s.advantages for s in made]

    found = together([[0], [1], [2], [3]], spread)
    count, mean, squares = found[0][0]
    assert (count, mean, squares) == pytest.approx((40, values.mean(), 40 * values.var()), rel=1e-5)
    assert all(known[:3] == found[0][:3] for known in found), "bitwise equal on every rank"
    assert found[0][1] == pytest.approx([values.std()] * 2, rel=1e-5)
    whitened = np.concatenate([x for *_, made in found for x in made])
    assert (whitened.mean(), whitened.std()) == pytest.approx((0, 1), abs=1e-5)


def test_one_replica_whitens_as_numpy_does() -> None:
    """Mean, deviation and quotient are computed in float64, so the result is that of numpy, bitwise."""
    values = np.random.default_rng(3).normal(3, 2, 40).astype(np.float32)
    sample = Sample(np.zeros(41), np.ones(40, bool), 0, advantages=values)
    whiten([sample], ALONE.total)
    exact = values.astype(np.float64)
    assert np.array_equal(sample.advantages, ((exact - exact.mean()) / np.sqrt(exact.var() + 1e-8)).astype(np.float32))


def test_a_deal_keeps_groups_whole() -> None:
    group = [3, 1, 3, 2, 1]
    dealt = deal([5, 9, 5, 2, 9], group, 2, HIDDEN)
    assert sorted(i for share in dealt for i in share) == list(range(5))
    assert dealt == [[1, 4], [0, 2, 3]]


@pytest.mark.parametrize(("tp", "pp", "cp", "dp"), [(1, 1, 1, 3), (2, 1, 1, 2), (2, 2, 2, 3)])
def test_a_rank_is_at_its_place_in_its_replica(tp: int, pp: int, cp: int, dp: int) -> None:
    layout = Layout(tp, pp, cp, dp)
    replicas = layout.replicas()
    assert sorted(rank for ranks in replicas for rank in ranks) == list(range(layout.world))
    for rank in range(layout.world):
        t, c, d, p = layout.coordinates(rank)
        assert (rank, layout.place(rank)) == (((p * dp + d) * cp + c) * tp + t, Place((t, tp), (p, pp)))
        mesh = SimpleNamespace(replicas=replicas, rank=rank, dp_rank=d)
        place, size = Mesh.place_in_replica.fget(mesh)  # type: ignore[attr-defined]
        assert replicas[d][place] == rank
        assert len(replicas[d]) == size
