"""The linear layers that exchange tokens write into each other's memory, on two GPUs that NVLink connects (see tests/ranks/linear.py)."""

from __future__ import annotations

import pytest
import torch
from test_linear import run


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_linear_layers_equal_whole_products() -> None:
    run(2)
