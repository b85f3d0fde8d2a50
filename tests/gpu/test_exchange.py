"""The linear layers that exchange tokens write into each other's memory, on GPUs with NVLink.

See tests/ranks/linear.py.
"""

from __future__ import annotations

import pytest
import torch
from test_linear import run


@pytest.mark.parametrize("ranks", [2, 4])
def test_linear_layers_equal_whole_products(ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    run(ranks)
