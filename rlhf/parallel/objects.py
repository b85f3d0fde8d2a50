"""Collectives of Python objects, pickled, over a gloo group. rlhf.parallel.mesh calls them for the ranks of a run."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def gather(value: Any, group: dist.ProcessGroup | None, size: int) -> list[Any]:
    """Return the values of all `size` ranks of the group, by rank. Every value takes as much time as the largest."""
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def exchange(parts: Sequence[list[Any]], group: dist.ProcessGroup | None, rank: int) -> list[list[Any]]:
    """Send the list parts[r] to each rank r. Return the lists that all ranks sent to this one, by rank.

    Only lists with content are pickled. The list for this rank itself is returned as it is.
    """
    sent = [pickle.dumps(part, -1) if part and to != rank else b"" for to, part in enumerate(parts)]
    sizes = torch.tensor([len(data) for data in sent])
    expected = torch.empty_like(sizes)
    dist.all_to_all_single(expected, sizes, group=group)
    received = torch.empty(int(expected.sum()), dtype=torch.uint8)
    flat = torch.from_numpy(np.frombuffer(bytearray().join(sent), np.uint8)) if any(sent) else received[:0]
    dist.all_to_all_single(received, flat, expected.tolist(), sizes.tolist(), group=group)
    found = [pickle.loads(data.numpy()) if len(data) else [] for data in received.split(expected.tolist())]
    found[rank] = parts[rank]
    return found
