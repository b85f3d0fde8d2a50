"""One process at a time holds a file: by a lock or, where the file system has none, by a lease that is renewed. Needs no torch."""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import sys
import time
from contextlib import suppress
from errno import EACCES, EAGAIN
from pathlib import Path
from threading import Thread

PATIENCE = 5.0  # seconds that a lock is waited for: the process that has it may have been killed, and still be ending
RENEWAL = 5.0  # seconds between two renewals of a lease
LEASE = 30.0  # seconds without one after which the process that had it counts as dead
LENGTH = 256  # characters of the file of a lease: a host's name has at most 64

_held: set[Path] = set()  # by this process


def hold(path: Path) -> str:
    """Hold the file until this process ends, however it ends. Empty, or who else holds it. Raises OSError where there can be no file."""
    if path.resolve() in _held:
        return ""
    if not (other := _hold(path)):
        _held.add(path.resolve())
    return other


def _hold(path: Path) -> str:
    mine = f"{socket.gethostname()} {os.getpid()} {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # stays open, as the lock ends with it
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf's would end when this process reads the file and closes it
        except OSError as error:
            if error.errno not in (EACCES, EAGAIN):  # this file system has no locks
                os.close(file)
                return _lease(path, mine)
            if time.monotonic() > deadline:
                return _holder(_read(path))
            time.sleep(0.1)
        else:
            os.ftruncate(file, 0)
            os.pwrite(file, mine.encode(), 0)
            return ""


def _lease(path: Path, mine: str) -> str:
    """hold(), without locks: a process that lives changes the file."""
    before = _read(path)
    deadline = time.monotonic() + LEASE
    while before and (now := _read(path)) == before and time.monotonic() < deadline:
        time.sleep(RENEWAL / 10)
    if before and now != before:
        return _holder(now)
    _write(path, mine)
    time.sleep(RENEWAL / 10)  # of several that came at once, the last one that wrote has it
    if not (now := _read(path)).startswith(mine):
        return _holder(now)
    Thread(target=_renew, args=(path, mine), daemon=True).start()
    return ""


def _renew(path: Path, mine: str) -> None:
    for beat in itertools.count():
        with suppress(OSError):  # of a storage that fails for a moment
            if not (now := _read(path)).startswith(mine):  # this process was stopped for so long that another one has taken the file
                print(f"rlhf: {path} was taken by {_holder(now)} while this process was stopped; it ends", file=sys.stderr, flush=True)
                os._exit(1)
            _write(path, f"{mine}{beat}\n")
        time.sleep(RENEWAL)


def _holder(mark: str) -> str:
    host, pid, day, hour, *_ = [*mark.split(), *4 * "?"]
    return f"process {pid} on {host}, since {day} {hour}"


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _write(path: Path, text: str) -> None:
    """In place and at one length: a reader never finds an empty file, and a kill leaves no second one."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(file, text.ljust(LENGTH).encode(), 0)
    finally:
        os.close(file)
