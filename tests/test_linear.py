"""The linear layers that exchange tokens equal whole matrix products, forward and backward.

Here they exchange messages (see tests/ranks/linear.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(ranks: int, **variables: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [*torchrun, str(ROOT / "tests/ranks/linear.py")], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("linear holds") == ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_linear_layers_equal_whole_products(ranks: int) -> None:
    run(ranks, CUDA_VISIBLE_DEVICES="")
