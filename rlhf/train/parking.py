"""What lives on the device in which phase, and what waits in host memory meanwhile.

A tenant is everything of one kind that belongs to one role: "critic.optimizer", "reference.weights". An offloaded tenant is on the device
only in the phases that use it; all others stay. Its tensors keep their identity: the storages below them are emptied and filled again, so
megatron-core's views into its buffers never notice (FSDP frees its shards in the same way).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol

import psutil
import torch
from torch import Tensor

from rlhf.contracts import USES

WRITES = ("learn",)  # elsewhere the copy in host memory stays true, and need not be made again
DROPPED = "gradients"  # zeroed before they are used, so nothing of them is worth a copy
ALIGNMENT = 512  # bytes, of every storage within host memory


class Owner(Protocol):
    """A model whose tensors can be parked."""

    def tenants(self) -> dict[str, list[Tensor]]:
        """Kind ("weights", "gradients", "optimizer") -> tensors. Storages shared by several kinds belong to the first."""
        ...


class Parking:
    """The residence of every tenant of this rank.

    offload   names ROLE.KIND of the tenants that leave the device whenever their phase is over
    device    where they live; on a CPU host memory is ordinary memory, and the same happens
    """

    def __init__(self, offload: Collection[str], device: torch.device):
        self.offload, self.device = sorted(offload), device
        self.peaks: dict[str, float] = {}  # phase, or phase/role -> GiB of the device in use at most; empty on a CPU
        self._recent: dict[str, float] = {}  # the same since taken() was asked
        self._owners: dict[str, Owner] = {}
        self._parked: dict[str, list[tuple[torch.UntypedStorage, int]]] = {}  # name -> emptied storages and their bytes
        self._host: dict[str, HostMemory] = {}
        self._copied: set[str] = set()  # tenants whose host memory holds what they hold
        self._phase, self._foreign = "", 0
        self._seconds = 0.0

    def add(self, role: str, owner: Owner) -> None:
        """Take charge of a model; what is offloaded of it leaves at once, which makes room for building the next."""
        self._owners[role] = owner
        self._settle(set())

    def enter(self, phase: str, role: str = "policy") -> None:
        """Make resident what this phase of this role uses, and park all else that is offloaded. Phases follow one another; none nests."""
        self.measure()
        needed = {f"{role}.{kind}" for kind in USES[phase]}
        self.switch(partial(self._settle, needed))
        if phase in WRITES:
            self._copied -= needed
        self._phase = phase if phase in ("rollout", "publish") else f"{phase}/{role}"
        if self.device.type == "cuda":
            if phase in ("publish", "rollout"):
                torch.cuda.empty_cache()  # the engine, which wakes up next, allocates outside torch's cache
            torch.cuda.reset_peak_memory_stats(self.device)
            self._foreign = _foreign(self.device)

    def switch(self, work: Callable[[], None]) -> None:
        """Do something that passes the device on, such as putting the engine to sleep, and count its seconds."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        self._seconds += time.perf_counter() - start

    def spent(self) -> float:
        """Seconds of all switches since the last call."""
        spent, self._seconds = self._seconds, 0.0
        return spent

    def measure(self) -> None:
        """Note the peak of the phase so far: at its end enter() does so by itself, and an engine that has just woken up must be seen."""
        if self._phase and self.device.type == "cuda":
            self._foreign = max(self._foreign, _foreign(self.device))
            used = torch.cuda.max_memory_allocated(self.device) + self._foreign
            for peaks in (self.peaks, self._recent):
                peaks[self._phase] = max(peaks.get(self._phase, 0.0), used / 2**30)

    def taken(self) -> dict[str, float]:
        """GiB in use at most by phase since the last call, and of host memory by this process now: a leak shows as a rise over steps."""
        recent, self._recent = self._recent, {}
        return {**recent, "host": psutil.Process().memory_info().rss / 2**30}

    def _settle(self, needed: set[str]) -> None:
        leaving = [name for name in self.offload if name not in needed and name not in self._parked and name.split(".")[0] in self._owners]
        for name in leaving:
            self._parked[name] = [(storage, storage.nbytes()) for storage in self._storages(name)]
            if name not in self._copied and not name.endswith(DROPPED):
                self._hold(name).copy_from(self._parked[name])
                self._copied.add(name)
        if leaving:
            self._wait()  # memory may be given away when all copies are complete
        for storage, _ in (held for name in leaving for held in self._parked[name]):
            storage.resize_(0)
        for name in [name for name in self._parked if name in needed]:
            held = self._parked.pop(name)
            for storage, size in held:
                storage.resize_(size)
            if not name.endswith(DROPPED):
                self._host[name].copy_to(held, self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _storages(self, name: str) -> list[torch.UntypedStorage]:
        """The device storages of a tenant, each once, without those of its role's earlier kinds."""
        role, kind = name.split(".")
        seen: dict[int, str] = {}
        storages = []
        for other, tensors in self._owners[role].tenants().items():
            for storage in (t.untyped_storage() for t in tensors if t.device.type == self.device.type):
                if seen.setdefault(storage._cdata, other) == other == kind:
                    storages.append(storage)
        return list({storage._cdata: storage for storage in storages}.values())

    def _hold(self, name: str) -> HostMemory:
        """Host memory for a parked tenant: kept from the last time, unless the tenant has grown (moments come with the first update)."""
        size = sum(_aligned(size) for _, size in self._parked[name])
        if name not in self._host or len(self._host[name].bytes) < size:
            self._host.pop(name, None)
            self._host[name] = HostMemory(size, pinned=self.device.type == "cuda")
        return self._host[name]


class HostMemory:
    """One block of host memory; pinned, copies are asynchronous on the current stream and run at the full rate of the link."""

    def __init__(self, size: int, pinned: bool):
        self.bytes = torch.empty(size, dtype=torch.uint8)
        self.pinned = pinned and size > 0
        if self.pinned:  # torch's own pinned memory would be rounded up to a power of two
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0))

    def __del__(self) -> None:
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())

    def copy_from(self, held: list[tuple[torch.UntypedStorage, int]]) -> None:
        for part, (storage, _) in zip(self._parts(held), held, strict=True):
            part.copy_(_view(storage, storage.device), non_blocking=True)

    def copy_to(self, held: list[tuple[torch.UntypedStorage, int]], device: torch.device) -> None:
        for part, (storage, _) in zip(self._parts(held), held, strict=True):
            _view(storage, device).copy_(part, non_blocking=True)

    def _parts(self, held: list[tuple[torch.UntypedStorage, int]]) -> list[Tensor]:
        starts = [0]
        for _, size in held:
            starts.append(starts[-1] + _aligned(size))
        return [self.bytes[start : start + size] for start, (_, size) in zip(starts, held, strict=False)]


def capacity(device: torch.device) -> float:
    """GiB of a device; infinite on a CPU, where nothing has to make room."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else float("inf")


def unused(device: torch.device) -> float:
    """GiB of a device that no program uses now; infinite on a CPU."""
    return torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else float("inf")


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _view(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    """A storage as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _foreign(device: torch.device) -> int:
    """Bytes in use on the device that torch has not reserved: contexts, communicators, CUDA graphs, and an engine that is awake.

    An engine's own memory counts as reserved and as allocated even while it sleeps, so that it cancels out in the sum of both.
    """
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
