"""The six algorithms: credit, losses at step zero, and every key that they read."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from streams import EXPECTED, FIXTURE, algorithm, means, responses

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.contracts import Batch, Output, Sample, scored
from rlhf.data.packing import pack
from rlhf.errors import UserError
from rlhf.train.optimizer import learning_rate


def outputs(batch: Batch, logp: list[float] | None = None, scores: list[float] | None = None) -> Output:
    """Return outputs with the same log-prob at every token of a sequence, and a score at its last token."""
    sequences = len(batch.group)
    each = torch.tensor([*(logp or [-1.0] * sequences), 0.0])[batch.segment]
    value = torch.tensor([*(scores or [0.0] * sequences), 0.0])[batch.segment] * batch.last
    return Output(logp=each, entropy=torch.zeros_like(each), value=value)


def reward_loss(
    samples: list[Sample], *overrides: str, scores: list[float], logp: list[float] | None = None
) -> dict[str, float]:
    rm = algorithm("reward", *overrides)
    batch = pack([scored(s) for s in samples])
    return means(rm.loss("reward", batch, outputs(batch, logp, scores)))


def dpo_loss(samples: list[Sample], *overrides: str, logp: list[float], ref: float = -1.0) -> dict[str, float]:
    batch = pack([replace(s, ref_logp=np.full(len(s.mask), ref, np.float32)) for s in samples])
    return means(algorithm("dpo", *overrides).loss("policy", batch, outputs(batch, logp)))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# Every mode


@pytest.mark.parametrize("mode", ALGORITHMS)
def test_empty_microbatch_has_no_weight(mode: str) -> None:
    """A rank without samples runs one masked row. It adds nothing, and still gives a gradient."""
    made = algorithm(mode, "rm.lm=1", "dpo.sft=1")
    for role in [role for role, use in made.models.items() if use == "train"]:
        batch = pack([], multiple=4)
        zeros = torch.zeros(4, requires_grad=True)
        loss = made.loss(role, batch, Output(logp=zeros, entropy=torch.zeros(4), value=zeros))
        loss.total.backward()
        assert loss.total.item() == 0.0
        assert loss.count.item() == 0.0
        assert zeros.grad.abs().sum() == 0.0


@pytest.mark.parametrize(
    ("mode", "overrides", "models", "streams"),
    [
        ("sft", [], {"policy": "train"}, ()),
        ("reward", [], {"reward": "train"}, ()),
        ("rlhf", [], {"policy": "train", "critic": "train", "reference": "frozen"}, ("old_logp", "values", "ref_logp")),
        ("rlhf", ["ppo.kl=0"], {"policy": "train", "critic": "train"}, ("old_logp", "values")),
        ("dpo", [], {"policy": "train", "reference": "frozen"}, ("ref_logp",)),
        ("online-dpo", ["dpo.reference=false"], {"policy": "train"}, ()),
        ("grpo", [], {"policy": "train", "reference": "frozen"}, ("old_logp", "ref_logp")),
        ("grpo", ["grpo.kl=0"], {"policy": "train"}, ("old_logp",)),
        ("grpo", ["batch.minibatches=1"], {"policy": "train", "reference": "frozen"}, ("ref_logp",)),
        (
            "grpo",
            ["batch.minibatches=1", "batch.epochs=2"],
            {"policy": "train", "reference": "frozen"},
            ("old_logp", "ref_logp"),
        ),
    ],
)
def test_models_and_streams(mode: str, overrides: list[str], models: dict[str, str], streams: tuple[str, ...]) -> None:
    """A run loads only models, and scores only streams, that a formula reads. The trained model comes first."""
    made = algorithm(mode, *overrides)
    assert list(made.models.items()) == list(models.items())
    assert made.streams == streams
    assert made.online == (mode in ("rlhf", "online-dpo", "grpo"))
    assert made.whole_groups == (mode in ("reward", "dpo", "online-dpo"))


@pytest.mark.parametrize(
    ("mode", "override", "wanted"),
    [
        ("rlhf", ["ppo.kl=0", "ppo.kl_target=6"], "ppo.kl_target"),
        ("rlhf", ["ppo.critic_warmup=8", "steps=8"], "ppo.critic_warmup=8 leaves no step of steps=8 for the policy"),
        ("rlhf", ["ppo.kl_horizon=102", "ppo.kl_target=6", "batch.prompts=64"], "above 102.4"),
        ("dpo", ["dpo.beta=0"], "dpo.beta=0"),
        ("dpo", ["dpo.smoothing=0.5"], "dpo.smoothing=0.5"),
        ("dpo", ["dpo.loss=ipo", "dpo.margin=1"], "dpo.margin=1"),
        ("online-dpo", ["rollout.group=1"], "rollout.group=1"),
        ("grpo", ["rollout.group=1"], "rollout.group=1"),
        ("grpo", ["grpo.overlong=shape"], "grpo.overlong_buffer=0"),
        ("grpo", ["grpo.kl_ratio=true", "grpo.kl=0"], "grpo.kl_ratio=true weights the KL, but grpo.kl=0"),
        ("grpo", ["grpo.mismatch_mode=token_mask"], "grpo.mismatch_mode=token_mask .* but grpo.mismatch_cap=0"),
        ("rlhf", ["ppo.mismatch_floor=0.5"], "mismatch_floor=0.5 need a cap, but ppo.mismatch_cap=0"),
        ("rlhf", ["ppo.mismatch_floor=5", "ppo.mismatch_cap=2"], "ppo.mismatch_floor=5 is above ppo.mismatch_cap=2"),
        ("grpo", ["grpo.overlong=shape", "grpo.overlong_buffer=9", "rollout.max_tokens=8"], "rollout.max_tokens=8"),
    ],
)
def test_keys_that_contradict_each_other(mode: str, override: list[str], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        algorithm(mode, *override)


# Reward


def test_reward_equals_published() -> None:
    pairs = FIXTURE["reward_pairs"]
    samples = [s for i in range(5) for s in responses([1.0, 0.0], i)]
    scores = [x for both in zip(pairs["chosen"], pairs["rejected"], strict=True) for x in both]
    found = reward_loss(samples, scores=scores)
    wanted = [
        EXPECTED["openrlhf"]["rm_pairwise"],
        EXPECTED["openrlhf"]["rm_logexp"],
        EXPECTED["nemo_rl"]["rm_pairwise"],
    ]
    assert wanted == pytest.approx([found["loss"]] * 3, abs=2e-6)
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["score"] == pytest.approx(np.mean(scores))


def test_reward_pairs_by_hand() -> None:
    """Four scored responses with one tie are five ordered pairs, also if another prompt's pair lies between them."""
    first, second = responses([3.0, 1.0, 1.0, 2.0], 0), responses([0.0, 1.0], 1)
    found = reward_loss([first[0], second[0], *first[1:], second[1]], scores=[4.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    gaps = [4, 4, 3, 1, 1, 0]  # 3 over 1, 1 and 2; 2 over 1 and 1; the last one is the other prompt, whose scores tie
    assert found["loss"] == pytest.approx(np.mean([softplus(-gap) for gap in gaps]), abs=1e-6)
    assert found["accuracy"] == pytest.approx(5.5 / 6)
    assert found["margin"] == pytest.approx(13 / 6)


def test_reward_keys() -> None:
    """The loss at step zero is ln 2.

    A margin grows with the difference of the given scores. The LM term is that of the best response of each pair.
    """
    samples = responses([3.0, 1.0], 0)
    assert reward_loss(samples, scores=[0.0, 0.0])["loss"] == pytest.approx(math.log(2))
    assert reward_loss(samples, "rm.margin=0.5", scores=[3.0, 0.0])["loss"] == pytest.approx(softplus(-2.0))
    three = responses([2.0, 3.0, 1.0], 0)  # three pairs
    found = reward_loss(three, "rm.lm=0.1", scores=[0.0] * 3, logp=[-5.0, -2.0, -7.0])
    assert found["lm_loss"] == pytest.approx(2.0)
    assert found["loss"] == pytest.approx(math.log(2) + 0.1 * 2.0)


def test_score_is_read_behind_the_last_token() -> None:
    """scored() appends one place, which holds the score. It is not a token of the LM term."""
    sample = scored(responses([1.0], 0)[0])
    assert sample.tokens[-1] == sample.tokens[-2]
    samples = responses([1.0, 0.0], 0)
    rm = algorithm("reward", "rm.lm=1")
    batch = pack([scored(s) for s in samples])
    logp = torch.where(batch.last > 0, -1000.0, -3.0)
    found = means(rm.loss("reward", batch, Output(logp=logp, value=torch.where(batch.last > 0, 1.0, 99.0))))
    assert found["lm_loss"] == pytest.approx(3.0)
    assert found["score"] == 1.0


@pytest.mark.parametrize(
    ("pad", "tokens", "seen", "mask"),
    [
        (None, [1, 5, 6, 2], [1, 5, 6, 2], [0, 1, 1]),
        (9, [1, 5, 6, 2], [1, 5, 6, 2], [0, 1, 1]),
        (2, [1, 5, 6, 2], [1, 5, 6], [0, 1]),
        (2, [1, 5, 2, 2], [1, 5], [0]),
        (2, [1, 2, 6, 2], [1, 2, 6], [0, 1]),
        (2, [1, 2, 2, 2], [1], []),
        (2, [2, 2, 2, 2], [2], []),
        (-1, [1, 5, 6, 2], [1, 5, 6, 2], [0, 1, 1]),
    ],
)
def test_score_is_read_at_the_last_token_that_is_not_pad(
    pad: int | None, tokens: list[int], seen: list[int], mask: list[int]
) -> None:
    sample = Sample(np.array(tokens, np.int32), np.array([False, True, True]), 0, old_logp=np.zeros(3, np.float32))
    found = scored(sample, pad)
    assert found.tokens.tolist() == [*seen, seen[-1]]
    assert found.mask.tolist() == [*mask, True]
    assert (found.tokens.dtype, found.mask.dtype, found.old_logp) == (np.int32, bool, None)


# DPO


def test_dpo_by_hand() -> None:
    """Two tokens each, with log-ratios 0.5 and -1 per token: h = 1 - (-2) = 3."""
    samples = responses([1.0, 0.0], 0)
    found = dpo_loss(samples, logp=[-0.5, -2.0])
    assert found["loss"] == pytest.approx(softplus(-0.3))
    assert found["margin"] == pytest.approx(0.3)
    assert found["chosen_reward"] == pytest.approx(0.1)
    assert found["rejected_reward"] == pytest.approx(-0.2)
    assert found["accuracy"] == 1.0


def test_dpo_step_zero() -> None:
    found = dpo_loss(responses([1.0, 0.0], 0), logp=[-1.0, -1.0])
    assert found["loss"] == pytest.approx(math.log(2))
    assert found["margin"] == 0.0
    assert found["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["dpo.beta=1"], softplus(-3.0)),
        (["dpo.smoothing=0.2"], softplus(-0.3) + 0.2 * 0.3),
        (["dpo.loss=ipo"], (3.0 - 5.0) ** 2),
        (["dpo.loss=ipo", "dpo.length_normalise=true"], (1.5 - 5.0) ** 2),
        (["dpo.margin=0.3"], math.log(2)),
        (["dpo.reference=false"], softplus(-0.1 * (-1.0 + 4.0))),
        (["dpo.sft=2"], softplus(-0.3) + 2 * 0.5),
        # SimPO: the mean log-probs -0.5 and -2 times beta, minus gamma
        (["dpo.reference=false", "dpo.length_normalise=true", "dpo.beta=2", "dpo.margin=1"], softplus(-(2 * 1.5 - 1))),
    ],
)
def test_dpo_keys(overrides: list[str], wanted: float) -> None:
    assert dpo_loss(responses([1.0, 0.0], 0), *overrides, logp=[-0.5, -2.0])["loss"] == pytest.approx(wanted, rel=1e-6)


def test_dpo_lengths() -> None:
    """With a sum over two and four tokens the lengths matter, and with a mean they do not.

    The SFT term is always a mean.
    """
    samples = responses([1.0], 0, length=4) + responses([0.0], 0, length=2)
    assert dpo_loss(samples, logp=[-0.5, -2.0])["loss"] == pytest.approx(softplus(-0.1 * (4 * 0.5 + 2)))
    found = dpo_loss(samples, "dpo.length_normalise=true", "dpo.sft=1", logp=[-0.5, -2.0])
    assert found["loss"] == pytest.approx(softplus(-0.1 * 1.5) + 0.5)
    assert found["sft_loss"] == pytest.approx(0.5)


def test_online_dpo_pairs() -> None:
    """Pairs are best against worst, or all ordered pairs.

    Ties and duplicates of a response give no pairs.
    """
    drawn = responses([1.0, 4.0, 2.0, 4.0], 0) + responses([5.0, 5.0], 1)
    copy = replace(drawn[1], reward=9.0)  # the same text, with another score
    kept, sums = algorithm("online-dpo").credit([*drawn, copy])
    assert kept == [drawn[1], drawn[0]]
    assert sums == {"tied": (1.0, 2.0), "lone": (0.0, 2.0), "reward_gap": (3.0, 2.0)}
    every, _ = algorithm("online-dpo", "dpo.pairs=all").credit([*drawn, copy])
    assert every == drawn[:4]
    found = dpo_loss(every, logp=[-1.0] * 4)
    assert found["loss"] == pytest.approx(math.log(2))
    batch = pack([replace(s, ref_logp=np.zeros(3, np.float32)) for s in every])
    assert algorithm("online-dpo").loss("policy", batch, outputs(batch)).count.item() == 5.0


def test_online_dpo_without_pairs() -> None:
    kept, sums = algorithm("online-dpo").credit(responses([2.0, 2.0], 0) + responses([3.0], 1))
    assert kept == []
    assert (sums["tied"], sums["lone"]) == ((2.0, 2.0), (1.0, 2.0))


def test_learning_rate() -> None:
    def rates(schedule: str) -> list[float]:
        optim = configuration.load(
            "sft", ["optim.lr=1", "optim.min_lr=0.1", "optim.warmup=2", f"optim.schedule={schedule}"]
        ).optim
        return [learning_rate(optim, update, 6) for update in range(6)]

    assert rates("constant") == pytest.approx([0.5, 1, 1, 1, 1, 1])
    assert rates("linear") == pytest.approx([0.5, 1, 1, 0.775, 0.55, 0.325])
    assert rates("cosine") == pytest.approx(
        [0.5, 1, 1, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 0.55, 0.1 + 0.9 * (2 - math.sqrt(2)) / 4]
    )
