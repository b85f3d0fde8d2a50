"""Ends a run in which no rank makes progress.

A rank is two processes: the rank itself, and its parent process, the watcher. The watcher forwards signals to the rank
and ends with its exit code. So this works with every launcher. The watcher also reads the rank's progress.

The watchers of a run write the status of their ranks to files in out/watchdog, which all nodes share. If a file no
longer changes, its node or watcher is lost. Of the ranks whose watchers are alive, the lowest is called the first rank.
Its watcher prints a warning when all ranks have stood still for half of the limit, and ends the run at the limit. The
other watchers follow its decision.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import linecache
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

from rlhf import progress
from rlhf.config import Watchdog
from rlhf.interrupt import HUNG, SIGNALS

PERIOD = 1.0  # seconds between two looks at the rank
SETTLE = 3.0  # seconds that the watchers have to exchange stacks before the report, and the decision after it
SAID = 15.0  # seconds after which a rank that still waits for the other ranks to connect says so
AFTER_SIGNAL = 10  # the limit is divided by this after a signal, because the run should end soon
KILLED = 5.0  # seconds to wait for a killed process; one that waits for a device may not end
STACK = 24  # lines of a stack
WAITED = {*SIGNALS, signal.SIGCHLD}
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
# In a line of this form a rank waits for other ranks, or for the device, which then waits for other ranks.
WAITS = re.compile(r"\.(wait|item|cpu|tolist|synchronize)\(")


@dataclass(slots=True)
class Status:
    """What a watcher tells the other watchers about its rank."""

    rank: int
    host: str
    count: int = 0  # rises with each writing of the status
    phases: int = 0
    text: str = ""
    still: float = 0.0  # seconds without progress
    slow: bool = False  # still for half of the limit
    late: bool = False  # still for the limit
    state: str = ""  # of the process, as in /proc: T is stopped, D waits for a device or storage, R computes
    stack: str = ""  # of the main thread, innermost call first
    ended: str = ""  # the decision of the first rank to end the run

    @property
    def waits(self) -> bool:
        """Whether the innermost call of the stack waits for other ranks."""
        found = re.match(r'\s*File "(.*?)", line (\d+)', self.stack)
        if not found:
            return False
        return "/torch/distributed/" in found[1] or bool(WAITS.search(linecache.getline(found[1], int(found[2]))))


@dataclass(slots=True)
class Seen:
    """The last status of another rank."""

    status: Status
    changes: int  # how often it has changed; 0: the file may be left from an earlier run
    at: float  # when it changed


class Exchange(Thread):
    """The files of all watchers. Storage may hang, so this is a thread."""

    def __init__(self, folder: Path, own: Status, world: int, interval: float):
        super().__init__(daemon=True)
        self.folder, self.own, self.world, self.interval = folder, own, world, interval
        self.hurried = False  # write every PERIOD, and read the other files, too
        self.seen: dict[int, Seen] = {}
        self.failed = ""

    def run(self) -> None:
        last = 0.0
        while self.world > 1:
            if self.hurried or time.monotonic() - last >= self.interval:
                last = time.monotonic()
                with suppress(OSError):  # without its files, the other ranks count as lost
                    self.write()
                    for rank in range(self.world) if self.hurried else ():
                        self.read(rank)
            time.sleep(PERIOD / 2)

    def write(self) -> None:
        self.own.count += 1
        path = self.path(self.own.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".partial")
        fresh.write_text(json.dumps(asdict(self.own)))
        fresh.replace(path)

    def read(self, rank: int) -> None:
        with suppress(FileNotFoundError, ValueError, TypeError):
            status, old = Status(**json.loads(self.path(rank).read_text())), self.seen.get(rank)
            if not old or status.count != old.status.count:
                self.seen[rank] = Seen(status, old.changes + 1 if old else 0, time.monotonic())

    def path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.json"

    def present(self) -> list[Status]:
        """Return the status of this rank and of all others whose watchers are alive, by rank."""
        alive = time.monotonic() - 3 * max(self.interval, PERIOD)
        others = [s.status for r, s in self.seen.items() if s.changes and s.at > alive and r != self.own.rank]
        return sorted([self.own, *others], key=lambda status: status.rank)

    def remove(self) -> None:
        for path in (self.path(self.own.rank), self.path(self.own.rank).with_suffix(".partial")):
            with suppress(OSError):
                path.unlink()
        for folder in (self.folder, self.folder.parent):
            with suppress(OSError):
                folder.rmdir()  # if it is empty


def supervised(keys: Watchdog, folder: Path, rank: int, world: int, place: str, call: Callable[[], int]) -> int:
    """Return call() in a child process, and its exit code, or HUNG, in this process, which watches it.

    folder: for the files of the watchers. place: where the ranks connect, for messages. With watchdog.timeout=0, call
    it in this process.
    """
    if not keys.timeout:
        return call()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED)  # the watcher receives them with sigtimedwait()
    stack, parent = os.memfd_create("stack"), os.getpid()
    if pid := os.fork():
        return Watcher(keys, Exchange(folder, Status(rank, socket.gethostname()), world, interval(keys)), place).watch(
            pid, stack
        )
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    faulthandler.register(signal.SIGUSR2, os.fdopen(stack, "wb"))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WAITED)
    return call()


def interval(keys: Watchdog) -> float:
    """Return the seconds between two files of a rank that makes progress."""
    return min(10.0, keys.timeout / 10)


class Watcher:
    """Watches the rank of this process."""

    def __init__(self, keys: Watchdog, exchange: Exchange, place: str):
        self.keys, self.exchange, self.place, self.own = keys, exchange, place, exchange.own
        self.position = progress.read()
        self.looked = time.monotonic()
        self.signalled = self.warned = self.asked = False

    def watch(self, pid: int, stack: int) -> int:
        """Watch the process until it ends. Return its exit code, or HUNG."""
        self.exchange.start()
        while True:
            came = signal.sigtimedwait(WAITED, PERIOD)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.exchange.remove()
                return mirrored(status)
            if came and came.si_signo in SIGNALS:
                os.kill(pid, came.si_signo)
                self.signalled = True
            self.look(pid, stack)
            if self.own.ended or any(status.ended for status in self.exchange.present()):
                return self.end(pid)

    @property
    def limit(self) -> float:
        limit = self.keys.timeout if self.position.begun else self.keys.start
        return limit / (AFTER_SIGNAL if self.signalled else 1)

    def look(self, pid: int, stack: int) -> None:
        """Update the status of the rank. Warn or decide if this is the first rank."""
        now, position, own = time.monotonic(), progress.read(), self.own
        # While this process itself is stopped (scontrol suspend), no time passes.
        own.still += min(now - self.looked, 2 * PERIOD)
        self.looked = now
        if position != self.position:
            self.position, own.still, own.stack = position, 0.0, ""
            self.warned = self.asked = False
        limit, meets = self.limit, position.text == progress.MEETING
        own.phases, own.text, own.state = position.phases, position.text, process_state(pid)
        own.slow, own.late = own.still >= limit / 2, own.still >= limit
        # The first rank must know the others before it decides. They may move while this rank waits for them.
        self.exchange.hurried = meets or own.still >= 0.3 * limit
        if own.late and own.state != "T":
            if not self.asked:
                self.asked = True
                os.kill(pid, signal.SIGUSR2)
            else:
                own.stack = main_thread(os.pread(stack, 1 << 20, 0).decode(errors="replace"))
        present = self.exchange.present()
        knows = meets or own.still >= 0.3 * limit + 3 * max(self.exchange.interval, PERIOD)
        if present[0] is not own or not knows:  # a living watcher has changed its file by then
            return
        lost = [rank for rank in range(self.exchange.world) if rank not in {status.rank for status in present}]
        if meets and own.still >= min(SAID, limit / 2) and not self.warned:
            self.warned = True
            print(awaited(self.place, self.exchange.world, lost, limit - own.still), file=sys.stderr, flush=True)
        elif own.still >= limit + SETTLE and all(status.late for status in present):
            print(report(present, lost, limit, self.position.begun), file=sys.stderr, flush=True)
            own.ended = "no progress"
        elif all(status.slow for status in present) and not self.warned:
            self.warned = True
            print(warning(present, lost, own.still, limit), file=sys.stderr, flush=True)

    def end(self, pid: int) -> int:
        """Kill the rank. Return HUNG."""
        if self.own.ended:
            time.sleep(SETTLE if self.exchange.world > 1 else 0)  # the others read the decision
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + KILLED
        while not os.waitpid(pid, os.WNOHANG)[0] and time.monotonic() < deadline:
            time.sleep(0.05)
        self.exchange.remove()
        return HUNG


def mirrored(status: int) -> int:
    """Return the exit code of a process. If a signal killed it, end this process by the same signal."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    return code if code >= 0 else 128 - code


def process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def main_thread(text: str) -> str:
    """Return the stack of the main thread, which faulthandler prints last."""
    return "\n".join(text.rpartition("(most recent call first):\n")[2].splitlines()[:STACK])


def suspects(present: list[Status]) -> dict[int, str]:
    """Return the ranks for which the others seem to wait, and the reason. Empty if no rank differs from the others."""
    most = max(status.phases for status in present)
    rules: tuple[tuple[str, Callable[[Status], bool]], ...] = (
        ("is stopped (SIGSTOP)", lambda status: status.state == "T"),
        ("has entered fewer phases", lambda status: status.phases < most),
        ("does not wait for other ranks", lambda status: bool(status.stack) and not status.waits),
    )
    for reason, rule in rules:
        found = {status.rank: reason for status in present if rule(status)}
        if found and (len(found) < len(present) or reason == rules[0][0]):
            return found
    return {}


def report(present: list[Status], lost: list[int], limit: float, begun: bool) -> str:
    """Return the text that a run prints when it is ended."""
    key = "watchdog.timeout" if begun else "watchdog.start"
    lines = [f"rlhf: no rank has made progress for {limit:.0f} s ({key}): ending the run with exit code {HUNG}"]
    lines += table(present, lost)
    odd = suspects(present)
    shown = [status for status in present if status.rank in odd and status.stack]
    shown = shown[:2] or [status for status in present if status.stack][:2]
    for status in shown:
        lines += [
            f"  rank {status.rank} is here (innermost call first):",
            *(f"  {s}" for s in status.stack.split("\n")),
        ]
    return "\n".join(lines)


def warning(present: list[Status], lost: list[int], still: float, limit: float) -> str:
    left = f"the run ends after {limit:.0f} s"
    return "\n".join([f"rlhf: no rank has made progress for {still:.0f} s; {left}:", *table(present, lost)])


def table(present: list[Status], lost: list[int]) -> list[str]:
    """Return a line for each rank that seems to be the cause, and one for the other ranks of each phase."""
    odd, lines = suspects(present), []
    rest: dict[str, list[Status]] = {}
    if lost:
        lines = [f"  {listed(lost)}: lost, because its process or its node does not answer"]
    for status in present:
        if status.rank in odd:
            where = f"rank {status.rank} on {status.host} {odd[status.rank]}"
            lines.append(f"  {where}; it stands in {status.text!r} for {status.still:.0f} s (state {status.state})")
        else:
            rest.setdefault(status.text, []).append(status)
    for text, held in rest.items():
        hosts = sorted({status.host for status in held})
        on = hosts[0] if len(hosts) == 1 else f"{len(hosts)} nodes"
        least = min(status.still for status in held)
        ranks = listed([status.rank for status in held])
        lines.append(f"  {ranks} on {on}: in {text!r} for {least:.0f} s")
    return lines


def awaited(place: str, world: int, lost: list[int], left: float) -> str:
    """Return the text that a rank prints while it waits for the other ranks to connect."""
    host, port = place.rsplit(":", 1)
    try:
        socket.getaddrinfo(host, port)
        problem = f"nothing is seen of {listed(lost)}" if lost else "all of them have started"
    except OSError as error:
        problem = f"MASTER_ADDR cannot be resolved on {socket.gethostname()}: {error.strerror}"
    where = f"MASTER_ADDR={host} MASTER_PORT={port}"
    return f"rlhf: waiting for all {world} ranks to connect to {where}: {problem}; the run ends in {left:.0f} s"


def listed(ranks: list[int]) -> str:
    """Return sorted ranks as text: "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(texts)}"
