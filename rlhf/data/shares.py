"""Moves samples to the data-parallel replicas that work on them. Groups stay whole.

All ranks know the header of every sample of a step: its group, length and reward. From these alone each rank computes
which replica gets which groups. Tokens, log-probs and texts are sent only to the ranks of that replica. So the bytes
that a rank receives depend on its replica's share of the step, not on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rlhf.contracts import Sample
from rlhf.data.packing import balance, cost, deal

if TYPE_CHECKING:
    from rlhf.parallel.mesh import Mesh

Key = tuple[int, int]  # number of the group, index of the response in its group


class Header(NamedTuple):
    """What all ranks know about a sampled response."""

    group: int
    member: int  # index of the response in its group
    length: int  # number of predictions, of the prompt and the response
    reward: float
    failed: bool  # it has no reward
    versions: Mapping[int, int]  # version of the weights -> number of tokens that they sampled


def headers(mesh: Mesh, made: Mapping[Key, Sample]) -> list[Header]:
    """Return the headers of the samples of all ranks, ordered by group and member, on every rank.

    `made`: the samples of this rank. Each sample is on one rank.
    """
    mine = [Header(*key, len(s.mask), s.reward, s.verdict.failed, _versions(s)) for key, s in made.items()]
    return sorted(header for part in mesh.all_gather(mine) for header in part)


def deliver(mesh: Mesh, made: Mapping[Key, Sample], chosen: Sequence[Header], hidden: int) -> list[Sample]:
    """Return this replica's share of the chosen samples, in order, on every rank of the replica.

    The records of the data set are not sent. `made`: as for headers(). hidden: see packing.cost().
    """
    replicas = mesh.replicas
    dealt = deal([h.length for h in chosen], [h.group for h in chosen], len(replicas), hidden)
    parts: list[list[tuple[Key, Sample]]] = [[] for _ in range(mesh.world)]
    for ranks, share in zip(replicas, dealt, strict=True):
        keys = [(chosen[i].group, chosen[i].member) for i in share]
        part = [(key, replace(s, text=replace(s.text, record={}))) for key in keys if (s := made.get(key))]
        for rank in ranks:
            parts[rank] = part
    found = [item for part in mesh.exchange(parts) for item in part]
    return [sample for _, sample in sorted(found, key=lambda item: item[0])]


def costs(mesh: Mesh, samples: Sequence[Sample], hidden: int) -> dict[int, float]:
    """Return the cost of every group of all replicas, in order of groups, on every rank.

    `samples`: the share of this replica. hidden: see packing.cost().
    """
    mine: dict[int, float] = {}
    for sample in samples:
        mine[sample.group] = mine.get(sample.group, 0.0) + cost(len(sample.mask), hidden)
    return dict(sorted(item for part in mesh.all_gather(mine) for item in part.items()))


def redeal(
    mesh: Mesh, samples: Sequence[Sample], known: Mapping[int, float], updates: Sequence[Sequence[int]]
) -> list[list[Sample]]:
    """Return this replica's samples of each update. The groups of each update are dealt to the replicas by their cost.

    `samples`: the share of this replica. It gets what it lacks from other replicas, once for all updates. known: the
    costs() of all groups. updates: the groups of each update, in order.
    """
    replicas, here, (place, _) = mesh.replicas, mesh.dp_rank, mesh.place_in_replica
    dealt = [
        [[groups[i] for i in share] for share in balance([known[g] for g in groups], len(replicas))]
        for groups in updates
    ]
    parts: list[list[Sample]] = [[] for _ in range(mesh.world)]
    for replica, ranks in enumerate(replicas):
        wanted = {group for shares in dealt for group in shares[replica]}
        if replica != here:  # each rank serves the rank at its own place
            parts[ranks[place]] = [s for s in samples if s.group in wanted]
    members: dict[int, list[Sample]] = {}
    for sample in (*samples, *(s for part in mesh.exchange(parts) for s in part)):
        members.setdefault(sample.group, []).append(sample)
    return [[s for group in shares[here] for s in members[group]] for shares in dealt]


def _versions(sample: Sample) -> dict[int, int]:
    versions, counts = np.unique(sample.version[sample.mask], return_counts=True)
    return dict(zip(versions.tolist(), counts.tolist(), strict=True))
