"""A small run on the CPU, in a folder of its own, that is started again and again: what tools/torture.py breaks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rlhf import variables  # noqa: E402

PATIENCE = 300.0  # seconds that anything may take before the run counts as hanging


class Fault(Exception):  # noqa: N818
    """A break was not survived."""


class Done(Exception):  # noqa: N818
    """The run ended well before it could be broken."""


@dataclass
class Break:
    """What was done to a run. fault: why it was not survived; empty: it was."""

    kind: str
    happened: str
    fault: str


@dataclass
class Run:
    """A run in a folder of its own, which is started again and again."""

    root: Path
    name: str
    mode: str
    arguments: list[str]
    startup: float = 0.0  # seconds from the first process of a rank to the first step
    process: subprocess.Popen[str] | None = None
    before: int = 0  # the file of its numbers when it was started
    breaks: list[Break] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out = self.root / self.name

    def start(self) -> subprocess.Popen[str]:
        """Its launcher, which is started unless it runs."""
        if not self.process:
            self.before = self.numbers()
            own = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-P", "-m", "rlhf", self.mode, *self.arguments, f"out={self.name}"]
            pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
            self.process = subprocess.Popen(
                command, cwd=self.root, env={**variables.without(os.environ), **own}, **pipe
            )  # type: ignore[call-overload]
        return self.process

    def end(self, *codes: int) -> str:
        """What was printed until it and all that it started have ended. Raises Done for exit code 0, and Fault for one that is not among
        codes, or a traceback.
        """
        process, self.process = self.start(), None
        try:
            text, _ = process.communicate(timeout=PATIENCE)  # all of its processes have the pipe
        except subprocess.TimeoutExpired:
            self.process = process
            raise Fault("it does not end, or something that it started does not") from None
        if process.returncode not in (0, *codes) or "Traceback" in text:
            raise Fault(
                f"exit code {process.returncode}, {' or '.join(map(str, codes)) or 0} was expected:\n{text[-3000:]}"
            )
        if process.returncode == 0:
            raise Done
        return text

    def until(self, reached: Callable[[], object], pause: float = 0.01) -> None:
        """Let it run until something is reached. Raises Done where it ends well before, and Fault where it does not."""
        process, deadline = self.start(), time.monotonic() + PATIENCE
        while not reached():
            if process.poll() is not None:
                self.end()
            if time.monotonic() > deadline:
                raise Fault(f"it hangs after step {self.step()}")
            time.sleep(pause)

    def steps_on(self, count: int) -> None:
        """Let it do so many steps from here on. Where it has just been started: from its last checkpoint on."""
        self.until(self.begun)
        target = self.step() + count
        self.until(lambda: self.step() >= target)

    def abort(self) -> None:
        """End what a fault has left."""
        if self.process:
            for pid in (*ranks(self.process.pid), self.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def ranks(self) -> list[int]:
        """The process ids of its ranks, once it has them."""
        self.until(lambda: len(ranks(self.start().pid)) == 2)
        return ranks(self.start().pid)

    def numbers(self) -> int:
        """Which file its numbers are in; 0: there is none."""
        file = self.out / "metrics.jsonl"
        return file.stat().st_ino if file.exists() else 0

    def begun(self) -> bool:
        """Whether it does steps since it was started: it begins with a new file of its numbers."""
        return self.numbers() not in (0, self.before)

    def rows(self) -> list[dict[str, float]]:
        """Every step's numbers but times and memory."""
        file = self.out / "metrics.jsonl"
        *lines, _ = file.read_text().split("\n") if file.exists() else [""]
        rows = map(json.loads, lines)
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "memory/")) and k != "tokens_per_second"}
            for row in rows
        ]

    def step(self) -> int:
        """The last step that has its numbers; -1: none."""
        return max((int(row["step"]) for row in self.rows()), default=-1)

    def latest(self) -> str:
        """The checkpoint that it continues from; empty: none."""
        file = self.out / "latest"
        return file.read_text().strip() if file.exists() else ""

    def files(self) -> dict[str, int]:
        """What a save changes: the names in its folder, and in the step folder that is being written, with which file each one is."""
        found: dict[str, int] = {}
        with suppress(FileNotFoundError):  # renamed meanwhile
            for entry in os.scandir(self.out):
                found[entry.name] = entry.inode()
                if entry.name.endswith(".partial") and entry.is_dir():
                    found |= {f"{entry.name}/{inner.name}": inner.inode() for inner in os.scandir(entry.path)}
        return found

    def difference(self, whole: Run) -> str:
        """What is not as in a run that was left alone; empty: nothing."""
        rows, wanted = self.rows(), whole.rows()
        if rows != wanted:
            alike = [ours == theirs for ours, theirs in zip(rows, wanted, strict=False)]
            return f"metrics.jsonl differs behind {[*alike, False].index(False)} lines"
        for pattern in ("samples/*", "hf/model.safetensors"):
            ours, theirs = ({path.name: path.read_bytes() for path in run.out.glob(pattern)} for run in (self, whole))
            if ours != theirs:
                return f"{pattern} differs"
        return ""


def ranks(launcher: int) -> list[int]:
    """The process ids of a launcher's ranks, in their order."""
    found = {}
    with suppress(FileNotFoundError, ProcessLookupError):  # one that ends meanwhile
        for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            if rank := re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes()):
                found[int(rank[1])] = int(pid)
    return [found[rank] for rank in sorted(found)]
