"""Tensors that the ranks of a group hand each other while they compute.

Every rank sends, step by step, to the rank `step` places behind it in the ring, and receives from the one as many places before it. Where GPUs
reach each other's memory, copy engines write into the receiver's: collectives of NCCL would take multiprocessors from the products that run
meanwhile. Elsewhere they are messages of torch.distributed.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

SLOTS = 3  # of memory that peers write to, in turns
GRAIN = 2**25  # bytes by which a slot grows


class Exchange(Protocol):
    """One turn: parts[r] is what rank r has sent to this one, once receive() has returned it. All ranks exchange the same shape.

    Step 0 is a rank's message to itself. At most two turns may be under way: what the first has brought is read, in the order of the device, before a third is begun.
    """

    parts: Tensor  # [ranks, *shape]

    def send(self, step: int, x: Tensor) -> None:
        """Begin to send x to the rank `step` places on; x is not to be changed before receive(step)."""

    def receive(self, step: int) -> Tensor:
        """What the rank `step` places before has sent, for whatever the device does next."""


def exchange(x: Tensor, group: dist.ProcessGroup) -> Exchange:
    """A turn in which x, or tensors like it, are sent."""
    return _Copies(x, _Memory.of(group)) if direct(group) else _Messages(x, group)


@cache
def direct(group: dist.ProcessGroup) -> bool:
    """Whether the ranks of a group have GPUs that read and write each other's memory: of one node, connected by NVLink or PCIe."""
    ranks = dist.get_process_group_ranks(group)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if not torch.cuda.is_available() or len({rank // per_node for rank in ranks}) > 1:
        return False
    me, peers = torch.cuda.current_device(), {rank % per_node for rank in ranks}
    return max(peers) < torch.cuda.device_count() and all(torch.cuda.can_device_access_peer(me, peer) for peer in peers - {me})


class _Messages:
    def __init__(self, x: Tensor, group: dist.ProcessGroup):
        self.group, self.me, self.size = group, group.rank(), group.size()
        self.parts = x.new_empty(self.size, *x.shape)
        self.works: dict[int, list[dist.Work]] = {}
        self.sent: list[Tensor] = []

    def send(self, step: int, x: Tensor) -> None:
        into = self.parts[(self.me - step) % self.size]
        if step == 0:
            into.copy_(x)
            return
        self.sent.append(x.contiguous())
        messages = [
            dist.P2POp(dist.isend, self.sent[-1], group=self.group, group_peer=(self.me + step) % self.size),
            dist.P2POp(dist.irecv, into, group=self.group, group_peer=(self.me - step) % self.size),
        ]
        self.works[step] = dist.batch_isend_irecv(messages)

    def receive(self, step: int) -> Tensor:
        for work in self.works.pop(step, []):
            work.wait()
        return self.parts[(self.me - step) % self.size]


class _Copies:
    def __init__(self, x: Tensor, memory: _Memory):
        self.memory, self.shape, self.dtype = memory, (memory.size, *x.shape), x.dtype
        self.slot = memory.next(memory.size * x.nbytes)
        self.parts = self._of(memory.me)
        self.arrivals: dict[int, torch.cuda.Event] = {}
        self.sent: list[Tensor] = []  # may not be used again by others before it has gone

    def _of(self, rank: int) -> Tensor:
        """The slot of this turn on a rank."""
        offset = self.slot * self.memory.bytes // self.dtype.itemsize
        return self.memory.handle.get_buffer(rank, self.shape, self.dtype, offset)

    def send(self, step: int, x: Tensor) -> None:
        self.sent.append(x)
        memory = self.memory
        memory.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(memory.stream):
            self._of((memory.me + step) % memory.size)[memory.me].copy_(x)
            if step:
                memory.handle.barrier(channel=0)  # then everybody's copy of this step has arrived
            self.arrivals[step] = memory.stream.record_event()

    def receive(self, step: int) -> Tensor:
        torch.cuda.current_stream().wait_event(self.arrivals[step])
        return self.parts[(self.memory.me - step) % self.memory.size]


class _Memory:
    """A rank's slots that the peers of a group write to.

    A barrier in front of each copy, for a slot that must have been read, would be of no use: a rank that begins turn n has read turn n - 2,
    and whoever begins turn n + 1 has met it behind turn n. So the slot that turn n + 1 writes to, of turn n - 2, has been read everywhere.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.me, self.size = group, group.rank(), group.size()
        self.stream = torch.cuda.Stream(priority=-1)
        self.turn = self.bytes = 0

    @staticmethod
    @cache
    def of(group: dist.ProcessGroup) -> _Memory:
        return _Memory(group)

    def next(self, count: int) -> int:
        """The slot of the next turn, of `count` bytes or more. All ranks grow at the same turn, when no peer writes any more."""
        if count > self.bytes:
            self.bytes = -(-count // GRAIN) * GRAIN
            torch.cuda.synchronize()
            slots = symmetric_memory.empty(SLOTS * self.bytes, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
            self.handle = symmetric_memory.rendezvous(slots, self.group)  # waits for all ranks; only then are the old slots given back
            self.slots = slots
        self.turn += 1
        return self.turn % SLOTS
