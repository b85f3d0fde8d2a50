"""No loss makes the host wait for the device, forward or backward: torch would raise an error."""

from __future__ import annotations

import pytest
import torch
from streams import algorithm
from test_splits import CASES, VOCAB, drawn, model

from rlhf.data.packing import pack


@pytest.mark.parametrize(
    ("mode", "overrides"), CASES, ids=lambda case: case if isinstance(case, str) else " ".join(case)
)
def test_losses_never_wait(mode: str, overrides: list[str]) -> None:
    made = algorithm(mode, "rollout.max_tokens=20", *overrides)
    samples, _ = made.credit(drawn())
    weights = torch.randn(3, VOCAB, device="cuda").requires_grad_()
    for role in [role for role, use in made.models.items() if use == "train"]:
        for waiting in ("default", "error"):  # the first call loads the kernels
            torch.cuda.set_sync_debug_mode(waiting)
            try:
                batch = pack(samples, multiple=4, device="cuda")
                torch.autograd.grad(made.loss(role, batch, model(weights, batch)).total, weights)
            finally:
                torch.cuda.set_sync_debug_mode("default")
