"""Reward functions: the table of built-in ones, and the user's own, which run in processes that can be killed."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from types import TracebackType
from typing import Any, NamedTuple, Self

from rlhf.errors import UserError
from rlhf.rewards import answers, child

LATE = "no result within the time limit"
LOADING = 120.0  # seconds that the import of a user's module may take

Item = tuple[str, str, dict[str, Any]]  # prompt, response, record


class Score(NamedTuple):
    """What one response is worth."""

    value: float
    failed: bool  # the function raised, hung, ended its process or returned no finite number: value is 0


def verify(prompt: str, response: str, record: dict[str, Any]) -> float:
    """1.0 if the response states the record's answer, else 0.0."""
    if "answer" not in record:
        raise UserError(
            "reward.function='math' compares with the record's 'answer', but a record has none: add it, or set another function"
        )
    return answers.verify(response, str(record["answer"]))


REWARDS: dict[str, Callable[[str, str, dict[str, Any]], float]] = {
    "math": verify,  # bounded in time by itself, so it needs no process
}


def check(spec: str, memory: float = 0.0) -> None:
    """Raise UserError unless spec is in REWARDS or names a function that can be imported; it is, in a process of its own."""
    if spec in REWARDS:
        return
    worker = Worker(spec, memory)
    try:
        while not worker.loaded:
            wait([worker.connection], worker.seconds_left())
            worker.advance()
    finally:
        worker.kill()


class Worker:
    """One process of child.py, and the item it is working on.

    memory: GiB that it may have; 0: no limit.

    Not forked: the parent may hold a CUDA context or the threads of torch.distributed, which no fork survives.
    """

    def __init__(self, spec: str, memory: float = 0.0):
        place, _, name = spec.rpartition(":")
        if not place or not name:
            raise UserError(
                f"reward.function={spec!r} is unknown: choose {', '.join(REWARDS)}, or give module:function or path/file.py:function"
            )
        self.spec = spec
        self.loaded = False
        self.item: int | None = None
        self.deadline = time.monotonic() + LOADING
        self.connection, theirs = Pipe()
        end, self.lifeline = os.pipe()  # nothing is ever written: it closes when this process ends
        descriptors = (theirs.fileno(), end)
        command = [sys.executable, "-P", "-u", child.__file__, *map(str, descriptors)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors, process_group=0)
        theirs.close()
        os.close(end)
        self.connection.send((sys.path, place, name, int(memory * 2**30)))

    def give(self, index: int, item: Item, timeout: float) -> None:
        self.item, self.deadline = index, time.monotonic() + timeout
        with suppress(BrokenPipeError):  # it ended while idle: advance() finds the end of the connection
            self.connection.send(item)

    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def advance(self) -> tuple[float, str] | None:
        """(value, error) for the item at hand once there is one, or once time is up. Raises UserError if the function cannot be loaded."""
        if self.connection.poll():
            try:
                value, error = self.connection.recv()
            except (EOFError, OSError):  # the latter in the middle of an answer
                value, error = 0.0, f"the process ended with exit code {self.kill()}"
        elif self.seconds_left() == 0:
            self.kill()
            value, error = 0.0, LATE
        else:
            return None
        if self.loaded:
            self.item = None
            return value, error
        if error:
            reason = error.strip().splitlines()[-1]
            raise UserError(f"reward.function={self.spec!r} cannot be loaded: {reason}; give module:function or path/file.py:function")
        self.loaded = True
        return None

    def kill(self) -> int:
        """End the process and all that it started. Returns its exit code."""
        if not self.connection.closed:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.connection.close()
            os.close(self.lifeline)
        return self.process.wait()


class Rewards:
    """A reward function, and up to `workers` processes that run it, started when first needed and kept until close().

    timeout: seconds for one response. memory: GiB for each process; 0: no limit.
    failure: what the first failed response met with, as text; empty while none has failed.
    late: whether the time limit has ended any, so that the scores depend on how fast the machine is.
    """

    def __init__(self, spec: str, timeout: float, workers: int, memory: float = 0.0):
        self.spec, self.timeout, self.num_workers, self.memory = spec, timeout, workers, memory
        self.pool: list[Worker] = []
        self.failure, self.late = "", False
        self._waiting: deque[tuple[int, Item]] = deque()
        self._open = 0  # items given whose scores have not been taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.pool:
            worker.kill()
        self.pool = []

    def give(self, key: int, item: Item) -> None:
        """Take up a (prompt, response, record); its score comes out of take() under this key."""
        self._waiting.append((key, item))
        self._open += 1

    def take(self, block: bool = False) -> dict[int, Score]:
        """The scores that are there now; with block, all of them. A process that hung or ended is replaced.

        Raises UserError if the function cannot be loaded; what was given until then is forgotten.
        """
        found: dict[int, Score] = {}
        complete = False
        try:
            if self.spec in REWARDS:
                found = {key: Score(REWARDS[self.spec](*item), failed=False) for key, item in self._waiting}
                self._waiting.clear()
            while self._open > len(found):
                busy = self._hand_out(self._open - len(found))
                wait([worker.connection for worker in busy], min(worker.seconds_left() for worker in busy) if block else 0)
                before = len(found)
                for worker in busy:
                    key, outcome = worker.item, worker.advance()
                    if key is not None and outcome is not None:
                        value, error = outcome
                        found[key] = Score(value, failed=bool(error))
                        self.failure, self.late = self.failure or error, self.late or error == LATE
                if not block and len(found) == before:
                    break
            complete = True
        finally:
            if not complete:
                self.forget()
        self._open -= len(found)
        return found

    def forget(self) -> None:
        """Drop what was given: after an error, its results must not be taken for those of other items."""
        for worker in self.pool:
            if worker.item is not None:
                worker.kill()
        self._waiting.clear()
        self._open = 0

    def score(self, items: list[Item]) -> list[Score]:
        """One score per (prompt, response, record), in order."""
        for key, item in enumerate(items):
            self.give(key, item)
        scores = self.take(block=True)
        return [scores[key] for key in range(len(items))]

    def _hand_out(self, num_open: int) -> list[Worker]:
        """Keep as many processes as there is work for, give each idle one an item, and return those with something to do."""
        self.pool = [worker for worker in self.pool if not worker.connection.closed]
        while len(self.pool) < min(self.num_workers, num_open):
            self.pool.append(Worker(self.spec, self.memory))
        for worker in self.pool:
            if self._waiting and worker.loaded and worker.item is None:
                worker.give(*self._waiting.popleft(), self.timeout)
        return [worker for worker in self.pool if not worker.loaded or worker.item is not None]
