"""Offload moves memory and changes no result: runs with and without it are bitwise equal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import make

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("ranks", "layouts"), [(1, ["tp1-zero0", "tp1-zero1"]), (2, ["dp2-zero1", "dp2-zero0", "pp2"])]
)
def test_parking_is_bitwise(tmp_path: Path, ranks: int, layouts: list[str]) -> None:
    """Every phase, float32 and bfloat16, frozen and trained models, tied embeddings (see tests/ranks/parking.py)."""
    make("llama3-tied", tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(ROOT / "tests/ranks/parking.py"), str(tmp_path), *layouts]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("parking holds") == ranks
