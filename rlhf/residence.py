"""What is on the device in which phase, and what waits in host memory meanwhile.

An offloaded tenant of a role ("critic.optimizer", "reference.weights") is on the device only in the phases that use it; all others stay.
Its tensors keep their identity: the storages below them are emptied and filled again, so megatron-core's views into its buffers stay
valid (FSDP frees its shards in the same way). The engine's tenants are on the device in the engine's phases only and are not copied to
the host: after it has slept, an engine gets the policy's weights again (rlhf.rollout.owner).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Set
from typing import Protocol

import psutil
import torch
from torch import Tensor

from rlhf.phases import ENGINE, POLICY, Kind, Phase, Tenant, Visit

WRITES = Phase.LEARN  # in other phases the copy in host memory stays true, and need not be made again
DROPPED = Kind.GRADIENTS  # zeroed before they are used, so they need no copy
ALIGNMENT = 512  # bytes, of every storage within host memory


class Owner(Protocol):
    """A model whose tensors can leave the device."""

    def tenants(self) -> dict[Kind, list[Tensor]]:
        """Its tensors by kind. Storages shared by several kinds belong to the first."""
        ...


class Sleeper(Protocol):
    """The engine, which frees and takes memory by itself."""

    def leave(self, keep: Collection[Kind]) -> None:
        """Give back the memory of all kinds but these."""
        ...

    def come(self, needed: Collection[Kind]) -> None:
        """Have these kinds on the device."""
        ...


class Residence:
    """Which tenants of this rank are on its device.

    offload   tenants of roles that leave the device whenever their phase is over
    device    on a CPU host memory is ordinary memory, and the same happens
    """

    def __init__(self, offload: Collection[Tenant], device: torch.device):
        self.offload, self.device = sorted(offload), device
        self.peaks: dict[Visit, float] = {}  # GiB of the device in use at most; empty on a CPU
        self._recent: dict[Visit, float] = {}  # the same since take_peaks() was called
        self._owners: dict[str, Owner] = {}
        self._engine: Sleeper | None = None
        self._parked: dict[Tenant, list[tuple[torch.UntypedStorage, int]]] = {}  # emptied storages and their bytes
        self._host: dict[Tenant, HostMemory] = {}
        self._copied: set[Tenant] = set()  # those whose host memory holds what they hold
        self._visit: Visit | None = None
        self._foreign = 0
        self._seconds = 0.0

    def add(self, role: str, owner: Owner) -> None:
        """Take charge of a model; what is offloaded of it leaves at once, which makes room for building the next."""
        self._owners[role] = owner
        self._park(frozenset())

    def add_engine(self, engine: Sleeper) -> None:
        """Take charge of the engine, which is put to sleep and woken by the phases from now on."""
        self._engine = engine

    def enter(self, phase: Phase, role: str = POLICY) -> None:
        """Have on the device what this phase of this role needs, and nothing else that can leave it. Phases do not nest."""
        self.measure()
        visit = Visit(phase, role)
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
        """Note the peak of the phase so far; at its end enter() does so by itself."""
        if self._visit and self.device.type == "cuda":
            self._foreign = max(self._foreign, _foreign(self.device))
            used = torch.cuda.max_memory_allocated(self.device) + self._foreign
            for peaks in (self.peaks, self._recent):
                peaks[self._visit] = max(peaks.get(self._visit, 0.0), used / 2**30)

    def take_seconds(self) -> float:
        """Seconds spent on moving tenants since the last call."""
        spent, self._seconds = self._seconds, 0.0
        return spent

    def take_peaks(self) -> dict[str, float]:
        """GiB in use at most by phase since the last call, and of host memory by this process now: a leak shows as a rise over steps."""
        recent, self._recent = self._recent, {}
        return {**{str(visit): gib for visit, gib in recent.items()}, "host": psutil.Process().memory_info().rss / 2**30}

    def _settle(self, visit: Visit) -> None:
        """What leaves goes first, so that what comes finds its memory free."""
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
        leaving = [tenant for tenant in self.offload if tenant not in needed | self._parked.keys() and tenant.role in self._owners]
        for tenant in leaving:
            self._parked[tenant] = [(storage, storage.nbytes()) for storage in self._storages(tenant)]
            if tenant not in self._copied and tenant.kind != DROPPED:
                self._hold(tenant).copy_from(self._parked[tenant])
                self._copied.add(tenant)
        if leaving:
            self._wait()  # memory may be given away when all copies are complete
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
        """The device storages of a tenant, each once, without those of its role's earlier kinds."""
        seen: dict[int, Kind] = {}
        storages = []
        for other, tensors in self._owners[tenant.role].tenants().items():
            for storage in (t.untyped_storage() for t in tensors if t.device.type == self.device.type):
                if seen.setdefault(storage._cdata, other) == other == tenant.kind:
                    storages.append(storage)
        return list({storage._cdata: storage for storage in storages}.values())

    def _hold(self, tenant: Tenant) -> HostMemory:
        """Host memory for a parked tenant: kept from the last time, unless the tenant has grown (moments come with the first update)."""
        size = sum(_aligned(size) for _, size in self._parked[tenant])
        if tenant not in self._host or len(self._host[tenant].bytes) < size:
            self._host.pop(tenant, None)
            self._host[tenant] = HostMemory(size, pinned=self.device.type == "cuda")
        return self._host[tenant]


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
