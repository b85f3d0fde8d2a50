"""Gives one process at a time a lock on a file. On file systems without locks, it uses a lease that is renewed.

Needs no torch.
"""

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

from rlhf.errors import failure

PATIENCE = 5.0  # seconds to wait for a lock, because a killed process may take a moment to end
RENEWAL = 5.0  # seconds between two renewals of a lease
LEASE = 30.0  # seconds without a renewal after which a lease has expired
LENGTH = 256  # characters of a lease file; a host name has at most 64

_held: set[Path] = set()  # files that this process has locked


def claim(out: str, name: str) -> str:
    """Create the folder `out`, and lock its file NAME.lock. Return an error message, or "" on success."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        other = hold(folder / f"{name}.lock")
    except OSError as error:
        why = failure(error, folder) or error
        return f"out={folder} cannot be written: {why}; set out to a folder that has free space"
    return other and f"out={folder} is in use by {other}: wait until it ends, or set another out"


def hold(path: Path) -> str:
    """Lock the file until this process ends. Return "", or a description of the process that has locked it.

    Raises OSError if the file cannot be created.
    """
    if path.resolve() in _held:
        return ""
    if not (other := _hold(path)):
        _held.add(path.resolve())
    return other


def _hold(path: Path) -> str:
    mine = f"{socket.gethostname()} {os.getpid()} {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # stays open, because closing it would release the lock
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            # not lockf: its lock would end as soon as this process opens and closes the file again
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (EACCES, EAGAIN):  # the file system does not support locks
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
    """hold() for a file system without locks. The owner of the lease changes the file at regular intervals."""
    before = _read(path)
    deadline = time.monotonic() + LEASE
    while before and (now := _read(path)) == before and time.monotonic() < deadline:
        time.sleep(RENEWAL / 10)
    if before and now != before:
        return _holder(now)
    _write(path, mine)
    time.sleep(RENEWAL / 10)  # if several processes write at once, the last one gets the lease
    if not (now := _read(path)).startswith(mine):
        return _holder(now)
    Thread(target=_renew, args=(path, mine), daemon=True).start()
    return ""


def _renew(path: Path, mine: str) -> None:
    for beat in itertools.count():
        with suppress(OSError):  # storage may fail for a moment
            if not (now := _read(path)).startswith(mine):  # the lease expired while this process was stopped
                taken = f"{path} was taken by {_holder(now)} while this process was stopped"
                print(f"rlhf: {taken}; this process ends", file=sys.stderr, flush=True)
                os._exit(1)
            _write(path, f"{mine}{beat}\n")
        time.sleep(RENEWAL)


def _holder(mark: str) -> str:
    host, pid, day, hour, *_ = [*mark.split(), *4 * "?"]
    return f"process {pid} on {host}, since {day} {hour}"


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _write(path: Path, text: str) -> None:
    """Write in place, always the same length. So a reader never finds an empty file, and no temporary file is left."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(file, text.ljust(LENGTH).encode(), 0)
    finally:
        os.close(file)
