"""Standard output and error of a run. A closed pipe or a full disk must not end the run."""

from __future__ import annotations

import io
import os
import select
import sys
import time
from typing import Any, Self


class Lossy(io.FileIO):
    """A file whose write errors are ignored, such as a closed pipe or a full disk."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a non-blocking pipe that is full
                select.select([], [self], [])
        except OSError:
            return memoryview(data).nbytes
        return written


def secure() -> None:
    """Make print() never raise an error. Characters that the encoding does not have are escaped.

    Call it before any file is opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # it is closed: the next opened file would get its number and receive the output
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open() uses the lowest free number
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        # Write standard error by line, even to a file. Python sets write_through instead of line_buffering for it.
        encoding, by_line = (old.encoding, old.line_buffering or old.write_through) if old else ("utf-8", True)
        stream = io.TextIOWrapper(
            io.BufferedWriter(Lossy(number, "w", closefd=False)), encoding, "backslashreplace", line_buffering=by_line
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def say(text: str) -> None:
    """Print a line to standard output. Call on rank 0."""
    print(text, flush=True)


class Progress:
    """A progress line on the terminal. It prints nothing if standard output is not a terminal."""

    def __init__(self, name: str, units: str, total: int, shown: bool):
        self.name, self.units, self.total, self.shown = name, units, total, shown and sys.stdout.isatty()
        self.done = self.tokens = 0
        self.began = self.said = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            print("\r\033[K", end="", flush=True)  # erase the line

    def add(self, done: int, tokens: int) -> None:
        """Count `done` more finished units and `tokens` more tokens."""
        self.done += done
        self.tokens += tokens
        now = time.perf_counter()
        if self.shown and now - self.said > 0.5:
            self.said, seconds = now, now - self.began
            left = seconds * (self.total - self.done) / self.done  # assumes that the rest is as fast
            rate = f"{self.tokens / seconds:,.0f} tokens/s, about {left:.0f} s to go"
            print(f"\r\033[K{self.name}: {self.done} of {self.total} {self.units}, {rate}", end="", flush=True)
