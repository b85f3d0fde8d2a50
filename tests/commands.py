"""Calls of launch.sh, and of programs on several ranks, with the interpreter of the tests."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf.cluster import free_port

ROOT = Path(__file__).parents[1]
# The command line runs with the interpreter of these tests. Nothing is installed.
HERE = {**os.environ, "RLHF_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}


def run_ranks(
    ranks: int, program: str, *arguments: str, threads: int = 1, timeout: float = 900, **variables: str
) -> str:
    """Run a program, such as tests/ranks/laws.py, once per rank, and return what all ranks print. All must succeed.

    torchrun would do the same, but it takes seconds to import torch first.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), **variables}
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        running = [
            subprocess.Popen(
                [sys.executable, program, *arguments],
                cwd=ROOT,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=printed,
                stderr=errors,
            )
            for rank in range(ranks)
        ]
        try:
            codes = wait_for_all(running, timeout)
        finally:
            for process in running:
                process.kill()
                process.wait()
        printed.seek(0)
        errors.seek(0)
        assert not any(codes), f"exit codes {codes}:\n{errors.read()[-6000:]}"
        return printed.read()


def wait_for_all(running: list[subprocess.Popen], timeout: float) -> list[int | None]:
    """Return the exit codes when all processes have ended, or one has failed. None: it has not ended."""
    end = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in running]
        if None not in codes or any(codes):
            return codes
        assert time.monotonic() < end, f"exit codes {codes} after {timeout} s"
        time.sleep(0.05)


def launch(*arguments: str, root: Path = ROOT, env: dict[str, str] = HERE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(root / "launch.sh"), *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=300
    )


def seconds(*arguments: str, root: Path = ROOT, env: dict[str, str] = HERE) -> float:
    """Return the processor seconds of the fastest of three calls. Other work of the machine does not count."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        launch(*arguments, root=root, env=env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)
