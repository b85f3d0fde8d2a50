"""The split of a step into rows and ranks does not change loss, count, metrics or gradient (in plain torch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from streams import algorithm
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.contracts import Algorithm, Batch, Output, Sample, scored
from rlhf.data.packing import pack

VOCAB = 11
CASES = [
    ("sft", []),
    ("reward", []),
    ("reward", ["rm.lm=0.5", "rm.margin=0.3"]),
    ("rlhf", []),
    ("dpo", ["dpo.sft=0.5"]),
    ("dpo", ["dpo.loss=ipo", "dpo.length_normalise=true"]),
    ("online-dpo", ["dpo.pairs=all"]),
    ("grpo", []),
    ("grpo", ["grpo.ratio=sequence", "grpo.clip_high=0.02"]),
    ("grpo", ["grpo.ratio=sequence", "grpo.mean=token"]),
    ("grpo", ["batch.minibatches=1", "grpo.mismatch_cap=1.1"]),
    ("grpo", ["grpo.mismatch_mode=sequence_mask", "grpo.mismatch_cap=1.2", "grpo.mismatch_floor=0.5"]),
    ("grpo", ["grpo.mismatch_mode=geometric_mask", "grpo.mismatch_cap=1.1", "grpo.kl_ratio=true"]),
    ("grpo", ["grpo.mean=constant", "grpo.objective=cispo", "grpo.mismatch_cap=1.1"]),
]


def drawn() -> list[Sample]:
    """Return four groups of one to four responses with very different lengths. One group ties."""
    rng, made = np.random.default_rng(5), []
    for group, rewards in enumerate(([1.0, 0.0], [0.5, 2.0, 0.5, -1.0], [1.0, 1.0], [3.0])):
        for reward in rewards:
            length = int(rng.integers(3, 20))
            mask = np.arange(length) >= rng.integers(0, length - 1)
            streams = {
                n: rng.normal(-1, 0.2, length).astype(np.float32)
                for n in ("old_logp", "ref_logp", "sampler_logp", "values")
            }
            made.append(
                Sample(rng.integers(0, VOCAB, length + 1).astype(np.int32), mask, group, reward=reward, **streams)
            )
    return made


def model(weights: Tensor, batch: Batch) -> Output:
    """A bigram model [3, VOCAB]: its output for a token depends only on this token and the one before."""
    logp = logsigmoid(weights[0, batch.labels] + weights[1, batch.inputs])
    return Output(logp=logp, entropy=-logp.exp() * logp, value=weights[2, batch.inputs] + 0.1 * batch.positions)


def on_two_ranks(samples: Sequence[Sample], found: Callable[[Batch], None]) -> None:
    """Call found(batch) for both slices of a row at once.

    cp_sum adds the tensor of the other thread, so gradients reach both, as with mesh.cp_sum.
    """
    slots: list[Tensor] = [torch.empty(0)] * 2
    barrier = Barrier(2, timeout=20)

    def rank(index: int) -> None:
        def cp_sum(x: Tensor) -> Tensor:
            slots[index] = x
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        found(pack(samples, cp=(index, 2), cp_sum=cp_sum))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(rank, range(2)))


def learn(made: Algorithm, role: str, rows: list[list[Sample]], ranks: int) -> dict[str, np.ndarray]:
    """Return gradient, metrics as (sum, count), and loss over all rows and ranks, summed as in the learner."""
    weights = (torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)) * 0.3).requires_grad_()
    losses = []
    for row in rows:

        def found(batch: Batch) -> None:
            losses.append(made.loss(role, batch, model(weights, batch)))

        if ranks == 2:
            on_two_ranks(row, found)
        else:
            found(pack(row, multiple=4))
    total, count = sum(loss.total for loss in losses), sum(loss.count for loss in losses)
    assert all(loss.count == loss.count.round() for loss in losses), "megatron-core counts in integers"
    (total / count).backward()
    sums = {name: sum(torch.stack(loss.metrics[name]) for loss in losses).numpy() for name in losses[0].metrics}
    return {
        "gradient": weights.grad.numpy(),
        "loss": np.array([total.item(), count.item()]),
        **{f"metric {n}": x for n, x in sums.items()},
    }


@pytest.mark.parametrize(
    ("mode", "overrides"), CASES, ids=lambda case: case if isinstance(case, str) else " ".join(case)
)
def test_splits(mode: str, overrides: list[str]) -> None:
    """The splits: one row, one row per group, an additional row of padding, one row per sample, and two CP ranks."""
    made = algorithm(mode, "rollout.max_tokens=20", *overrides)
    samples, _ = made.credit(drawn())
    if "reward" in made.models:
        samples = [scored(s) for s in samples]
    groups = [[s for s in samples if s.group == g] for g in sorted({s.group for s in samples})]
    splits = {
        "groups": (groups, 1),
        "two ranks": ([samples], 2),
        "groups on two ranks, and an empty row": ([*groups[::-1], []], 2),
    }
    if not made.whole_groups:
        splits["samples"] = ([[s] for s in samples], 1)
    for role in [role for role, use in made.models.items() if use == "train"]:
        wanted = learn(made, role, [samples], 1)
        assert np.abs(wanted["gradient"]).max() > 1e-3
        for name, (rows, ranks) in splits.items():
            found = learn(made, role, rows, ranks)
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert found[key] == pytest.approx(value, abs=2e-6, rel=2e-5), f"{role}, {name}: {key}"
