"""The sampler over real engines: seeds, groups, stops, rewards, and samples that do not depend on the number of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task

ROOT = Path(__file__).parents[1]


def launch(folder: Path, ranks: int) -> str:
    """What was drawn."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "tests/ranks/sampling.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("drawn"))
    return line


def test_sampler_on_one_and_two_ranks(tmp_path: Path) -> None:
    """See tests/ranks/sampling.py; one engine and two draw the same."""
    demo_task.write(tmp_path, num_sft=300, num_rl=20, num_heldout=20)
    demo_task.make_model(tmp_path / "model", tmp_path)
    assert launch(tmp_path, 1) == launch(tmp_path, 2)
