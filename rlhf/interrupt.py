"""A signal asks a training run to stop in good order: the step at hand is finished and saved, all ranks end with exit code SAVED."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a scheduler's, a person's (Ctrl-C), and sbatch --signal=USR1@SECONDS
# EX_TEMPFAIL of sysexits.h: start it again, and it continues. Not 128 + signal, with which the victims of another node's crash end, too.
SAVED = 75


class Interrupt:
    """Remembers, from its making on, that one of SIGNALS came, instead of dying of it. Make it on the main thread.

    told: whether this rank says so.
    """

    def __init__(self, told: bool = False) -> None:
        self.came, self.told = False, told
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.told and not self.came:
            with suppress(OSError):  # no print: this may have interrupted one
                os.write(2, f"rlhf: {signal.Signals(number).name}: the run finishes the step at hand, saves it, and ends\n".encode())
        self.came = True
