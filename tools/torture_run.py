"""A small run on the CPU in a folder of its own, which is started repeatedly. tools/torture.py breaks it."""

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

PATIENCE = 300.0  # seconds until the run counts as hanging


class Fault(Exception):  # noqa: N818
    """The run did not survive a break."""


class Done(Exception):  # noqa: N818
    """The run ended successfully before it could be broken."""


@dataclass
class Break:
    """A break of a run. `fault` is the reason why the run did not survive, or empty."""

    kind: str
    happened: str
    fault: str


@dataclass
class Run:
    """A run in a folder of its own, which is started repeatedly."""

    root: Path
    name: str
    mode: str
    arguments: list[str]
    startup: float = 0.0  # seconds from the first process of a rank to the first step
    process: subprocess.Popen[str] | None = None
    before: int = 0  # inode of metrics.jsonl at the start
    breaks: list[Break] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out = self.root / self.name

    def start(self) -> subprocess.Popen[str]:
        """Return the process of the launcher. Start it if it does not run."""
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
        """Wait until the run and all of its processes have ended. Return their output.

        Raises Done for exit code 0. Raises Fault for an exit code that is not in `codes`, or for a traceback.
        """
        process, self.process = self.start(), None
        try:
            text, _ = process.communicate(timeout=PATIENCE)  # all of its processes inherit the pipe
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
        """Wait until reached() is true.

        Raises Done if the run ends successfully before, and Fault if it fails or hangs.
        """
        process, deadline = self.start(), time.monotonic() + PATIENCE
        while not reached():
            if process.poll() is not None:
                self.end()
            if time.monotonic() > deadline:
                raise Fault(f"it hangs after step {self.step()}")
            time.sleep(pause)

    def steps_on(self, count: int) -> None:
        """Wait for this number of steps. After a start they count from the last checkpoint."""
        self.until(self.begun)
        target = self.step() + count
        self.until(lambda: self.step() >= target)

    def abort(self) -> None:
        """End all processes after a fault."""
        if self.process:
            for pid in (*ranks(self.process.pid), self.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def ranks(self) -> list[int]:
        """Wait for the ranks. Return their process ids."""
        self.until(lambda: len(ranks(self.start().pid)) == 2)
        return ranks(self.start().pid)

    def numbers(self) -> int:
        """Return the inode of metrics.jsonl, or 0 if there is none."""
        file = self.out / "metrics.jsonl"
        return file.stat().st_ino if file.exists() else 0

    def begun(self) -> bool:
        """Return whether the run has done steps since its start. It begins with a new metrics.jsonl."""
        return self.numbers() not in (0, self.before)

    def rows(self) -> list[dict[str, float]]:
        """Return the numbers of every step, without times and memory."""
        file = self.out / "metrics.jsonl"
        *lines, _ = file.read_text().split("\n") if file.exists() else [""]
        rows = map(json.loads, lines)
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "memory/")) and k != "tokens_per_second"}
            for row in rows
        ]

    def step(self) -> int:
        """Return the last step with numbers, or -1."""
        return max((int(row["step"]) for row in self.rows()), default=-1)

    def latest(self) -> str:
        """Return the name of the checkpoint from which the run continues. Empty: there is none."""
        file = self.out / "latest"
        return file.read_text().strip() if file.exists() else ""

    def files(self) -> dict[str, int]:
        """Return the names and inodes that a save changes: those in `out` and in the unfinished step folder."""
        found: dict[str, int] = {}
        with suppress(FileNotFoundError):  # renamed in the meantime
            for entry in os.scandir(self.out):
                found[entry.name] = entry.inode()
                if entry.name.endswith(".partial") and entry.is_dir():
                    found |= {f"{entry.name}/{inner.name}": inner.inode() for inner in os.scandir(entry.path)}
        return found

    def difference(self, whole: Run) -> str:
        """Return the first difference from an undisturbed run. Empty: there is none."""
        rows, wanted = self.rows(), whole.rows()
        if rows != wanted:
            alike = [ours == theirs for ours, theirs in zip(rows, wanted, strict=False)]
            return f"metrics.jsonl differs behind {[*alike, False].index(False)} lines"
        for pattern in ("samples/*", "hf/model.safetensors"):
            ours, theirs = ({path.name: path.read_bytes() for path in run.out.glob(pattern)} for run in (self, whole))
            if ours != theirs:
                return f"{pattern} differs"
        return ""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks(launcher: int) -> list[int]:
    """Return the process ids of a launcher's ranks, in order of rank. Each is the child of its watcher."""
    found = {}
    with suppress(FileNotFoundError, ProcessLookupError):  # a process may end in the meantime
        for pid in (child for watcher in children(launcher) for child in children(watcher)):
            if rank := re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes()):
                found[int(rank[1])] = pid
    return [found[rank] for rank in sorted(found)]
