"""Every formula against numbers that published implementations return on the same inputs, and against hand-made cases."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.algorithms.functional import clipped_surrogate, kl_k3, mean_loss
from rlhf.algorithms.grpo import GRPO
from rlhf.contracts import Batch, Output, Sample
from rlhf.data.packing import pack
from rlhf.train.optimizer import learning_rate

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "losses.json").read_text())
EXPECTED = FIXTURE["expected"]


@pytest.fixture(scope="module")
def batch() -> Batch:
    """The fixture's four sequences, packed."""
    streams = {name: np.array(rows) for name, rows in FIXTURE["streams"].items()}
    samples = []
    for i, mask in enumerate(streams["mask"].astype(bool)):
        length = int(mask.sum())
        named = {n: streams[n][i, :length].astype(np.float32) for n in ("old_logp", "ref_logp", "sampler_logp", "advantages")}
        samples.append(Sample(np.zeros(length + 1, np.int32), np.ones(length, bool), i, **named))
    return pack(samples, multiple=8)


def logp() -> torch.Tensor:
    rows, masks = FIXTURE["streams"]["logp"], FIXTURE["streams"]["mask"]
    flat = [x for row, mask in zip(rows, masks, strict=True) for x, m in zip(row, mask, strict=True) if m]
    return torch.tensor(flat + [0.0] * (-len(flat) % 8), dtype=torch.float32)


@pytest.mark.parametrize(
    ("high", "unit", "wanted"),
    [
        (0.2, "token", EXPECTED["verl"]["ppo_vanilla[token-mean]"]),
        (0.2, "sequence", EXPECTED["openrlhf"]["ppo[seq-mean-token-mean]"]),
        (0.28, "token", EXPECTED["slime"]["dapo_clip_higher[token-mean]"]),
    ],
)
def test_surrogate_equals_published(batch: Batch, high: float, unit: str, wanted: float) -> None:
    per_token, _ = clipped_surrogate(logp(), batch.streams["old_logp"], batch.streams["advantages"], 0.2, high)
    loss = mean_loss(per_token, batch, unit)
    assert (loss.total / loss.count).item() == pytest.approx(wanted, abs=2e-6)


def test_k3_equals_published(batch: Batch) -> None:
    loss = mean_loss(kl_k3(logp(), batch.streams["ref_logp"]), batch)
    assert (loss.total / loss.count).item() == pytest.approx(EXPECTED["openrlhf"]["kl[k3]"], abs=2e-6)


def test_surrogate_by_hand() -> None:
    """ratio 1.5: a good action is clipped to 1.2, a bad one is not; ratio 0.5: the other way round."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    loss, clipped = clipped_surrogate(ratio, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    assert clipped.tolist() == [1.0, 0.0, 0.0, 1.0]


def grpo_samples(rewards: list[float], group: int) -> list[Sample]:
    return [Sample(np.zeros(4, np.int32), np.array([False, True, True]), group, reward=r) for r in rewards]


def test_grpo_advantages() -> None:
    """Population standard deviation and 1e-6, as Megatron (whose epsilon is 1e-4); the prompt gets none; a tie teaches nothing."""
    grpo = GRPO(configuration.load("grpo", []))
    samples, _ = grpo.credit(grpo_samples([1.0, 0.0], 3) + grpo_samples([0.5, 0.5], 4) + grpo_samples([3.0, 1.0, 1.0, 1.0], 5))
    assert [s.advantages[-1] for s in samples[:2]] == pytest.approx([1.0, -1.0], abs=1e-5)
    assert EXPECTED["megatron_rl"]["grpo_adv"][:2] == pytest.approx([1.0, -1.0], abs=1e-3)
    assert [s.advantages[-1] for s in samples[2:4]] == [0.0, 0.0]
    assert [s.advantages[-1] for s in samples[4:]] == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, abs=1e-5)
    assert all(s.advantages[0] == 0.0 for s in samples)


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_step_zero(batch: Batch, mean: str) -> None:
    """Where policy, old policy and reference are one: ratio 1, nothing clipped, KL 0, loss minus the mean advantage."""
    grpo = GRPO(configuration.load("grpo", [f"grpo.mean={mean}"]))
    same = batch.streams["old_logp"]
    found = grpo.loss("policy", replace_streams(batch, ref_logp=same), Output(logp=same.clone(), entropy=torch.zeros_like(same)))
    values = {name: (s / n).item() for name, (s, n) in found.metrics.items()}
    assert values["kl"] == 0.0
    assert values["clipped"] == 0.0
    rows = [np.array(a)[np.array(m, bool)] for a, m in zip(FIXTURE["streams"]["advantages"], FIXTURE["streams"]["mask"], strict=True)]
    wanted = np.concatenate(rows).mean() if mean == "token" else np.mean([row.mean() for row in rows])
    assert values["loss"] == pytest.approx(-wanted, abs=1e-6)


def replace_streams(batch: Batch, **streams: torch.Tensor) -> Batch:
    import dataclasses

    return dataclasses.replace(batch, streams=batch.streams | streams)


def test_empty_microbatch_has_no_weight() -> None:
    """A rank with nothing left runs one masked row: it must add nothing, and still give a gradient path."""
    for mode in ALGORITHMS:
        algorithm = ALGORITHMS[mode](configuration.load(mode, []))
        batch = pack([], multiple=4)
        zeros = torch.zeros(4, requires_grad=True)
        batch.streams = dict.fromkeys(("old_logp", "ref_logp", "advantages"), torch.zeros(4))
        loss = algorithm.loss("policy", batch, Output(logp=zeros, entropy=torch.zeros(4)))
        loss.total.backward()
        assert loss.total.item() == 0.0
        assert loss.count.item() == 0.0
        assert zeros.grad.abs().sum() == 0.0


def test_learning_rate() -> None:
    def rates(schedule: str) -> list[float]:
        optim = configuration.load("sft", ["optim.lr=1", "optim.min_lr=0.1", "optim.warmup=2", f"optim.schedule={schedule}"]).optim
        return [learning_rate(optim, update, 6) for update in range(6)]

    assert rates("constant") == pytest.approx([0.5, 1, 1, 1, 1, 1])
    assert rates("linear") == pytest.approx([0.5, 1, 1, 0.775, 0.55, 0.325])
    assert rates("cosine") == pytest.approx([0.5, 1, 1, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 0.55, 0.1 + 0.9 * (2 - math.sqrt(2)) / 4])
