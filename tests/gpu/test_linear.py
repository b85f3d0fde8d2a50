"""Sequence-parallel linear layers over symmetric memory, on two GPUs (see tests/ranks/linear.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_linear_layers_equal_one_product() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*torchrun, str(ROOT / "tests/ranks/linear.py")], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("linear holds") == 2
