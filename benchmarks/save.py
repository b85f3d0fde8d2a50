"""Measure by how many seconds a save holds up the steps: written at once, and in the background.

    python benchmarks/save.py OUT                  one GPU; the largest model of which the disk holds two checkpoints
    python benchmarks/save.py OUT --model toy --layers 2 --tokens 512 --length 128      on a CPU

OUT is a new folder. The model has Llama-2-7B's layers with random weights, and trains on random tokens while files are
written. The lower bound of a save in the background is one copy of as many bytes to the same host memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import record
import torch
from publish import MODELS
from train import LR, draw, fill

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.checkpoint import Checkpoints
from rlhf.data.packing import microbatches
from rlhf.model.architecture import Architecture
from rlhf.parallel.mesh import Mesh
from rlhf.train.learner import Learner

STATE = 12  # bytes of a checkpoint per parameter: main parameters and two moments in float32
SAVES = 3  # in the background; the first allocates the host memory


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--model", choices=MODELS, default="7b")
    p.add_argument("--layers", type=int, help="default: as many as fit")
    p.add_argument("--tokens", type=int, default=16384, help="tokens per update")
    p.add_argument("--length", type=int, default=4096, help="tokens per sequence")
    return p.parse_args()


def shapes(a: argparse.Namespace) -> Architecture:
    """Return the model. By default it is the largest of which two checkpoints fit on the disk."""
    if a.layers:
        return replace(MODELS[a.model], layers=a.layers)
    room = 0.95 * shutil.disk_usage(a.out).free
    fitting = [replace(MODELS[a.model], layers=n) for n in range(1, 200)]
    return [arch for arch in fitting if 2 * STATE * arch.num_parameters() < room][-1]


class Bench:
    """A learner that is saved while it trains."""

    def __init__(self, a: argparse.Namespace, arch: Architecture, mesh: Mesh):
        self.a, self.mesh, self.saved = a, mesh, 0
        self.dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
        self.config = configuration.load("sft", [f"out={a.out}", f"batch.tokens={a.tokens}", "checkpoint.keep=1"])
        self.learner = Learner(arch, self.config, mesh, self.dtype, fill=fill, temperature=1.0, train=True)
        samples = draw(a.tokens, a.length, arch.vocab, varied=False)
        self.cut = microbatches(samples, a.tokens, False, mesh.largest)
        self.loss = partial(ALGORITHMS["sft"](self.config).loss, "policy")

    def update(self) -> float:
        """Make an update. Return its seconds."""
        return elapsed(lambda: self.learner.learn(self.cut, self.loss, LR))

    def checkpoints(self, background: bool) -> Checkpoints:
        config = replace(self.config, checkpoint=replace(self.config.checkpoint, background=background))
        return Checkpoints(config, self.mesh, self.dtype)

    def save(self, checkpoints: Checkpoints) -> float:
        """Begin a save. Return the seconds until the next step may begin."""
        self.saved += 1
        return elapsed(lambda: checkpoints.save(self.saved, [("policy", self.learner)], {}))

    def copy(self, checkpoints: Checkpoints) -> float:
        """Return the seconds of one copy of as many bytes from the device into the host memory of the saves."""
        (block,) = checkpoints.writer.blocks.values()
        source = torch.empty_like(block.bytes, device=self.mesh.device)
        return statistics.median(elapsed(lambda: block.bytes.copy_(source, non_blocking=True)) for _ in range(3))


def elapsed(work: Callable[[], object]) -> float:
    record.wait()
    start = time.perf_counter()
    work()
    record.wait()
    return time.perf_counter() - start


def main() -> None:
    a = options()
    a.out.mkdir(parents=True)
    mesh = Mesh(configuration.load("sft", []).parallel, 1)
    arch = shapes(a)
    bench = Bench(a, arch, mesh)
    bench.update()
    step = statistics.median(bench.update() for _ in range(5))
    at_once = bench.checkpoints(background=False)
    before = bench.save(at_once) + elapsed(lambda: at_once.settle(wait=True))
    checkpoints = bench.checkpoints(background=True)
    begun, settled, writing, meanwhile = [], [], [], []
    for _ in range(SAVES):
        begin = time.perf_counter()
        begun.append(bench.save(checkpoints))
        settled.append(0.0)
        while checkpoints.saving:
            meanwhile.append(bench.update())
            settled[-1] += elapsed(checkpoints.settle)
        writing.append(time.perf_counter() - begin)
    held = [sum(both) for both in zip(begun, settled, strict=True)]
    end = elapsed(lambda: checkpoints.settle(wait=True))
    copy = bench.copy(checkpoints)
    size = sum(path.stat().st_size for path in checkpoints.last.iterdir()) if checkpoints.last else 0
    result = {
        "model": a.model,
        "layers": arch.layers,
        "parameters": arch.num_parameters(),
        "checkpoint_gb": size / 1e9,
        "at_once_s": before,
        "first_s": held[0],
        "held_s": statistics.mean(held[1:]),
        "begin_s": statistics.mean(begun[1:]),
        "settle_s": statistics.mean(settled[1:]),
        "copy_s": copy,
        "held_by_copy": statistics.mean(held[1:]) / copy,
        "copy_gb_per_s": size / 1e9 / copy,
        "at_once_by_held": before / statistics.mean(held[1:]),
        "written_after_s": statistics.mean(writing[1:]),
        "deletion_after_the_last_s": end,
        "step_s": step,
        "step_while_writing_s": statistics.median(meanwhile),
        "peak_gib": record.peak_gib(),
    }
    record.say("save", f"{arch.num_parameters() / 1e9:.1f}B", result)
    shutil.rmtree(a.out)
    os._exit(0)


if __name__ == "__main__":
    main()
