"""Runs code of the user in processes, which can be killed. functions.py and environments.py give it work."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable, Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Pipe, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from rlhf import progress
from rlhf.config import JUDGE, Judge, Reward
from rlhf.errors import UserError
from rlhf.judge.rubric import Rubric
from rlhf.rewards import child
from rlhf.rewards.child import LATE
from rlhf.rewards.rules import REWARDS

LOADING = 120.0  # time limit in seconds for the import of a user's module
LONGEST = 1e6  # longest wait for a process, in seconds; the system allows at most 2e6
GRACE = 1.0  # seconds in which an async process reports a call that has exceeded its time limit

GIVEN = {  # kind in child.KINDS -> configuration key, and the form of its value
    "function": ("reward.function", "module:function or path/file.py:function"),
    "environment": ("rollout.environment", "module:Class or path/file.py:Class"),
}


def check(*specs: str, memory: float = 0.0, kind: str = "function", key: str = "") -> None:
    """Raise UserError unless a worker process can import each of specs and it has this kind.

    A function may be in REWARDS. key: the configuration key of specs, for the message; empty: the key of its kind.
    """
    for spec in specs:
        if any(called(spec) == called(other) for other in specs if other is not spec):
            same = f"{key or GIVEN[kind][0]} has two functions with the name {called(spec)!r}"
            raise UserError(f"{same}, which metrics and reward.weights use: rename one of them")
        if kind == "function" and spec in (*REWARDS, JUDGE):
            continue
        worker = Worker(spec, Reward(memory=memory), kind, key)
        try:
            while not worker.loaded:
                wait([worker.connection], worker.seconds_left())
                worker.advance()
        finally:
            worker.kill()


def called(spec: str) -> str:
    """Return the name of a function or class: that of `file.py:name` is `name`."""
    return spec.rpartition(":")[2]


@dataclass(slots=True, eq=False)
class Job:
    """An item to work on. If it fails, it is tried once more."""

    key: Hashable
    item: tuple
    error: str = ""  # of the first try
    alone: bool = False  # it failed together with other items, so the second try has its own call


class Worker:
    """One process of child.py, and the calls that it is working on.

    limits: time and memory limit. judge: runs Rubric with this configuration in place of the user's code. The process
    is not forked, because a fork does not work with a CUDA context or with the threads of torch.distributed.
    """

    def __init__(self, spec: str, limits: Reward, kind: str = "function", key: str = "", judge: Judge | None = None):
        place, _, name = spec.rpartition(":") if judge is None else (Rubric.__module__, "", Rubric.__name__)
        usual, self.remedy = GIVEN[kind]
        self.key = key or usual
        if not place or not name:
            known = f"choose {', '.join(REWARDS)} or {JUDGE}, or " if kind == "function" else ""
            raise UserError(f"{self.key}={spec!r} is unknown: {known}give {self.remedy}")
        self.spec, self.limits = spec, limits
        self.loaded, self.form = False, child.Form()
        self.calls: dict[int, list[Job]] = {}
        self.ended: list[Hashable] = []  # ended dialogues, whose environments it can drop
        self._count = 0  # calls so far
        self.limit, self.deadline = LOADING, time.monotonic() + LOADING
        self.connection, theirs = Pipe()
        end, self.lifeline = os.pipe()  # nothing is written to it; it closes when this process ends
        descriptors = (theirs.fileno(), end)
        command = [sys.executable, "-P", "-u", child.__file__, *map(str, descriptors)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors, process_group=0)
        theirs.close()
        os.close(end)
        # A thread, because a process that is busy may not read, and kill() must end the wait for it.
        self._sender = ThreadPoolExecutor(1)
        self._send(sys.path)
        self._send((place, name, kind, judge and (judge,), int(limits.memory * 2**30), limits.timeout))

    def give(self, jobs: list[Job], items: list[tuple], limit: float) -> None:
        """Begin a call. limit: seconds in which an answer to any call must come."""
        self._count += 1
        self.limit = limit + (GRACE if self.form.waits else 0.0)
        if not self.calls:
            self.deadline = time.monotonic() + self.limit
        self.calls[self._count] = jobs
        self._send((self._count, items))

    def seconds_left(self) -> float:
        return min(max(0.0, self.deadline - time.monotonic()), LONGEST)

    @property
    def jobs(self) -> list[Job]:
        """The unfinished jobs of all calls."""
        return [job for jobs in self.calls.values() for job in jobs]

    def advance(self) -> list[tuple[Job, Any, str]]:
        """Return (job, value, error) of the jobs that are done or whose time is over.

        Raises UserError if the user's code cannot be loaded.
        """
        done: list[tuple[Job, Any, str]] = []
        try:
            while self.connection.poll():
                number, outcomes = self.connection.recv() if self.loaded else (0, self._load(*self.connection.recv()))
                done += [(job, *outcome) for job, outcome in zip(self.calls.pop(number, []), outcomes, strict=True)]
                self.deadline = time.monotonic() + self.limit
        except (EOFError, OSError):  # OSError: the process ended while it sent an answer
            return done + self._fail(f"the process ended with exit code {self.kill()}")
        if self.seconds_left() == 0:
            self.kill()
            done += self._fail(LATE)
        return done

    def kill(self) -> int:
        """Kill the process and all processes in its process group. Return its exit code."""
        if not self.connection.closed:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)  # ends a wait of the sender
            self._sender.shutdown()
            self.connection.close()
            os.close(self.lifeline)
        return self.process.wait()

    def _send(self, message: Any) -> None:
        def send() -> None:
            with suppress(OSError):  # the process has ended; advance() detects that the connection is closed
                self.connection.send(message)

        self._sender.submit(send)

    def _load(self, form: tuple, error: str) -> list:
        if error:
            reason = error.strip().splitlines()[-1]
            raise UserError(
                f"{self.key}={self.spec!r} cannot be loaded: {reason}; correct it, or give another {self.remedy}"
            )
        self.loaded, self.form = True, child.Form(*form)
        return []

    def _fail(self, error: str) -> list[tuple[Job, Any, str]]:
        if not self.loaded:
            self._load(self.form, error)
        jobs, self.calls = self.jobs, {}
        for job in jobs:
            if len(jobs) > 1 and not job.alone:  # it may not be its fault, so it gets two more tries at most
                job.alone, job.error = True, ""
        return [(job, None, error) for job in jobs]


Given = TypeVar("Given", bound=tuple)
Found = TypeVar("Found")


class Pool(Generic[Given, Found]):
    """Up to `limits.workers` processes for each of `specs`. They start when needed and are kept until close().

    limits    workers, time limit and memory limit (Reward)
    failure   error of the first item that failed twice, as text; "" if there is none
    late      the time limit that a failed item has exceeded, as text; results then depend on the speed of the machine
    """

    kind: str  # in child.KINDS

    def __init__(self, specs: Iterable[str], limits: Reward):
        self.specs, self.limits = tuple(specs), limits
        self._limits = dict.fromkeys(self.specs, limits)
        self._judges: dict[str, Judge] = {}  # configurations of the specs that are judges
        self.pool: list[Worker] = []
        self.failure, self.late = "", ""
        self._waiting: dict[str, deque[Job]] = {spec: deque() for spec in self.specs}
        self._open: set[Hashable] = set()  # keys of items whose results have not been taken

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

    def forget(self) -> None:
        """Drop all items. After an error, their results must not be used for other items with the same keys."""
        for worker in self.pool:
            if worker.calls:
                worker.kill()
        for waiting in self._waiting.values():
            waiting.clear()
        self._open.clear()

    def _add(self, spec: str, key: Hashable, item: Given) -> None:
        """Add an item. _take() returns its result under this key."""
        self._waiting[spec].append(Job(key, item))
        self._open.add(key)

    def _take(self, block: bool | Set[Hashable]) -> dict[Any, Found]:
        """Return the finished results by key. With block, wait for all results, or at least for those of these keys.

        A process that has exceeded the time limit or ended is replaced. Raises UserError if the user's code cannot be
        loaded. All items are then dropped.
        """
        found: dict[Any, Found] = {}
        awaited = self._open.intersection(block if isinstance(block, Set) else self._open if block else ())
        complete = False
        try:
            found = self._at_once()
            while self._open > found.keys():
                busy = self._hand_out(flush=bool(block))
                waits = not awaited <= found.keys()
                wait(
                    [worker.connection for worker in busy],
                    min(worker.seconds_left() for worker in busy) if waits else 0,
                )
                before = len(found)
                for worker in busy:
                    for job, value, error in worker.advance():
                        progress.move()
                        self._end(worker, job, value, error, found)
                if awaited <= found.keys() and len(found) == before:
                    break
            complete = True
        finally:
            if not complete:
                self.forget()
        self._open -= found.keys()
        return found

    def _end(self, worker: Worker, job: Job, value: Any, error: str, found: dict[Any, Found]) -> None:
        """Add the result of a job to `found`, or try the job again if it has failed for the first time."""
        final = worker.form.once and not worker.connection.closed
        if error and not job.error and not final:
            job.error, job.alone = error, job.alone or worker.form.many
            self._waiting[worker.spec].appendleft(job)
            return
        if error:
            self.failure = self.failure or error
            if LATE in (error, job.error):
                self.late = self.late or self._limit(worker)
        found[job.key] = self._result(value, bool(error))

    def _limit(self, worker: Worker) -> str:
        """Return the keys of the time limit of a process."""
        seconds = f"{worker.limits.timeout:g}"
        judged = worker.spec in self._judges
        return f"{seconds} s, from judge.timeout and judge.retries" if judged else f"reward.timeout={seconds}"

    def _hand_out(self, flush: bool) -> list[Worker]:
        """Start processes if there is work for more, and give them items. Return the busy processes."""
        self.pool = [worker for worker in self.pool if not worker.connection.closed]
        for spec, waiting in self._waiting.items():
            workers = [worker for worker in self.pool if worker.spec == spec]
            limits = self._limits[spec]
            while len(workers) < min(limits.workers, len(waiting) + sum(len(w.jobs) for w in workers)):
                workers.append(Worker(spec, limits, self.kind, judge=self._judges.get(spec)))
                self.pool.append(workers[-1])
            for worker in workers:
                if worker.loaded:
                    self._hand(worker, waiting, flush)
        return [worker for worker in self.pool if not worker.loaded or worker.calls]

    def _at_once(self) -> dict[Any, Found]:
        """Return the results of items that need no process."""
        return {}

    def _hand(self, worker: Worker, waiting: deque[Job], flush: bool) -> None:
        """Give a process items from `waiting`, if it can work on more. flush: no further items will come."""
        raise NotImplementedError

    def _result(self, value: Any, failed: bool) -> Found:
        raise NotImplementedError
