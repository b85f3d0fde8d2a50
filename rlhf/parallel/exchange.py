"""Tensors that the ranks of a group hand each other while they compute.

Every rank sends to the rank `step` places after it, in a ring, and receives from the one as many places before it. Where NVLink connects
the GPUs, copy engines write into the receiver's memory: collectives of NCCL would take multiprocessors from products that run meanwhile.
Elsewhere (two GPUs without NVLink, CPUs) they are messages of torch.distributed.
"""

from __future__ import annotations

import socket
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

SLOTS = 3  # of memory that peers write to, in turns
GRAIN = 2**25  # bytes by which a slot grows


class Exchange(Protocol):
    """One turn: parts[r] is what rank r has sent to this one, once receive() has returned it. All ranks exchange the same shape.

    Step 0 is a rank's message to itself. At most two turns may be under way: what the first has brought is read, in the order of the
    device, before a third is begun.
    """

    parts: Tensor  # [ranks, *shape]

    def send(self, step: int, x: Tensor) -> None:
        """Begin to send x to the rank `step` places on; x is not to be changed before receive(step)."""

    def receive(self, step: int) -> Tensor:
        """What the rank `step` places before has sent, for whatever the device does next."""


def exchange(x: Tensor, group: dist.ProcessGroup) -> Exchange:
    """A turn in which x, or tensors like it, are sent."""
    return _Copies(x, _Memory.of(group)) if direct(group) else _Messages(x, group)


def pays(group: dist.ProcessGroup) -> bool:
    """Whether to cut products and exchange. On GPUs, messages among more than two ranks are slower than megatron-core's collectives.

    The first call may be a collective.
    """
    return group.size() == 2 or direct(group) or not torch.cuda.is_available()


@cache
def direct(group: dist.ProcessGroup) -> bool:
    """Whether NVLink connects the GPUs of all ranks of a group. (Over PCIe they could copy, but not meet: it has no atomic operations.)

    All of them agree; the first call is a collective.
    """
    if not torch.cuda.is_available():
        return False
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]

    me = torch.cuda.current_device()
    try:
        links = _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix[me]
    except RuntimeError:  # NVML does not say
        links = [0] * torch.cuda.device_count()
    seen = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    places = _all_gather((socket.gethostname(), str(torch.cuda.get_device_properties(me).uuid)), group)
    peers = [seen.get(device, -1) for host, device in places if host == socket.gethostname()]
    reached = all(peer == me or (peer >= 0 and links[peer] > 0) for peer in peers)
    return all(_all_gather(reached and len(peers) == len(places), group))


def _all_gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


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
        self.me, self.size, self.stream = memory.me, memory.size, memory.stream
        self.shape, self.dtype = (self.size, *x.shape), x.dtype
        self.start = memory.next(self.size * x.nbytes)
        self.handle, self.slots = memory.handle, memory.slots  # kept, should the next turn need larger ones
        self.parts = self._of(self.me)
        self.arrivals: dict[int, torch.cuda.Event] = {}
        self.sent: list[Tensor] = []  # may not be used again by others before it has gone

    def _of(self, rank: int) -> Tensor:
        """The slot of this turn on a rank."""
        return self.handle.get_buffer(rank, self.shape, self.dtype, self.start // self.dtype.itemsize)

    def send(self, step: int, x: Tensor) -> None:
        self.sent.append(x)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._of((self.me + step) % self.size)[self.me].copy_(x)
            if step:
                self.handle.barrier(channel=0)  # then everybody's copy of this step has arrived
            self.arrivals[step] = self.stream.record_event()

    def receive(self, step: int) -> Tensor:
        torch.cuda.current_stream().wait_event(self.arrivals[step])
        return self.parts[(self.me - step) % self.size]


class _Memory:
    """A rank's slots that the peers of a group write to.

    A barrier in front of each copy, for a slot that must have been read, would be of no use: a rank that begins turn n has read turn n - 2,
    and whoever begins turn n + 1 has met it behind turn n. So the slot that turn n + 1 writes to, of turn n - 2, has been read everywhere.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.me, self.size = group, group.rank(), group.size()
        self.stream = torch.cuda.Stream(priority=-1)
        self.turn = self.bytes = 0
        self.slots: Tensor | None = None
        self.handle: Any = None

    @staticmethod
    @cache
    def of(group: dist.ProcessGroup) -> _Memory:
        return _Memory(group)

    def next(self, count: int) -> int:
        """Where the slot of the next turn begins, of `count` bytes or more. All ranks grow at the same turn, and no peer writes then."""
        if count > self.bytes:
            import torch.distributed._symmetric_memory as symmetric_memory

            self.bytes = -(-count // GRAIN) * GRAIN
            torch.cuda.synchronize()
            _all_gather(None, self.group)  # nobody writes to the old slots any more, and but for turns under way they go
            self.handle = self.slots = None
            torch.cuda.empty_cache()  # symmetric memory lies outside torch's cache, which may have all that is left
            device = torch.device("cuda", torch.cuda.current_device())
            self.slots = symmetric_memory.empty(SLOTS * self.bytes, dtype=torch.uint8, device=device)
            self.handle = symmetric_memory.rendezvous(self.slots, self.group)
        self.turn += 1
        return self.turn % SLOTS * self.bytes
