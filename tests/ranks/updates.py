"""Run on one rank: compare an update with torch's AdamW and clipping, and check resume.

usage: python tests/ranks/updates.py FOLDER ZERO ...

ZERO is parallel.zero. Each is run in float32 and bfloat16. FOLDER is for checkpoints.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import demo_task

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.checkpoint import Checkpoints
from rlhf.contracts import Sample
from rlhf.model import architecture
from rlhf.parallel.mesh import Mesh
from rlhf.train.learner import Learner

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 64,
    "architectures": ["Qwen2ForCausalLM"],
}  # a model with biases
LR, BETAS, EPS, DECAY = (
    0.03,
    (0.8, 0.6),
    0.01,
    0.4,
)  # a large eps: with a small one Adam hardly depends on the gradient's scale
KEYS = [f"optim.beta1={BETAS[0]}", f"optim.beta2={BETAS[1]}", f"optim.eps={EPS}", f"optim.weight_decay={DECAY}"]


class Case:
    """A small model of random weights at one layout and precision."""

    def __init__(self, folder: Path, mesh: Mesh, zero: str, dtype: torch.dtype):
        self.mesh, self.dtype, self.what = mesh, dtype, f"zero={zero} {dtype}"
        self.out, self.zero = folder / f"{zero}-{dtype}", zero
        (folder / "config.json").write_text(json.dumps({**demo_task.MODEL, **SIZES}))
        self.arch = architecture.read(folder)

    def learner(self, *overrides: str, seed: int = 1) -> Learner:
        config = configuration.load("sft", [*KEYS, f"parallel.zero={self.zero}", *overrides])

        def fill(parameters: dict[str, torch.Tensor]) -> None:
            source = torch.Generator().manual_seed(seed)
            for p in parameters.values():  # norms and biases too, so that weight decay of them would be visible
                p.copy_(torch.randn(p.shape, generator=source) * 0.2 + 0.5)

        return Learner(self.arch, config, self.mesh, self.dtype, fill=fill, temperature=1.0, train=True)

    def update(self, learner: Learner, scale: float, seed: int) -> tuple[float, dict[str, torch.Tensor]]:
        """Make one update from random gradients. Return the reported norm, and the gradients."""
        learner.model.zero_grad_buffer()
        learner.optimizer.zero_grad()
        source, gradients = torch.Generator().manual_seed(seed), {}
        for name, p in learner.decoder.named_parameters():
            gradients[name] = torch.randn(p.shape, generator=source) * scale
            p.main_grad.copy_(gradients[name])
        return learner.optimizer.step(LR), gradients

    def check_update(self, clip: float) -> None:
        """Compare with torch's clipping and AdamW, with weight decay for matrices only.

        Gradients are above and below the limit in turn.
        """
        learner = self.learner(f"optim.clip={clip}")
        wanted = {name: p.float().clone().requires_grad_() for name, p in learner.parameters().items()}
        groups = [
            {"params": [p for p in wanted.values() if (p.ndim > 1) == decays], "weight_decay": DECAY * decays}
            for decays in (1, 0)
        ]
        assert all(group["params"] for group in groups)
        reference, norms = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS), []
        for turn, scale in enumerate((0.01, 1e-4, 0.02)):
            norm, gradients = self.update(learner, scale, seed=turn)
            for name, gradient in gradients.items():
                wanted[name].grad = gradient
            told = torch.nn.utils.clip_grad_norm_(wanted.values(), clip or torch.inf)
            assert norm == pytest.approx(float(told), rel=1e-5), f"{self.what}: the norm is the one before clipping"
            norms.append(norm)
            reference.step()
            for name, p in learner.parameters().items():
                near = 2e-6 if self.dtype == torch.float32 else 2**-7
                gap = ((p.float() - wanted[name]).abs() / (1 + wanted[name].abs())).max()
                assert gap < near, f"{self.what}, clip {clip}: {name} differs by {gap:.3g} after {turn + 1} updates"
        assert not clip or min(norms) < clip < max(norms), norms

    def check_gradients_that_are_no_numbers(self) -> None:
        """Check that gradients that are not finite are reported, and change nothing."""
        learner = self.learner()
        before = {name: p.clone() for name, p in learner.parameters().items()}
        for scale in (torch.inf, torch.nan):
            with pytest.raises(FloatingPointError, match=r"the gradient norm is (inf|nan)"):
                self.update(learner, scale, seed=1)
        assert all(torch.equal(p, before[name]) for name, p in learner.parameters().items())

    def check_resume(self) -> None:
        """Check that a learner of other weights equals the saved one bitwise after resume().

        It also learns in the same way.
        """
        loss = partial(ALGORITHMS["sft"](configuration.load("sft", [])).loss, "policy")
        checkpoints = Checkpoints(configuration.load("sft", [f"out={self.out}"]), self.mesh, self.dtype)
        first, second = self.learner(), self.learner(seed=2)
        for _ in range(2):
            first.learn([samples()], loss, LR)
        checkpoints.save(2, {"policy": first}.items(), {"coefficient": 0.1})
        checkpoints.settle(wait=True)
        saved, random = snapshot(first), torch.get_rng_state()
        torch.rand(3)
        first.learn([samples()], loss, LR)
        assert not same(snapshot(first), saved)
        state: dict[str, float] = {}
        assert checkpoints.resume({"policy": second}.items(), state) == 2
        assert state == {"coefficient": 0.1}
        assert torch.equal(torch.get_rng_state(), random)
        assert same(snapshot(second), saved), f"{self.what}: not what was saved"
        second.learn([samples()], loss, LR)
        assert same(snapshot(second), snapshot(first)), f"{self.what}: it learns otherwise"


def samples() -> list[Sample]:
    rng = np.random.default_rng(3)
    return [Sample(rng.integers(0, 64, n + 1).astype(np.int32), np.arange(n) > 2, group=n) for n in (5, 17, 9)]


def snapshot(learner: Learner) -> list[torch.Tensor]:
    """Return copies of weights, main parameters, moments and numbers of updates."""
    state = learner.state()
    found = [*learner.parameters().values(), *(t for held in state.tensors.values() for t in held.values())]
    found += [inner.state[p]["step"] for inner in learner.optimizer.inner for p in inner.state]
    return [tensor.clone() for tensor in found]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b)) and len(a) == len(b)


def main() -> None:
    folder = Path(sys.argv[1])
    mesh = Mesh(configuration.load("sft", []).parallel, 1)
    for zero in sys.argv[2:]:
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(folder, mesh, zero, dtype)
            for clip in (0.0, 0.5):
                case.check_update(clip)
            case.check_gradients_that_are_no_numbers()
            case.check_resume()
    print("updates hold", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
