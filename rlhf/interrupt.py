"""What a signal does: a training run finishes and saves the current step, then all ranks exit with code SAVED."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # from a scheduler, Ctrl-C, and sbatch --signal=USR1@SECONDS
# EX_TEMPFAIL of sysexits.h: the run resumes when it is started again. It is not 128 + signal, because ranks also end
# with that code when another node has crashed.
SAVED = 75
HUNG = 76  # no rank has made progress (rlhf.watchdog)


Result = TypeVar("Result")


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


def run(program: Coroutine[Any, Any, Result]) -> Result:
    """Return what asyncio.run() returns. Call on the main thread.

    A signal of SIGNALS that has a handler cancels the program, and then raises KeyboardInterrupt with its number. If
    the handler raised it within a task, asyncio would print a traceback.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    came: list[int] = []

    async def cancelled() -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task, "within a coroutine"

        def cancel(number: int) -> None:
            came.append(number)
            task.cancel()

        for number, handler in handlers.items():
            if callable(handler):
                loop.add_signal_handler(number, cancel, number)
        return await program

    try:
        return asyncio.run(cancelled())
    except asyncio.CancelledError:
        raise KeyboardInterrupt(came[0]) from None
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
