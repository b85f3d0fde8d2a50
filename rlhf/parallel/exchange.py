"""Exchanges tensors between the ranks of a group while they compute.

The ranks form a ring. In each step, a rank sends to the rank `step` places after it and receives from the rank `step`
places before it. With NVLink, copy engines write into the receiver's memory. NCCL collectives would instead use
multiprocessors that the matrix products need. Without NVLink (two GPUs, or CPUs), torch.distributed sends messages.
"""

from __future__ import annotations

import socket
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

SLOTS = 3  # number of buffers that peers write to; consecutive exchanges use them in rotation
GRAIN = 2**25  # the size of a slot is a multiple of this many bytes


class Exchange(Protocol):
    """One exchange. parts[r] is the tensor that rank r has sent to this rank. It is valid after receive() returned it.

    All ranks send tensors of the same shape. Step 0 is the rank's message to itself. At most two exchanges may be
    active: the kernels that read the parts of the first must be queued on the device before a third exchange begins.
    """

    parts: Tensor  # [ranks, *shape]

    def send(self, step: int, x: Tensor) -> None:
        """Start to send x to the rank `step` places after this one. x must not change before receive(step)."""

    def receive(self, step: int) -> Tensor:
        """Return the tensor of the rank `step` places before this one, for kernels that are queued from now on."""


def exchange(x: Tensor, group: dist.ProcessGroup) -> Exchange:
    """Return a new exchange for tensors of the shape and dtype of x."""
    return _Copies(x, _Memory.of(group)) if direct(group) else _Messages(x, group)


def pays(group: dist.ProcessGroup) -> bool:
    """Return whether to split matrix products and exchange their parts, instead of using megatron-core's collectives.

    On GPUs without NVLink, messages among more than two ranks are slower than these collectives. The first call may be
    a collective.
    """
    return group.size() == 2 or direct(group) or not torch.cuda.is_available()


@cache
def direct(group: dist.ProcessGroup) -> bool:
    """Return whether NVLink connects the GPUs of all ranks of a group. All ranks get the same result.

    Over PCIe, GPUs could copy, but a barrier needs atomic operations, which PCIe lacks. The first call is a collective.
    """
    if not torch.cuda.is_available():
        return False
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]

    me = torch.cuda.current_device()
    try:
        links = _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix[me]
    except RuntimeError:  # NVML has no information
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
        self.handle, self.slots = memory.handle, memory.slots  # kept alive, as the next exchange may replace them
        self.parts = self._of(self.me)
        self.arrivals: dict[int, torch.cuda.Event] = {}
        self.sent: list[Tensor] = []  # kept alive until they are sent, so that their memory is not used again

    def _of(self, rank: int) -> Tensor:
        """Return the slot of this exchange on a rank."""
        return self.handle.get_buffer(rank, self.shape, self.dtype, self.start // self.dtype.itemsize)

    def send(self, step: int, x: Tensor) -> None:
        self.sent.append(x)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._of((self.me + step) % self.size)[self.me].copy_(x)
            if step:
                self.handle.barrier(channel=0)  # after it, the copies of all ranks for this step have arrived
            self.arrivals[step] = self.stream.record_event()

    def receive(self, step: int) -> Tensor:
        torch.cuda.current_stream().wait_event(self.arrivals[step])
        return self.parts[(self.me - step) % self.size]


class _Memory:
    """The slots of a rank, which the other ranks of a group write to.

    No barrier is needed before a copy. A rank that begins exchange n has read exchange n - 2. A rank that begins
    exchange n + 1 has passed the barrier of exchange n together with all others. So all ranks have read exchange n - 2,
    and exchange n + 1 may overwrite its slot.
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
        """Return the offset in bytes of the next exchange's slot, which has at least `count` bytes.

        If the slots are too small, all ranks allocate larger ones in the same exchange, while no rank writes.
        """
        if count > self.bytes:
            import torch.distributed._symmetric_memory as symmetric_memory

            self.bytes = -(-count // GRAIN) * GRAIN
            torch.cuda.synchronize()
            _all_gather(None, self.group)  # after it, no rank writes to the old slots; active exchanges keep them alive
            self.handle = self.slots = None
            torch.cuda.empty_cache()  # symmetric memory is outside torch's cache, which may hold all free memory
            device = torch.device("cuda", torch.cuda.current_device())
            self.slots = symmetric_memory.empty(SLOTS * self.bytes, dtype=torch.uint8, device=device)
            self.handle = symmetric_memory.rendezvous(self.slots, self.group)
        self.turn += 1
        return self.turn % SLOTS * self.bytes
