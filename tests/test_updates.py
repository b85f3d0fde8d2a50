"""The effect of an update on weights, and resume from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from commands import run_ranks


def test_updates_and_resume(tmp_path: Path) -> None:
    """AdamW and clipping equal torch's.

    Resume is bitwise in both precisions, with and without the distributed optimizer.
    """
    assert "updates hold" in run_ranks(1, "tests/ranks/updates.py", str(tmp_path), "true", "false", timeout=300)
