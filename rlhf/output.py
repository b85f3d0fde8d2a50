"""Standard output and error of a run. A closed pipe or a full disk must not end the run."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any


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
