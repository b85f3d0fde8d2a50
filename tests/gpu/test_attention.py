"""The device's attention against the padded path: values and gradients of spans and of a batch.

Spans are tested with and without context parallelism.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import samples

from rlhf.contracts import Sample
from rlhf.data.packing import pack
from rlhf.model.attention import PackedRow, _even, _flash, _padded


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("window", [0, 1, 16])
def test_flash_equals_padded(cp: int, kv_heads: int, window: int) -> None:
    torch.manual_seed(0)
    for rank in range(cp):
        batch = pack(samples(12), cp=(rank, cp), multiple=8, device="cuda")
        total = len(batch.places) * cp
        row = PackedRow(spans=batch.spans, order=torch.arange(total) if cp > 1 else None)
        q = torch.randn(len(batch.places), 8, 64, device="cuda")
        k, v = (torch.randn(total, kv_heads, 64, device="cuda") for _ in range(2))
        check(_flash, [q, k, v], row, window)


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_even_equals_padded(kv_heads: int) -> None:
    torch.manual_seed(0)
    for length in (64, 200, 333):
        batch = pack(even(5, length), device="cuda")
        inputs = [torch.randn(5 * length, heads, 128, device="cuda") for heads in (8, kv_heads, kv_heads)]
        check(_even, inputs, PackedRow(spans=batch.spans))


def even(count: int, length: int) -> list[Sample]:
    return [Sample(np.arange(length + 1, dtype=np.int32), np.ones(length, bool), group=i) for i in range(count)]


def check(way: Callable[..., torch.Tensor], inputs: list[torch.Tensor], row: PackedRow, *window: int) -> None:
    found = [x.to(torch.bfloat16).requires_grad_() for x in inputs]
    wanted = [x.detach().float().requires_grad_() for x in found]
    upstream = torch.randn_like(inputs[0])
    a, b = way(*found, row, *window), _padded(*wanted, PackedRow(spans=row.spans, order=row.order), *window)
    torch.testing.assert_close(a.float(), b, atol=2e-2, rtol=2e-2)
    for x, y in zip(
        torch.autograd.grad(a, found, upstream.to(a.dtype)), torch.autograd.grad(b, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(x.float(), y, atol=6e-2, rtol=5e-2)
