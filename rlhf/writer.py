"""Writes the files of a checkpoint on a thread, from copies in host memory, so that the run goes on meanwhile.

The thread makes no collectives and no CUDA calls for copies. So it is independent of the main thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from rlhf import folders
from rlhf.output import say
from rlhf.residence import HostMemory, aligned
from rlhf.weights.shards import LiveShard

Write = Callable[[memoryview], object]  # takes a part of a file's content
Files = dict[str, dict[str, int]]  # name -> size and checksum, as in meta.json


class Writer:
    """Writes the files of this rank, one after the other.

    background   False: nothing is copied, and add() returns when the file is written
    sharers      ranks of this node, which share its host memory
    told         whether this rank prints a message if there is too little host memory for copies
    """

    def __init__(self, background: bool, device: torch.device, sharers: int = 1, told: bool = False):
        self.background, self.device, self.sharers, self.told = background, device, sharers, told
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self.blocks: dict[str, HostMemory] = {}  # file name -> memory of its copy, used again by each save
        self._jobs: dict[str, Future[dict[str, int]]] = {}

    def add(self, path: Path, shard: LiveShard) -> None:
        """Write a shard to a file. Return as soon as its tensors may change."""
        copy = self._copied(path.name, shard) if self.background else None
        job = self.add_bytes(path, (copy or shard).write)
        if not copy:
            job.result()

    def add_bytes(self, path: Path, write: Callable[[Write], object]) -> Future[dict[str, int]]:
        """Write a file. `write` passes its content to a function, part by part; it runs on the thread."""
        self._jobs[path.name] = self._thread.submit(_written, path, write)
        return self._jobs[path.name]

    def call(self, function: Callable[[], None]) -> Future[None]:
        """Call a function on the thread, after the files that were added before."""
        return self._thread.submit(function)

    def done(self) -> bool:
        """Return whether all files are written, or have failed."""
        return all(job.done() for job in self._jobs.values())

    def take(self) -> Files:
        """Wait until all files are written, and return them. Raises OSError if one could not be written."""
        jobs, self._jobs = self._jobs, {}
        return {name: job.result() for name, job in jobs.items()}

    def _copied(self, name: str, shard: LiveShard) -> LiveShard | None:
        """Return a copy of a shard in host memory; None if there is too little memory."""
        size = sum(aligned(t.nbytes) for each in shard.tensors.values() for t in each.values())
        if name not in self.blocks or len(self.blocks[name].bytes) < size:
            self.blocks.pop(name, None)
            if size * self.sharers > psutil.virtual_memory().available:
                self._say(size)
                return None
            self.blocks[name] = HostMemory(size, pinned=self.device.type == "cuda")
        start, copies = 0, {what: dict(each) for what, each in shard.tensors.items()}
        for each in copies.values():
            for local, tensor in each.items():
                part = self.blocks[name].bytes[start : start + tensor.nbytes].view(tensor.dtype)
                each[local] = part.copy_(tensor, non_blocking=True)
                start += aligned(tensor.nbytes)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return replace(shard, tensors=copies)

    def _say(self, size: int) -> None:
        if self.told:
            self.told = False
            need, free = size * self.sharers / 2**30, psutil.virtual_memory().available / 2**30
            say(
                f"this node has {free:.1f} GiB of free host memory, and copies of the training state need {need:.1f}: "
                "each save waits until its files are written"
            )


def _written(path: Path, write: Callable[[Write], object]) -> dict[str, int]:
    with folders.writing(path) as hashed:
        write(hashed.write)
    return hashed.found
