"""Collects and writes metrics. A metric is a (sum, count) pair, summed over the ranks once per step, then divided."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self

from rlhf import progress, texts
from rlhf.algorithms import ALGORITHMS
from rlhf.config import Config
from rlhf.contracts import ABSENT, Sample
from rlhf.output import say
from rlhf.parallel.mesh import Mesh
from rlhf.recorder import Recorder, Use, describe
from rlhf.trackers import End, Trackers

TROUBLES = ("truncated", "silent", "tied", "lone", "reward_failed", "eval_reward_failed")  # shown unless 0
LINE = (
    *("loss", "accuracy", "reward", "eval_reward", "eval_loss", "eval_accuracy", "kl", "clipped", "entropy"),
    *("critic_loss", "mismatch", "response_tokens"),
    *TROUBLES,
    *("grad_norm", "lr", "tokens_per_second"),
)


class Metrics:
    """Collects a step's metrics on every rank. Rank 0 writes metrics.jsonl, sends them to trackers, and prints a line.

    As a context manager it closes itself after an error only. Else the caller does, who knows how the run ends.
    Mode evaluate keeps every response and prints no line. It prints a table at the end (rlhf.evaluate).
    """

    def __init__(self, config: Config, mesh: Mesh, start: int, prefixes: Mapping[str, str] | None = None):
        """prefixes: name of a held-out set -> how the names of its metrics begin."""
        self.mesh, self.steps, self.every = mesh, config.steps, config.log.every
        self.prefixes = dict(prefixes or {})
        self.sums: dict[str, tuple[float, float]] = {}
        own = own_name(config)
        self.count = -1 if own else config.log.samples  # responses to record per step and evaluation; -1: all
        self.trackers: Trackers | None = None
        self.recorder: Recorder | None = None
        self.begin()
        if mesh.rank == 0:
            out = Path(config.out)
            self.recorder = Recorder(out, start, own) if self.count else None
            self.path = out / f"{own or 'metrics'}.jsonl"
            self.silent = bool(own)
            _forget(self.path, start or -1)  # a new run writes all lines anew, also that of step 0
            self.trackers = Trackers(config, start, own)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.close("failed")

    def begin(self) -> None:
        """Start to measure the time of a step."""
        self.began = time.perf_counter()

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Add this rank's part of sums over all ranks."""
        for name, (total, count) in sums.items():
            old = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old[0] + total, old[1] + count)

    def add_common(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Add sums that are the same on every rank. They count once."""
        if self.mesh.rank == 0:
            self.add(sums)

    def add_share(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Add sums over a replica's share of the samples. The ranks of the replica have the same ones."""
        if self.mesh.is_first_in_replica:
            self.add(sums)

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Measure the wall time of rank 0 in a phase, in seconds. Times of phases with the same name add up."""
        start = time.perf_counter()
        progress.enter(phase)
        yield
        seconds, _ = self.sums.get(f"time/{phase}", (0.0, 1.0))
        if self.mesh.rank == 0:
            self.sums[f"time/{phase}"] = (seconds + time.perf_counter() - start, 1.0)

    def write(self, step: int, tokens: int = 0) -> dict[str, float]:
        """Write the step's metrics over all ranks, and return them on every rank.

        tokens: number of tokens in this replica's share of the step's samples, prompts included.
        """
        totals: dict[str, tuple[float, float]] = {}
        self.add_share({"tokens": (float(tokens), 0.0)})  # a sum without a count, which is no metric by itself
        for sums in self.mesh.all_gather(self.sums):
            for name, (total, count) in sums.items():
                old = totals.get(name, (0.0, 0.0))
                totals[name] = (old[0] + total, old[1] + count)
        seconds = time.perf_counter() - self.began
        values = {name: total / count for name, (total, count) in totals.items() if count}
        values["time/step"] = seconds
        if all_tokens := totals.pop("tokens", (0.0, 0.0))[0]:
            values["tokens_per_second"] = all_tokens / seconds
        self.sums = {}
        if self.mesh.rank == 0:
            self._record(step, values)
        return values

    def keep(self, use: Use, samples: Sequence[Sample]) -> None:
        """Record the first sampled responses of all replicas in out/samples (see Recorder). Every rank calls it.

        `samples` is the share of this replica. Samples from the data set are ignored.
        """
        if self.count:
            kept = first(self.mesh, [s for s in samples if s.version is not ABSENT], self.count)
            if self.recorder:
                self.recorder.keep(use, kept)

    def close(self, end: End = "finished") -> None:
        """Wait until everything is written. If the run has failed, an error of a write is ignored."""
        try:
            if self.recorder and end != "failed":
                self.recorder.finish()
        finally:
            if self.trackers:
                self.trackers.close(end)

    def _record(self, step: int, values: dict[str, float]) -> None:
        kept = self.recorder.write(step) if self.recorder else []
        with self.path.open("a") as file:
            finite = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no inf and nan
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        if self.trackers:
            self.trackers.write(step, values, [partial(describe, step, *each) for each in kept])
        if not self.silent and (step % self.every == 0 or step == self.steps):
            told = [
                name
                for key in LINE
                for name in self._of_sets(key)
                if name in values and (values[name] or key not in TROUBLES)
            ]
            shown = "  ".join(f"{name} {values[name]:.4g}" for name in told)
            say(f"{self._bar(step)}  {shown}  {values['time/step']:.1f} s")

    def _of_sets(self, key: str) -> list[str]:
        """Return the names of a metric. Those that begin with eval_ have one name per held-out set."""
        return (
            [prefix + key.removeprefix("eval_") for prefix in self.prefixes.values()]
            if key.startswith("eval_")
            else [key]
        )

    def _bar(self, step: int) -> str:
        text = f"step {step:>{len(str(self.steps))}}/{self.steps}"
        if not sys.stdout.isatty():
            return text
        done = round(20 * step / self.steps)
        return f"{text} [{'#' * done}{'.' * (20 - done)}]"


def first(mesh: Mesh, samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return the first `count` samples of all replicas (-1: all) on rank 0, in order of groups; [] on other ranks.

    `samples` is the share of this replica. Every rank calls it.
    """
    mine = list(samples) if mesh.is_first_in_replica else []
    order = sorted(group for part in mesh.all_gather([s.group for s in mine]) for group in part)
    end = len(order) if count < 0 else count
    wanted = set(order[:end])
    parts: list[list[Sample]] = [[s for s in mine if s.group in wanted], *([] for _ in range(mesh.world - 1))]
    found = [sample for part in mesh.exchange(parts) for sample in part]
    return sorted(found, key=lambda s: s.group)[:end]


def own_name(config: Config) -> str:
    """Return the name of the files that a mode without training writes; "" for a mode that trains.

    The folder `out` may belong to a training run, so such a mode needs its own file names.
    """
    return "" if ALGORITHMS[config.mode].trains else config.mode


def _forget(path: Path, start: int) -> None:
    """Remove the lines of steps after `start`, which run again, and damaged lines. The file is replaced atomically."""
    if not path.exists():
        return
    # Text after the last "\n" is a line that was cut off.
    *lines, _ = texts.regular(path).read_text(errors="replace").split("\n")
    steps = [_step(line) for line in lines]
    if damaged := [str(number) for number, step in enumerate(steps, 1) if step is None]:
        say(f"{path}: damaged lines are removed: {', '.join(damaged)}")
    fresh = path.with_suffix(".partial")
    with fresh.open("w") as file:
        file.write(
            "".join(f"{line}\n" for line, step in zip(lines, steps, strict=True) if step is not None and step <= start)
        )
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _step(line: str) -> int | None:
    """Return the step of a line; None if the line is damaged."""
    try:
        step = texts.parse(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if type(step) is int else None
