"""Reward functions and environments: the built-in ones, and the user's own, which run in processes that can be killed."""

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

from rlhf.errors import UserError
from rlhf.rewards import answers, child

LATE = "no result within the time limit"
LOADING = 120.0  # seconds that the import of a user's module may take
LONGEST = 1e6  # seconds of one wait for a process: the system takes no more than 2e6

Item = tuple[str, str, dict[str, Any]]  # prompt, response, record
Turn = tuple[Hashable, dict[str, Any], list[str]]  # the dialogue's key, record, what the model has said in it so far, turn by turn
Message = dict[str, str]  # role and content


class Score(NamedTuple):
    """What one response is worth."""

    value: float
    failed: bool  # the function raised, hung, ended its process or returned no finite number: value is 0


class Reply(NamedTuple):
    """What an environment says to a turn."""

    messages: list[Message] | None  # None: the dialogue is over
    value: float  # what the turn is worth
    failed: bool  # as of a Score; the dialogue is over


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


GIVEN = {  # by the kind of child.KINDS: the key that names it, and what may be given
    "function": ("reward.function", "module:function or path/file.py:function"),
    "environment": ("rollout.environment", "module:Class or path/file.py:Class"),
}


def check(spec: str, memory: float = 0.0, *, kind: str = "function", key: str = "") -> None:
    """Raise UserError unless spec names what can be imported, in a process of its own, and is of the kind; a function may be in REWARDS.

    key: that has it; empty: the one of its kind.
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
    """One process of child.py, and the item it is working on.

    memory: GiB that it may have; 0: no limit.

    Not forked: the parent may hold a CUDA context or the threads of torch.distributed, which no fork survives.
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
        self.ended: list[Hashable] = []  # dialogues that it may forget
        self.deadline = time.monotonic() + LOADING
        self.connection, theirs = Pipe()
        end, self.lifeline = os.pipe()  # nothing is ever written: it closes when this process ends
        descriptors = (theirs.fileno(), end)
        command = [sys.executable, "-P", "-u", child.__file__, *map(str, descriptors)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors, process_group=0)
        theirs.close()
        os.close(end)
        self.connection.send((sys.path, place, name, kind, int(memory * 2**30)))

    def give(self, index: int, item: tuple, timeout: float) -> None:
        self.item, self.deadline = index, time.monotonic() + timeout
        with suppress(BrokenPipeError):  # it ended while idle: advance() finds the end of the connection
            self.connection.send(item)

    def seconds_left(self) -> float:
        return min(max(0.0, self.deadline - time.monotonic()), LONGEST)

    def advance(self) -> tuple[Any, str] | None:
        """(value, error) for the item at hand once there is one, or once time is up. Raises UserError if nothing can be loaded."""
        if self.connection.poll():
            try:
                value, error = self.connection.recv()
            except (EOFError, OSError):  # the latter in the middle of an answer
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
        """End the process and all that it started. Returns its exit code."""
        if not self.connection.closed:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.connection.close()
            os.close(self.lifeline)
        return self.process.wait()


Given = TypeVar("Given", Item, Turn)
Found = TypeVar("Found", Score, Reply)


class Pool(Generic[Given, Found]):
    """Up to `workers` processes that run code of the user, started when first needed and kept until close().

    timeout: seconds for one item. memory: GiB for each process; 0: no limit.
    failure: what the first failed item met with, as text; empty while none has failed.
    late: whether the time limit has ended any, so that the results depend on how fast the machine is.
    """

    kind: str  # in child.KINDS

    def __init__(self, spec: str, timeout: float, workers: int, memory: float = 0.0):
        self.spec, self.timeout, self.num_workers, self.memory = spec, timeout, workers, memory
        self.pool: list[Worker] = []
        self.failure, self.late = "", False
        self._waiting: deque[tuple[int, Given]] = deque()
        self._open: set[int] = set()  # items given whose results have not been taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.pool:
            worker.kill()
        self.pool = []

    def give(self, key: int, item: Given) -> None:
        """Take up an item; its result comes out of take() under this key."""
        self._waiting.append((key, item))
        self._open.add(key)

    def take(self, block: bool | Set[int] = False) -> dict[int, Found]:
        """The results that are there now; with block, all, or at least those of these keys. A process that hung or ended is replaced.

        Raises UserError if the user's code cannot be loaded; what was given until then is forgotten.
        """
        found: dict[int, Found] = {}
        awaited = self._open.intersection(block if isinstance(block, Set) else self._open if block else ())
        complete = False
        try:
            found = self._at_once()
            while self._open > found.keys():
                busy = self._hand_out(len(self._open) - len(found))
                waits = not awaited <= found.keys()
                wait([worker.connection for worker in busy], min(worker.seconds_left() for worker in busy) if waits else 0)
                before = len(found)
                for worker in busy:
                    key, outcome = worker.item, worker.advance()
                    if key is not None and outcome is not None:
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
        """Drop what was given: after an error, its results must not be taken for those of other items."""
        for worker in self.pool:
            if worker.item is not None:
                worker.kill()
        self._waiting.clear()
        self._open.clear()

    def _hand_out(self, num_open: int) -> list[Worker]:
        """Keep as many processes as there is work for, give each idle one an item, and return those with something to do."""
        self.pool = [worker for worker in self.pool if not worker.connection.closed]
        while len(self.pool) < min(self.num_workers, num_open):
            self.pool.append(Worker(self.spec, self.memory, kind=self.kind))
        for worker in self.pool:
            if worker.loaded and worker.item is None:
                self._hand(worker)
        return [worker for worker in self.pool if not worker.loaded or worker.item is not None]

    def _at_once(self) -> dict[int, Found]:
        """The results of what needs no process."""
        return {}

    def _hand(self, worker: Worker) -> None:
        """Give an idle process an item, if there is one for it."""
        raise NotImplementedError

    def _result(self, value: Any, failed: bool) -> Found:
        raise NotImplementedError


class Rewards(Pool[Item, Score]):
    """A reward function; timeout is for one response."""

    kind = "function"

    def score(self, items: list[Item]) -> list[Score]:
        """One score per (prompt, response, record), in order."""
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
    """An environment, one instance for each dialogue; timeout is for one call of it.

    A dialogue stays in the process that it was begun in. If that process ends, another one makes the instance anew and tells it all again.
    """

    kind = "environment"

    def __init__(self, spec: str, timeout: float, workers: int, memory: float = 0.0):
        super().__init__(spec, timeout, workers, memory)
        self._homes: dict[Hashable, Worker] = {}

    def end(self, key: Hashable) -> None:
        """A dialogue is over, or given up."""
        if worker := self._homes.pop(key, None):
            worker.ended.append(key)

    def _hand(self, worker: Worker) -> None:
        """The oldest turn of a dialogue that is at home in this process, or nowhere."""
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
