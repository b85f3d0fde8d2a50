"""Writes the report of a run while the run goes on: in a separate process, so that no rank waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf import progress
from rlhf.report import page

# The next report begins at the earliest after this many times the processor time of the last one, so that reports take
# at most a few percent of one core, however long the run is.
REST = 30
NICE = ["nice", "-n", "19"]  # while the run goes on
COMMAND = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "rlhf.report.command"]


class Reporter:
    """Starts the processes that write out/report.html, one at a time. A failure is one line, and the run goes on."""

    def __init__(self, out: Path, wanted: bool):
        """wanted: whether this rank writes the report. A missing plotting library is reported once, here."""
        self.out = out
        self._process: subprocess.Popen[bytes] | None = None
        self._told = ""
        self._began = self._ready = 0.0  # times of the last start, and before which no other one is made
        if wanted and page.plotting() is None:
            print(f"{page.FILE} is not written, because the package bokeh is missing: {page.REMEDY}", flush=True)
            wanted = False
        self.wanted = wanted
        for file in out.glob(f"{page.FILE}.*.partial") if wanted else ():  # of a run that was killed
            file.unlink(missing_ok=True)

    def update(self) -> None:
        """Begin to write the report, unless the last process still runs, or has ended only a short time ago."""
        if self.wanted and self._ended() and time.monotonic() >= self._ready:
            self._start([*NICE, *COMMAND])

    def finish(self, seconds: float) -> None:
        """Write the report at the end of the run. Wait at most this long, then end the process.

        Meanwhile the watchdog sees progress.
        """
        if not self.wanted:
            return
        self._end()  # its report would not have the last step
        self._start(COMMAND)
        limit = time.monotonic() + seconds
        while not (ended := self._ended()) and time.monotonic() < limit:
            time.sleep(0.02)
            progress.move()  # else the watchdog could end a complete run
        if not ended:
            self._end()
            print(f"{self.out}/{page.FILE} is not up to date: it took more than {seconds:g} s", flush=True)

    def _start(self, command: list[str]) -> None:
        self._began = time.monotonic()
        try:
            # Not a pipe, which would have to be emptied.
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = subprocess.Popen(
                [*command, str(self.out)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors
            )
        except OSError as error:  # such as a full disk or too many processes
            self._tell(str(error))

    def _end(self) -> None:
        """Kill the process, if one runs, and remove the file that it was writing."""
        if self._process:
            self._process.kill()
            self._process.wait()
            page.partial(self.out / page.FILE, self._process.pid).unlink(missing_ok=True)
            self._process = None

    def _ended(self) -> bool:
        """Return whether no process runs. Print the last line of one that has failed."""
        if not self._process:
            return True
        ended, status, used = os.wait4(self._process.pid, os.WNOHANG)
        if not ended:
            return False
        code = self._process.returncode = os.waitstatus_to_exitcode(status)
        self._process = None
        self._ready = self._began + REST * (used.ru_utime + used.ru_stime)
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip() or f"exit code {code}"
        self._errors.close()
        if code:
            self._tell(said.split("\n")[-1].removeprefix("rlhf: ")[:300])
        return True

    def _tell(self, why: str) -> None:
        """Print why the report is not written, unless this is the reason of the last time."""
        if why != self._told:
            self._told = why
            print(f"{self.out}/{page.FILE} is not written: {why}", flush=True)
