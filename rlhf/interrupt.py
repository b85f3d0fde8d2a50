"""A signal asks a training run to stop in good order: the step at hand is finished and saved, all ranks end with exit code SAVED."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a scheduler's, a person's (Ctrl-C), and sbatch --signal=USR1@SECONDS
# EX_TEMPFAIL of sysexits.h: start it again, and it continues. Not 128 + signal, with which the victims of another node's crash end, too.
SAVED = 75


class Interrupt:
    """Remembers, from its making on, that one of SIGNALS came, instead of dying of it. Make it on the main thread."""

    def __init__(self) -> None:
        self.came = False
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.came = True
