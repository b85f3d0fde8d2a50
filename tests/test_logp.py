"""Chunked, vocabulary-parallel log-probs: values, gradients and memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlhf.model import logp as module
from rlhf.model.logp import token_logp


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> dist.ProcessGroup:
    if not dist.is_initialized():  # an earlier test may have initialized it, and some engines never destroy it
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/store", rank=0, world_size=1
        )
    return dist.group.WORLD


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 64 * 5)  # chunks of 5 tokens, the last one is shorter
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    labels, upstream = torch.randint(0, 60, (23,)), torch.randn(23)
    reference = (hidden @ weight[:60].T / temperature).log_softmax(-1)
    wanted = reference.gather(1, labels[:, None])[:, 0]
    wanted_gradients = torch.autograd.grad(wanted, (hidden, weight), upstream)
    found, entropy = token_logp(
        hidden, weight, labels, vocab=60, temperature=temperature, group=group, sequence_parallel=False
    )
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(entropy, -(reference.exp() * reference).sum(-1), atol=2e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(found, (hidden, weight), upstream), wanted_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert not entropy.requires_grad


def test_memory_does_not_grow_with_tokens() -> None:
    """Forward and backward of 8k tokens with a vocabulary of 128k take at most 1.5 GB beyond the gradients.

    Whole logits would need 4.2 GB in float32.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) < 1.5


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure() -> None:
    torch.set_num_threads(2)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29733", rank=0, world_size=1)
    hidden, weight = torch.randn(8192, 32, requires_grad=True), torch.randn(128 * 1024, 32, requires_grad=True)
    labels = torch.randint(0, 128 * 1024, (8192,))
    gradients = torch.zeros_like(hidden), torch.zeros_like(weight)
    before = peak_gib()
    logp, _ = token_logp(
        hidden, weight, labels, vocab=128 * 1024, temperature=1.0, group=dist.group.WORLD, sequence_parallel=False
    )
    gradients = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in gradients)
    print("extra GiB", peak_gib() - before)


if __name__ == "__main__":
    measure()
