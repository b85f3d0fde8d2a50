"""Offload and the ledger on a device (see tests/ranks/memory.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


def test_parking_and_ledger(tmp_path: Path) -> None:
    """Tenants return from host memory bitwise, and every phase's peak is within 10 % of the prediction."""
    config = json.loads((ROOT / "configs/models/llama2-7B/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | SHAPE))
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    environment = {**os.environ, **ranks, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "tests/ranks/memory.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "memory holds" in done.stdout
