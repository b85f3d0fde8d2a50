"""Every fused kernel against the same operation in plain torch in float64.

Values and gradients are compared, in float32 and bfloat16. Without a GPU, Triton's interpreter runs the kernels:

    TRITON_INTERPRET=1 python -m pytest --noconftest tests/gpu/test_kernels.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.model import operations

kernels = pytest.importorskip("rlhf.model.kernels", reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {
    torch.float32: 5e-6,
    torch.bfloat16: 8e-3,
}  # relative norm of the difference; the interpreter truncates to bfloat16


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    gap = (found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
    assert gap < TOLERANCE[dtype], f"differs by {gap:.2g} of its norm"


def compare(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], constants: tuple = ()
) -> None:
    """Compare values and the gradients of all inputs, for a random gradient of the output."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    found, wanted = fused(*inputs, *constants), plain(*exact, *constants)
    close(found, wanted, inputs[0].dtype)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(wanted, exact, upstream.double())
    for x, a, b in zip(inputs, *gradients, strict=True):
        close(a, b, x.dtype)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(operations, "fusing", False)  # the references


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(8, 64), (3, 40), (1, 128)])
def test_rotate(dtype: torch.dtype, heads: int, width: int) -> None:
    angles = torch.randn(13, 1, width // 2, device=DEVICE) * 3
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    compare(
        kernels.Rotate.apply, operations.rotate, [torch.randn(13, heads, width, device=DEVICE, dtype=dtype)], tables
    )
    mixed = torch.randn(13, heads, 3 * width, device=DEVICE, dtype=dtype)
    part = mixed[:, :, width : 2 * width]  # like queries and keys in the output of linear_qkv
    close(kernels.Rotate.apply(part, *tables), operations.rotate(part.double(), *tables), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 1, 192), (3, 2, 2 * 1500)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(kernels.SwiGLU.apply, operations.swiglu, [torch.randn(shape, device=DEVICE, dtype=dtype) * 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 1, 64), (1100, 1, 96), (5, 3, 5000), (0, 1, 64)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not shape[0]:
        assert (
            kernels.RMSNorm.apply(torch.zeros(shape, device=DEVICE), torch.ones(64, device=DEVICE), 1e-5).shape == shape
        )
        return
    inputs = [torch.randn(shape, device=DEVICE, dtype=dtype), torch.randn(shape[-1], device=DEVICE, dtype=dtype)]
    compare(kernels.RMSNorm.apply, operations.rms_norm, inputs, (1e-3,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1 / 0.7])
@pytest.mark.parametrize(("width", "real"), [(64, 60), (9000, 8999), (64, 0)])
def test_logp(dtype: torch.dtype, scale: float, width: int, real: int) -> None:
    logits = torch.randn(11, width, device=DEVICE, dtype=dtype) * 5
    column = torch.randint(-width // 2, width, (11,), device=DEVICE)  # some are on other ranks, some in the padding
    found = kernels.softmax_sums(logits.clone(), column, real, scale)
    for a, b in zip(found, operations.softmax_sums(logits.double(), column, real, scale), strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-5, rtol=2e-5)
    lse, grad = torch.randn(11, device=DEVICE) + 20, torch.randn(11, device=DEVICE)
    slope = kernels.logp_slope(logits.clone(), column, lse, grad, real, scale)
    close(slope, operations.logp_slope(logits.double(), column, lse, grad, real, scale), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(operations, "fusing", True)
    total, left, right = (torch.randn(shape, device=DEVICE) for shape in ((48, 32), (24, 48), (24, 32)))
    left, right = left.to(dtype), right.to(dtype)
    wanted = total.double() + left.double().T @ right.double()
    operations.accumulate(total, left, right)
    gap = (total.double() - wanted).norm() / wanted.norm()
    assert gap < (2e-6 if DEVICE == "cuda" or dtype == torch.float32 else 3e-3), (
        "float32, not rounded to bfloat16 on the way"
    )


@pytest.mark.parametrize("count", [1, 5000])
def test_adamw(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(operations, "fused", lambda x: x.dtype == torch.float32)  # also for the interpreter
    p, *moments = (
        torch.randn(count, device=DEVICE),
        torch.zeros(count, device=DEVICE),
        torch.zeros(count, device=DEVICE),
    )
    exact = [t.double() for t in (p, *moments)]
    for step in range(1, 4):
        grad = torch.randn(count, device=DEVICE)
        hyper = (1e-2, (0.9, 0.95), 0.1, 0.1, 0.3)
        operations.adamw(p, grad, moments, step, *hyper)
        operations.adamw(exact[0], grad.double(), exact[1:], step, *hyper)
        for found, wanted in zip((p, *moments), exact, strict=True):
            close(found, wanted, torch.float32)
