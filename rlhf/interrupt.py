"""A signal asks a run to stop in good order: the step at hand is finished and saved, and all ranks end with 128 + its number."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a scheduler's, a person's (Ctrl-C), and sbatch --signal=USR1@SECONDS


class Interrupt:
    """Remembers the newest of SIGNALS that this process got, from its making on, instead of dying of it. Make it on the main thread."""

    def __init__(self) -> None:
        self.number = 0  # of the signal; 0: none came
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
