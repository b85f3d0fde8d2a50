"""Calls of launch.sh, and of the programs in tests/ranks on one rank, with the interpreter of the tests."""

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The command line runs with the interpreter of these tests. Nothing is installed.
HERE = {**os.environ, "RLHF_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}


# The variables of a world of one rank.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def run_alone(program: str, *arguments: str, threads: int, timeout: float) -> str:
    """Run a program of tests/ranks as one rank, and return what it prints. The program must succeed."""
    environment = {**os.environ, **ALONE, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(ROOT / f"tests/ranks/{program}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


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
