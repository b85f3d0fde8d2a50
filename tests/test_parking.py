"""Offload moves memory and changes no result: runs with and without it are bitwise equal."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run_ranks
from models import make


@pytest.mark.parametrize(
    ("ranks", "layouts"), [(1, ["tp1-zero0", "tp1-zero1"]), (2, ["dp2-zero1", "dp2-zero0", "pp2"])]
)
def test_parking_is_bitwise(tmp_path: Path, ranks: int, layouts: list[str]) -> None:
    """Every phase, float32 and bfloat16, frozen and trained models, tied embeddings (see tests/ranks/parking.py)."""
    make("llama3-tied", tmp_path)
    assert run_ranks(ranks, "tests/ranks/parking.py", str(tmp_path), *layouts).count("parking holds") == ranks
