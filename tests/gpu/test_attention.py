"""Flash attention over spans against the padded path, on the device: values and gradients, with and without context parallelism."""

from __future__ import annotations

import pytest
import torch
from models import samples

from rlhf.data.packing import pack
from rlhf.model.attention import PackedRow, _flash, _padded


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_flash_equals_padded(cp: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    for rank in range(cp):
        batch = pack(samples(12), cp=(rank, cp), multiple=8, device="cuda")
        total = len(batch.places) * cp
        row = PackedRow(spans=batch.spans, order=torch.arange(total) if cp > 1 else None)
        q = torch.randn(len(batch.places), 8, 64, device="cuda")
        k, v = (torch.randn(total, kv_heads, 64, device="cuda") for _ in range(2))
        found = [x.to(torch.bfloat16).requires_grad_() for x in (q, k, v)]
        wanted = [x.detach().float().requires_grad_() for x in found]
        upstream = torch.randn_like(q)
        a, b = _flash(*found, row), _padded(*wanted, PackedRow(spans=batch.spans, order=row.order))
        torch.testing.assert_close(a.float(), b, atol=2e-2, rtol=2e-2)
        for x, y in zip(torch.autograd.grad(a, found, upstream.to(a.dtype)), torch.autograd.grad(b, wanted, upstream), strict=True):
            torch.testing.assert_close(x.float(), y, atol=6e-2, rtol=5e-2)
