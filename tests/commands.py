"""Calls of launch.sh with the interpreter of the tests."""

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The command line runs with the interpreter of these tests. Nothing is installed.
HERE = {**os.environ, "RLHF_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}


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
