"""Runs reward functions and environments. Those of the user run in worker processes, which can be killed."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Set
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from rlhf import progress
from rlhf.errors import UserError
from rlhf.rewards import answers, child

LATE = "no result within the time limit"
LOADING = 120.0  # time limit in seconds for the import of a user's module
LONGEST = 1e6  # longest wait for a process, in seconds; the system allows at most 2e6

Item = tuple[str, str, dict[str, Any]]  # prompt, response, record
Turn = tuple[Hashable, dict[str, Any], list[str]]  # key of the dialogue, record, texts of the model's turns so far
Message = dict[str, str]  # role and content


class Score(NamedTuple):
    """The result of a reward function for one response."""

    value: float
    failed: bool  # the function raised, timed out, ended its process or returned no finite number; value is 0


class Reply(NamedTuple):
    """The answer of an environment to a turn."""

    messages: list[Message] | None  # None: the dialogue has ended
    value: float  # reward of the turn
    failed: bool  # as in Score; the dialogue has ended


def verify(prompt: str, response: str, record: dict[str, Any]) -> float:
    """Return 1.0 if the response states the record's answer, else 0.0."""
    if "answer" not in record:
        missing = "reward.function='math' needs the key 'answer' in each record, but a record has none"
        raise UserError(f"{missing}: add it, or set another function")
    return answers.verify(response, str(record["answer"]))


REWARDS: dict[str, Callable[[str, str, dict[str, Any]], float]] = {
    "math": verify,  # its time is bounded, so it needs no worker process
}


GIVEN = {  # kind in child.KINDS -> configuration key, and the form of its value
    "function": ("reward.function", "module:function or path/file.py:function"),
    "environment": ("rollout.environment", "module:Class or path/file.py:Class"),
}


def check(spec: str, memory: float = 0.0, *, kind: str = "function", key: str = "") -> None:
    """Raise UserError unless a worker process can import spec and it has this kind. A function may be in REWARDS.

    key: the configuration key of spec, for the message; empty: the key of its kind.
    """
    if kind == "function" and spec in REWARDS:
        return
    worker = Worker(spec, memory, kind=kind, key=key)
    try:
        while not worker.loaded:
            wait([worker.connection], worker.seconds_left())
            worker.advance()
    finally:
        worker.kill()


class Worker:
    """One process of child.py, and the item that it is working on.

    memory: memory limit in GiB; 0: no limit. The process is not forked, because a fork does not work with a CUDA
    context or with the threads of torch.distributed.
    """

    def __init__(self, spec: str, memory: float = 0.0, *, kind: str = "function", key: str = ""):
        place, _, name = spec.rpartition(":")
        usual, self.remedy = GIVEN[kind]
        self.key = key or usual
        if not place or not name:
            known = f"choose {', '.join(REWARDS)}, or " if kind == "function" else ""
            raise UserError(f"{self.key}={spec!r} is unknown: {known}give {self.remedy}")
        self.spec = spec
        self.loaded = False
        self.item: int | None = None
        self.ended: list[Hashable] = []  # ended dialogues, whose environments it can drop
        self.deadline = time.monotonic() + LOADING
        self.connection, theirs = Pipe()
        end, self.lifeline = os.pipe()  # nothing is written to it; it closes when this process ends
        descriptors = (theirs.fileno(), end)
        command = [sys.executable, "-P", "-u", child.__file__, *map(str, descriptors)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors, process_group=0)
        theirs.close()
        os.close(end)
        self.connection.send((sys.path, place, name, kind, int(memory * 2**30)))

    def give(self, index: int, item: tuple, timeout: float) -> None:
        self.item, self.deadline = index, time.monotonic() + timeout
        with suppress(BrokenPipeError):  # the process ended while idle; advance() detects that the connection is closed
            self.connection.send(item)

    def seconds_left(self) -> float:
        return min(max(0.0, self.deadline - time.monotonic()), LONGEST)

    def advance(self) -> tuple[Any, str] | None:
        """Return (value, error) of the current item if it is done or its time is over, else None.

        Raises UserError if the user's code cannot be loaded.
        """
        if self.connection.poll():
            try:
                value, error = self.connection.recv()
            except (EOFError, OSError):  # OSError: the process ended while it sent an answer
                value, error = None, f"the process ended with exit code {self.kill()}"
        elif self.seconds_left() == 0:
            self.kill()
            value, error = None, LATE
        else:
            return None
        if self.loaded:
            self.item = None
            return value, error
        if error:
            reason = error.strip().splitlines()[-1]
            raise UserError(f"{self.key}={self.spec!r} cannot be loaded: {reason}; give {self.remedy}")
        self.loaded = True
        return None

    def kill(self) -> int:
        """Kill the process and all processes in its process group. Return its exit code."""
        if not self.connection.closed:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.connection.close()
            os.close(self.lifeline)
        return self.process.wait()


Given = TypeVar("Given", Item, Turn)
Found = TypeVar("Found", Score, Reply)


class Pool(Generic[Given, Found]):
    """Up to `workers` processes that run code of the user. They start when needed and are kept until close().

    timeout   time limit of an item in seconds
    memory    memory limit of each process in GiB; 0: no limit
    failure   error of the first failed item, as text; "" if none has failed
    late      whether an item has exceeded the time limit; the results then depend on the speed of the machine
    """

    kind: str  # in child.KINDS

    def __init__(self, spec: str, timeout: float, workers: int, memory: float = 0.0):
        self.spec, self.timeout, self.num_workers, self.memory = spec, timeout, workers, memory
        self.pool: list[Worker] = []
        self.failure, self.late = "", False
        self._waiting: deque[tuple[int, Given]] = deque()
        self._open: set[int] = set()  # keys of items whose results have not been taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.pool:
            worker.kill()
        self.pool = []

    def give(self, key: int, item: Given) -> None:
        """Add an item. take() returns its result under this key."""
        self._waiting.append((key, item))
        self._open.add(key)

    def take(self, block: bool | Set[int] = False) -> dict[int, Found]:
        """Return the finished results by key. With block, wait for all results, or at least for those of these keys.

        A process that has exceeded the time limit or ended is replaced. Raises UserError if the user's code cannot be
        loaded. All items are then dropped.
        """
        found: dict[int, Found] = {}
        awaited = self._open.intersection(block if isinstance(block, Set) else self._open if block else ())
        complete = False
        try:
            found = self._at_once()
            while self._open > found.keys():
                busy = self._hand_out(len(self._open) - len(found))
                waits = not awaited <= found.keys()
                wait(
                    [worker.connection for worker in busy],
                    min(worker.seconds_left() for worker in busy) if waits else 0,
                )
                before = len(found)
                for worker in busy:
                    key, outcome = worker.item, worker.advance()
                    if key is not None and outcome is not None:
                        progress.move()
                        value, error = outcome
                        found[key] = self._result(value, bool(error))
                        self.failure, self.late = self.failure or error, self.late or error == LATE
                if awaited <= found.keys() and len(found) == before:
                    break
            complete = True
        finally:
            if not complete:
                self.forget()
        self._open -= found.keys()
        return found

    def forget(self) -> None:
        """Drop all items. After an error, their results must not be used for other items with the same keys."""
        for worker in self.pool:
            if worker.item is not None:
                worker.kill()
        self._waiting.clear()
        self._open.clear()

    def _hand_out(self, num_open: int) -> list[Worker]:
        """Start processes if there is work for more, and give each idle one an item. Return the busy processes."""
        self.pool = [worker for worker in self.pool if not worker.connection.closed]
        while len(self.pool) < min(self.num_workers, num_open):
            self.pool.append(Worker(self.spec, self.memory, kind=self.kind))
        for worker in self.pool:
            if worker.loaded and worker.item is None:
                self._hand(worker)
        return [worker for worker in self.pool if not worker.loaded or worker.item is not None]

    def _at_once(self) -> dict[int, Found]:
        """Return the results of items that need no process."""
        return {}

    def _hand(self, worker: Worker) -> None:
        """Give an idle process an item, if there is one for it."""
        raise NotImplementedError

    def _result(self, value: Any, failed: bool) -> Found:
        raise NotImplementedError


class Rewards(Pool[Item, Score]):
    """A reward function. timeout is the time limit for one response."""

    kind = "function"

    def score(self, items: list[Item]) -> list[Score]:
        """Return one score per (prompt, response, record), in order."""
        for key, item in enumerate(items):
            self.give(key, item)
        scores = self.take(block=True)
        return [scores[key] for key in range(len(items))]

    def _at_once(self) -> dict[int, Score]:
        if self.spec not in REWARDS:
            return {}
        found = {key: Score(REWARDS[self.spec](*item), failed=False) for key, item in self._waiting}
        self._waiting.clear()
        return found

    def _hand(self, worker: Worker) -> None:
        if self._waiting:
            worker.give(*self._waiting.popleft(), self.timeout)

    def _result(self, value: Any, failed: bool) -> Score:
        return Score(0.0 if failed else value, failed)


class Environments(Pool[Turn, Reply]):
    """An environment, with one instance per dialogue. timeout is the time limit for one call of a method.

    A dialogue stays in the process that it began in. If that process ends, another process makes a new instance and
    gives it all turns of the dialogue again.
    """

    kind = "environment"

    def __init__(self, spec: str, timeout: float, workers: int, memory: float = 0.0):
        super().__init__(spec, timeout, workers, memory)
        self._homes: dict[Hashable, Worker] = {}

    def end(self, key: Hashable) -> None:
        """Mark a dialogue as ended, so that its environment can be dropped."""
        if worker := self._homes.pop(key, None):
            worker.ended.append(key)

    def _hand(self, worker: Worker) -> None:
        """Give the process the oldest turn of a dialogue that it already has, or that no process has."""
        self._homes = {key: home for key, home in self._homes.items() if not home.connection.closed}
        for place, (index, (key, record, texts)) in enumerate(self._waiting):
            if self._homes.get(key, worker) is worker:
                del self._waiting[place]
                calls = 1 if key in self._homes else len(texts) + 1
                self._homes[key] = worker
                worker.give(index, (key, record, texts, worker.ended), calls * self.timeout)
                worker.ended = []
                return

    def _result(self, value: Any, failed: bool) -> Reply:
        messages, reward = (None, 0.0) if failed else value
        return Reply(messages, reward, failed)
