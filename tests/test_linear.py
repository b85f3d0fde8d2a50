"""The linear layers that exchange tokens equal whole matrix products, forward and backward.

Here they exchange messages (see tests/ranks/linear.py).
"""

from __future__ import annotations

import pytest
from commands import run_ranks


def run(ranks: int, **variables: str) -> None:
    printed = run_ranks(ranks, "tests/ranks/linear.py", timeout=200, **variables)
    assert printed.count("linear holds") == ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_linear_layers_equal_whole_products(ranks: int) -> None:
    run(ranks, CUDA_VISIBLE_DEVICES="")
