"""Starts and supervises the ranks of one node, as torchrun does, but without torch.

It forwards signals to the ranks, and at the end it kills all processes that they have left.
"""

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

from rlhf.interrupt import HUNG, SAVED, SIGNALS, srun_reports
from rlhf.rewards.child import die_with_parent

GRACE = 10.0  # seconds that the other ranks have to end by themselves, after a signal or a code in TOLD
TOLD = (2, SAVED, HUNG)  # exit codes that all ranks of a run share: a user's mistake, a signal, or no progress
WAITED = {*SIGNALS, signal.SIGCHLD}
PR_SET_CHILD_SUBREAPER = 36  # from Linux's prctl.h


def run(command: list[str], environments: list[Mapping[str, str]]) -> int:
    """Run command once per environment (which must have RANK), each in its own process group, until all have ended.

    SIGNALS are forwarded. A second SIGINT kills the ranks. After a failure the other ranks are killed, because they
    would wait for the failed rank. Return the exit code of the first rank that failed (128 + signal if a signal killed
    it), or 0.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the ranks become children of this process
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED)  # the loop receives them with sigtimedwait(), without handlers
    ranks = [_start(command, environment) for environment in environments]
    code, deadline = 0, float("inf")
    seen: set[signal.Signals] = set()
    while running := [rank for rank in ranks if rank.poll() is None]:
        failed = [(index, rank.returncode) for index, rank in enumerate(ranks) if rank.returncode]
        if failed and not code:
            index, status = failed[0]
            code = _exit_code(status)
            alike = code in TOLD or bool(seen)  # the other ranks end in the same way, but may need a moment
            deadline = time.monotonic() + GRACE * alike
            if alike:
                _signal(running, signal.SIGTERM)
            else:
                rank = environments[index]["RANK"]
                print(f"rlhf: rank {rank} ended with exit code {code}; ending the other ranks", file=sys.stderr)
        if time.monotonic() >= deadline:
            _kill(running)
        _bury(ranks)
        came = signal.sigtimedwait(WAITED, 1.0)
        if came and came.si_signo in SIGNALS:
            number = signal.Signals(came.si_signo)
            if number == signal.SIGINT and number in seen:  # not SIGTERM: Slurm sends two when it preempts a job
                code = code or 128 + number
                _kill(running)
            seen.add(number)
            _signal(running, number)
    _kill(ranks)  # processes that are left in the ranks' process groups
    _end_others()
    code = code or next((_exit_code(rank.returncode) for rank in ranks if rank.returncode), 0)
    # The ranks were killed before or without saving. When they finish a step and save it, rlhf.interrupt prints that.
    told = [number for number in sorted(seen) if not srun_reports(number, environments[0])]
    if told and code > 128 and environments[0]["RANK"] == "0":
        names = " and ".join(number.name for number in told)
        print(f"rlhf: ended by {names}; nothing new is saved", file=sys.stderr)
    return code


def _start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    end, _ = os.pipe()  # nothing is written to it: when this process ends, the other end closes, and the rank ends too
    rank = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        process_group=0,
        pass_fds=(end,),
        preexec_fn=partial(_prepare, end),
    )
    os.close(end)
    return rank


def _prepare(lifeline: int) -> None:
    """Run in the child process before its program starts."""
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
    """Reap orphans of the ranks, which have become children of this process. Popen reaps the ranks themselves."""
    ours = {rank.pid for rank in ranks}
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in ours:
            os.waitpid(ended.si_pid, 0)


def _end_others() -> None:
    """Kill processes that the ranks have left in other sessions. A reward function may start such processes."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")  # a few kernels are built without this file
    while left := listed.read_text().split() if listed.exists() else []:
        for pid in map(int, left):
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)  # its children now become children of this process


def _exit_code(status: int) -> int:
    return status if status >= 0 else 128 - status
