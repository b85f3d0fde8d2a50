"""tools/torture.py: a run that is broken repeatedly ends like an undisturbed run.

docs/faults.md has a long one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ["SIGSTOP, SIGCONT", "SIGKILL one rank, a file event", "damage: a bit", "SIGTERM"]


def test_a_broken_run_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/torture.py",
        str(tmp_path / "torture"),
        "--kills",
        "4",
        "--seed",
        "9",
        "--kinds",
        *KINDS,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["survived"] == told["of"] == 4
    assert {name.partition(": ")[0] for name in told["happened"]}
    assert all(f"| {kind} | 1 | 1 |" in done.stdout for kind in KINDS)
