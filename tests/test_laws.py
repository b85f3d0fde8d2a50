"""The models equal transformers at every layout: one launch per number of ranks, with all families."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run_ranks
from models import FAMILIES, make


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("laws")
    for family in FAMILIES:
        make(family, root / family)
    return root


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (1, ["tp1", "tp1-recomputefull:phi3"]),
        (
            2,
            [
                "tp2-sp1",
                "tp2-sp0-recomputeselective",
                "tp2-sp1-recomputefull:phi3",
                "tp2-sp1+megatron:phi3",
                "pp2",
                "cp2",
                "dp2-zero1",
                "dp2-zero0-recomputefull:phi3",
            ],
        ),
        (
            4,
            ["tp2-pp2-sp1", "tp2-cp2-sp1:phi3", "pp2-dp2:llama3-tied", "tp4:phi3"],
        ),  # tp4: more ranks than kv heads
    ],
    ids=lambda value: f"{value}ranks" if isinstance(value, int) else "",
)
def test_laws(folders: Path, ranks: int, layouts: list[str]) -> None:
    """Logits, log-probs, engine, gradients and export equal those of transformers (see tests/ranks/laws.py)."""
    assert run_ranks(ranks, "tests/ranks/laws.py", str(folders), *layouts).count("laws hold") == ranks
