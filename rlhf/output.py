"""Standard output and error of a run, which must not end because nobody reads what it prints, or because it cannot be written."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any


class Lossy(io.FileIO):
    """A file for what may be lost: a reader that has gone away and a full disk are no errors."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that does not block, and is full
                select.select([], [self], [])
        except OSError:
            return memoryview(data).nbytes
        return written


def secure() -> None:
    """Let nothing that is printed raise an error. What the encoding lacks is escaped. Call it before anything is opened."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # it is closed: another file would get its number, and be printed into
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        # Standard error does not wait for the end of a run, even where it is a file: then Python writes it through instead of by line.
        encoding, by_line = (old.encoding, old.line_buffering or old.write_through) if old else ("utf-8", True)
        stream = io.TextIOWrapper(
            io.BufferedWriter(Lossy(number, "w", closefd=False)), encoding, "backslashreplace", line_buffering=by_line
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
