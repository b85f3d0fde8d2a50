"""Stops a training run after a signal: the current step is finished and saved, then all ranks exit with code SAVED."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # from a scheduler, Ctrl-C, and sbatch --signal=USR1@SECONDS
# EX_TEMPFAIL of sysexits.h: the run resumes when it is started again. It is not 128 + signal, because ranks also end
# with that code when another node has crashed.
SAVED = 75
HUNG = 76  # no rank has made progress (rlhf.watchdog)


def srun_reports(number: int, env: Mapping[str, str]) -> bool:
    """Return whether srun itself prints that this signal has ended the process.

    srun sends SIGTERM to all tasks of a step when one task has failed, and prints that it cancels the step.
    """
    return number == signal.SIGTERM and env.get("SLURM_STEP_NUM_TASKS", "1") != "1"


class Interrupt:
    """Handles SIGNALS: they set `came` instead of ending the process. Create it on the main thread.

    told: whether this rank prints a message when a signal comes.
    """

    def __init__(self, told: bool = False) -> None:
        self.came, self.told = False, told
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.told and not self.came:
            with suppress(OSError):  # not print(), because the signal may have interrupted a print()
                name = signal.Signals(number).name
                os.write(2, f"rlhf: {name}: the run finishes and saves the current step, then ends\n".encode())
        self.came = True
