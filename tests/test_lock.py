"""One process holds a file, with locks and on a file system without locks.

A living holder is named, and a dead one does not block others.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import errno, fcntl, os, sys, time
from pathlib import Path
from rlhf import lock
lock.PATIENCE, lock.RENEWAL, lock.LEASE = 0.5, 0.2, 1.2
if sys.argv[2] == "lease":
    def flock(*_): raise OSError(errno.ENOSYS, "Function not implemented")
    fcntl.flock = flock
print(lock.hold(Path(sys.argv[1])) or "held", flush=True)
sys.stdin.read()
"""


def start(path: Path, kind: str) -> subprocess.Popen[str]:
    """Start a process that prints whether it holds the file, and ends when its standard input is closed."""
    command = [sys.executable, "-c", PROGRAM, str(path), kind]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


@pytest.mark.parametrize("kind", ["lock", "lease"])
def test_one_holds_it_until_it_ends(tmp_path: Path, kind: str) -> None:
    """Other processes get the name of the holder.

    After it has ended or was killed, another process can hold the file.
    """
    path = tmp_path / "run.lock"
    first = start(path, kind)
    assert said(first) == "held"
    second = start(path, kind)
    who = rf"process {first.pid} on {re.escape(os.uname().nodename)}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(who, said(second)), who
    first.kill()
    third = start(path, kind)
    assert said(third) == "held"
    third.communicate("", timeout=5)
    fourth = start(path, kind)
    assert said(fourth) == "held"
    for process in (first, second, fourth):
        process.communicate("", timeout=5)
    assert [file.name for file in tmp_path.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("kind", ["lock", "lease"])
def test_of_several_that_come_at_once_one_has_it(tmp_path: Path, kind: str) -> None:
    processes = [start(tmp_path / "run.lock", kind) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(said, processes))
    assert answers.count("held") == 1, answers
    for process in processes:
        process.communicate("", timeout=5)


def test_a_run_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    """This happens when Slurm starts a requeued job at once."""
    first = start(tmp_path / "run.lock", "lock")
    assert said(first) == "held"
    second = start(tmp_path / "run.lock", "lock")
    time.sleep(0.2)
    first.kill()
    assert said(second) == "held"
    for process in (first, second):
        process.communicate("", timeout=5)


def test_a_process_that_was_stopped_for_long_does_not_go_on(tmp_path: Path) -> None:
    """Another process has taken its lease in the meantime, and writes into the folder."""
    first = start(tmp_path / "run.lock", "lease")
    assert said(first) == "held"
    first.send_signal(signal.SIGSTOP)
    second = start(tmp_path / "run.lock", "lease")
    assert said(second) == "held"
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=5) == 1
    assert f"was taken by process {second.pid}" in first.stderr.read()
    assert second.poll() is None
    second.communicate("", timeout=5)


def test_where_there_can_be_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _, errors = start(tmp_path / "file/run.lock", "lock").communicate("", timeout=5)
    assert errors.splitlines()[-1].startswith("NotADirectoryError")
