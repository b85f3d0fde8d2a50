"""Numbers are (sum, count) pairs until they are printed: summed over ranks once per step, then divided."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rlhf.config import Config
from rlhf.parallel.mesh import Mesh

LINE = (
    *("loss", "accuracy", "reward", "eval_reward", "eval_loss", "eval_accuracy", "kl", "clipped", "entropy", "critic_loss"),
    *("mismatch", "response_tokens", "tokens_per_second"),
)


class Metrics:
    """Collects a step's numbers on every rank; rank 0 writes metrics.jsonl, TensorBoard events and a terminal line."""

    def __init__(self, config: Config, mesh: Mesh, start: int):
        self.mesh, self.steps, self.every = mesh, config.steps, config.log.every
        self.sums: dict[str, tuple[float, float]] = {}
        self.events = None
        self.begin()
        if mesh.rank == 0:
            self.path = Path(config.out) / "metrics.jsonl"
            _forget(self.path, start or -1)  # a run from the start says everything anew
            if config.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(config.out, purge_step=start)

    def begin(self) -> None:
        """A step starts now."""
        self.began = time.perf_counter()

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """This rank's part of sums that run over all ranks."""
        for name, (total, count) in sums.items():
            old = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old[0] + total, old[1] + count)

    def add_common(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Sums that every rank knows alike: they count once."""
        if self.mesh.rank == 0:
            self.add(sums)

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Wall seconds of rank 0 in a phase; phases of one name add up."""
        start = time.perf_counter()
        yield
        seconds, _ = self.sums.get(f"time/{phase}", (0.0, 1.0))
        if self.mesh.rank == 0:
            self.sums[f"time/{phase}"] = (seconds + time.perf_counter() - start, 1.0)

    def write(self, step: int, tokens: int = 0) -> dict[str, float]:
        """The step's numbers over all ranks, on every rank; tokens is what the step consumed, prompts included."""
        totals: dict[str, tuple[float, float]] = {}
        for sums in self.mesh.all_gather(self.sums):
            for name, (total, count) in sums.items():
                old = totals.get(name, (0.0, 0.0))
                totals[name] = (old[0] + total, old[1] + count)
        seconds = time.perf_counter() - self.began
        values = {name: total / count for name, (total, count) in totals.items() if count}
        values["time/step"] = seconds
        if tokens:
            values["tokens_per_second"] = tokens / seconds
        self.sums = {}
        if self.mesh.rank == 0:
            self._record(step, values)
        return values

    def _record(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            self.events.flush()
        if step % self.every == 0 or step == self.steps:
            shown = "  ".join(f"{name} {values[name]:.4g}" for name in LINE if name in values)
            say(f"{self._bar(step)}  {shown}  {values['time/step']:.1f} s")

    def _bar(self, step: int) -> str:
        text = f"step {step:>{len(str(self.steps))}}/{self.steps}"
        if not sys.stdout.isatty():
            return text
        done = round(20 * step / self.steps)
        return f"{text} [{'#' * done}{'.' * (20 - done)}]"


def say(text: str) -> None:
    """A line for the person at the terminal; call on rank 0."""
    print(text, flush=True)


def _forget(path: Path, start: int) -> None:
    """Drop the lines of steps that a resumed run will do again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= start]
        path.write_text("".join(lines))
