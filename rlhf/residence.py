"""Moves models between device and host memory, as the phases of a step need them.

An offloaded tenant of a role ("critic.optimizer", "reference.weights") is on the device only in the phases that use it.
Other tenants of roles stay on the device. The tensor objects of a tenant stay the same: their storages are resized to 0
and filled again later. So megatron-core's views into its buffers stay valid. FSDP frees its shards in the same way.

The engine's tenants are on the device only in the engine's phases. They are not copied to the host, because the owner
publishes the policy's weights again after the engine has slept (rlhf.rollout.owner).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Set
from typing import Protocol

import psutil
import torch
from torch import Tensor

from rlhf import progress
from rlhf.phases import ENGINE, POLICY, Kind, Phase, Tenant, Visit

WRITES = Phase.LEARN  # the only phase that changes tenants; copies in host memory stay valid in all others
DROPPED = Kind.GRADIENTS  # not copied to the host, because gradients are zeroed before use
ALIGNMENT = 512  # bytes; alignment of each storage's copy in host memory


class Owner(Protocol):
    """A model whose tensors can leave the device."""

    def tenants(self) -> dict[Kind, list[Tensor]]:
        """Return the tensors by kind. A storage that several kinds share belongs to the first of them."""
        ...


class Sleeper(Protocol):
    """The engine, which frees and allocates its memory itself."""

    def leave(self, keep: Collection[Kind]) -> None:
        """Free the memory, unless `keep` contains all kinds that are on the device."""
        ...

    def come(self, needed: Collection[Kind]) -> None:
        """Allocate these kinds on the device."""
        ...


class Residence:
    """Moves the tenants of this rank to and from its device.

    offload   tenants of roles that are moved to host memory when a phase does not need them
    device    on a CPU, tenants are copied in the same way, from memory to memory
    """

    def __init__(self, offload: Collection[Tenant], device: torch.device):
        self.offload, self.device = sorted(offload), device
        self.peaks: dict[Visit, float] = {}  # peak device memory in GiB; empty on a CPU
        self._recent: dict[Visit, float] = {}  # the same since the last call of take_peaks()
        self._owners: dict[str, Owner] = {}
        self._engine: Sleeper | None = None
        self._parked: dict[Tenant, list[tuple[torch.UntypedStorage, int]]] = {}  # offloaded storages, and their bytes
        self._host: dict[Tenant, HostMemory] = {}
        self._copied: set[Tenant] = set()  # tenants whose copy in host memory is up to date
        self._visit: Visit | None = None
        self._foreign = 0
        self._seconds = 0.0

    def add(self, role: str, owner: Owner) -> None:
        """Add a model. Its offloaded tenants leave the device at once, to make room for the next model."""
        self._owners[role] = owner
        self._park(frozenset())

    def add_engine(self, engine: Sleeper) -> None:
        """Add the engine. From now on, enter() wakes it and puts it to sleep."""
        self._engine = engine

    def enter(self, phase: Phase, role: str = POLICY) -> None:
        """Move to the device what this phase of this role needs, and all other offloaded tenants off it.

        The phase lasts until the next call. Phases do not nest.
        """
        self.measure()
        visit = Visit(phase, role)
        progress.enter(str(visit))
        self._wait()
        start = time.perf_counter()
        self._settle(visit)
        self._wait()
        self._seconds += time.perf_counter() - start
        if phase == WRITES:
            self._copied -= visit.needs
        self._visit = visit
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._foreign = _foreign(self.device)

    def measure(self) -> None:
        """Record the peak memory of the current phase so far. enter() calls this at the end of each phase."""
        if self._visit and self.device.type == "cuda":
            self._foreign = max(self._foreign, _foreign(self.device))
            used = torch.cuda.max_memory_allocated(self.device) + self._foreign
            for peaks in (self.peaks, self._recent):
                peaks[self._visit] = max(peaks.get(self._visit, 0.0), used / 2**30)

    def take_seconds(self) -> float:
        """Return the seconds spent on moving tenants since the last call."""
        spent, self._seconds = self._seconds, 0.0
        return spent

    def take_peaks(self) -> dict[str, float]:
        """Return the peak device memory by phase since the last call, in GiB.

        "host" is the current host memory of this process in GiB. A value that rises from step to step means a leak.
        """
        recent, self._recent = self._recent, {}
        return {
            **{str(visit): gib for visit, gib in recent.items()},
            "host": psutil.Process().memory_info().rss / 2**30,
        }

    def _settle(self, visit: Visit) -> None:
        """Offload first, so that the memory is free for the tenants that are restored."""
        kinds = [tenant.kind for tenant in visit.needs if tenant.role == ENGINE]
        if self._engine:
            self._engine.leave(kinds)
        self._park(visit.needs)
        self._restore(visit.needs)
        if self._engine and kinds:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the engine allocates outside torch's cache
            self._engine.come(kinds)

    def _park(self, needed: Set[Tenant]) -> None:
        leaving = [
            tenant
            for tenant in self.offload
            if tenant not in needed | self._parked.keys() and tenant.role in self._owners
        ]
        for tenant in leaving:
            self._parked[tenant] = [(storage, storage.nbytes()) for storage in self._storages(tenant)]
            if tenant not in self._copied and tenant.kind != DROPPED:
                self._hold(tenant).copy_from(self._parked[tenant])
                self._copied.add(tenant)
        if leaving:
            self._wait()  # the copies must be complete before the memory is freed
        for storage, _ in (held for tenant in leaving for held in self._parked[tenant]):
            storage.resize_(0)

    def _restore(self, needed: Set[Tenant]) -> None:
        for tenant in [tenant for tenant in self._parked if tenant in needed]:
            held = self._parked.pop(tenant)
            for storage, size in held:
                storage.resize_(size)
            if tenant.kind != DROPPED:
                self._host[tenant].copy_to(held, self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _storages(self, tenant: Tenant) -> list[torch.UntypedStorage]:
        """Return the device storages of a tenant, each once. A storage of several kinds belongs to the first."""
        seen: dict[int, Kind] = {}
        storages = []
        for other, tensors in self._owners[tenant.role].tenants().items():
            for storage in (t.untyped_storage() for t in tensors if t.device.type == self.device.type):
                if seen.setdefault(storage._cdata, other) == other == tenant.kind:
                    storages.append(storage)
        return list({storage._cdata: storage for storage in storages}.values())

    def _hold(self, tenant: Tenant) -> HostMemory:
        """Return host memory for an offloaded tenant.

        The block of the last time is used again, unless the tenant has grown: the first update allocates the moments.
        """
        size = sum(aligned(size) for _, size in self._parked[tenant])
        if tenant not in self._host or len(self._host[tenant].bytes) < size:
            self._host.pop(tenant, None)
            self._host[tenant] = HostMemory(size, pinned=self.device.type == "cuda")
        return self._host[tenant]


class HostMemory:
    """One block of host memory. If pinned, copies are asynchronous on the current stream, at the full link rate."""

    def __init__(self, size: int, pinned: bool):
        self.bytes = torch.empty(size, dtype=torch.uint8)
        self.pinned = pinned and size > 0
        if self.pinned:  # torch would round the size of its own pinned memory up to a power of two
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
            starts.append(starts[-1] + aligned(size))
        return [self.bytes[start : start + size] for start, (_, size) in zip(starts, held, strict=False)]


def capacity(device: torch.device) -> float:
    """Return the memory of a device in GiB; infinite on a CPU, where memory is not checked."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else float("inf")


def unused(device: torch.device) -> float:
    """Return the free memory of a device in GiB; infinite on a CPU."""
    return torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else float("inf")


def aligned(size: int) -> int:
    """Return a number of bytes, rounded up so that copies in host memory are aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _view(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    """Return a storage as a tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _foreign(device: torch.device) -> int:
    """Return the bytes in use on the device that torch has not reserved.

    These are contexts, communicators, CUDA graphs and the memory of an awake engine. torch counts the engine's memory
    as reserved and allocated even while it sleeps. So it cancels out when this is added to the allocated memory.
    """
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
