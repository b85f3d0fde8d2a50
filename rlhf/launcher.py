"""The processes of one node: start a rank per device, pass signals on, leave nothing behind. As torchrun does, without torch."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from rlhf.interrupt import SAVED, SIGNALS
from rlhf.rewards.child import die_with_parent

GRACE = 10.0  # seconds that the others get to end by themselves after a rank has ended with one of TOLD
TOLD = (2, SAVED)  # exit codes of all ranks alike: a mistake, which the first rank tells, or a signal
WAITED = {*SIGNALS, signal.SIGCHLD}
PR_SET_CHILD_SUBREAPER = 36  # of Linux


def run(command: list[str], environments: list[Mapping[str, str]]) -> int:
    """Run command once per environment (with a RANK in it), each in a process group of its own, until all have ended.

    SIGNALS are passed on; SIGINT for the second time kills. After a failure the others are killed, as they wait for the one that is
    gone. Returns the exit code of the first that failed, 128 + signal if it was killed; 0 if none did.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the ranks leave behind becomes a child of this process
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED)  # they are waited for, not handled, so none can come at a bad moment
    ranks = [_start(command, environment) for environment in environments]
    code, deadline = 0, float("inf")
    seen: set[signal.Signals] = set()
    while running := [rank for rank in ranks if rank.poll() is None]:
        failed = [(index, rank.returncode) for index, rank in enumerate(ranks) if rank.returncode]
        if failed and not code:
            index, status = failed[0]
            code = _exit_code(status)
            deadline = time.monotonic() + GRACE * (code in TOLD)
            if code in TOLD:
                _signal(running, signal.SIGTERM)
            elif not seen:
                print(f"rlhf: rank {environments[index]['RANK']} ended with exit code {code}; ending the others", file=sys.stderr)
        if time.monotonic() >= deadline:
            _kill(running)
        _bury(ranks)
        came = signal.sigtimedwait(WAITED, 1.0)
        if came and came.si_signo in SIGNALS:
            number = signal.Signals(came.si_signo)
            if number == signal.SIGINT and number in seen:  # not SIGTERM, of which Slurm sends two when it preempts
                code = code or 128 + number
                _kill(running)
            seen.add(number)
            _signal(running, number)
    _kill(ranks)  # what they may have left in their groups
    _end_others()
    code = code or next((_exit_code(rank.returncode) for rank in ranks if rank.returncode), 0)
    if seen and code > 128 and environments[0]["RANK"] == "0":  # before the loop, or at once; what the loop does, rlhf.interrupt tells
        names = " and ".join(number.name for number in sorted(seen))
        print(f"rlhf: ended by {names}; nothing is saved but what was before", file=sys.stderr)
    return code


def _start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    end, _ = os.pipe()  # nothing is ever written: the other end closes with this process, and takes the rank along
    rank = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, process_group=0, pass_fds=(end,), preexec_fn=partial(_prepare, end)
    )
    os.close(end)
    return rank


def _prepare(lifeline: int) -> None:
    """In the child, before its program."""
    die_with_parent(lifeline)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WAITED)


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)


def _bury(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Take note of the end of others that have become children of this process; Popen does of a rank's."""
    ours = {rank.pid for rank in ranks}
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in ours:
            os.waitpid(ended.si_pid, 0)


def _end_others() -> None:
    """End what the ranks have left in sessions of their own, as a reward function may do."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")  # few kernels are made without it
    while left := listed.read_text().split() if listed.exists() else []:
        for pid in map(int, left):
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)  # its children are ours from here on


def _exit_code(status: int) -> int:
    return status if status >= 0 else 128 - status
