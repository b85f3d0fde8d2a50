"""GRPO: advantages from rewards, the loss at step zero, and every key that it reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from streams import algorithm, mean, means, packed, responses, rows, said

from rlhf.contracts import Output, Sample, differ
from rlhf.data.packing import pack
from rlhf.errors import UserError


def advantages(samples: list[Sample], *overrides: str) -> list[float]:
    return [float(s.advantages[-1]) for s in algorithm("grpo", *overrides).credit(samples)[0]]


def test_grpo_advantages() -> None:
    """Prompt tokens have no advantage. A tie gives none either."""
    samples = responses([1.0, 0.0], 3) + responses([0.5, 0.5], 4) + responses([3.0, 1.0, 1.0, 1.0], 5)
    credited, sums = algorithm("grpo").credit(samples)
    wanted = [1.0, -1.0, 0.0, 0.0, math.sqrt(3)] + [-1 / math.sqrt(3)] * 3
    assert [s.advantages[-1] for s in credited] == pytest.approx(wanted, abs=1e-5)
    assert all(s.advantages[0] == 0.0 for s in credited)
    assert sums == {"silent": (1.0, 3.0), "lone": (0.0, 3.0)}


@pytest.mark.parametrize("kind", ["std", "none", "leave_one_out", "global"])
def test_grpo_of_a_response_alone(kind: str) -> None:
    """Failures have left no other response in its group. It is not learned, also not by the KL."""
    grpo = algorithm("grpo", f"grpo.advantage={kind}")
    alone, group = responses([5.0], 1), responses([3.0, 1.0], 2)
    learned, sums = grpo.credit([*alone, *group])
    assert learned == group
    assert sums == {"silent": (1.0, 2.0), "lone": (1.0, 2.0)}
    wanted, _ = grpo.credit(responses([3.0, 1.0], 2))
    assert [s.advantages.tolist() for s in learned] == [s.advantages.tolist() for s in wanted]


def test_grpo_advantage_kinds() -> None:
    def found(kind: str) -> list[float]:
        return advantages(responses([3.0, 1.0, 1.0, 1.0], 0) + responses([0.0, 2.0], 1), f"grpo.advantage={kind}")

    centred = np.array([1.5, -0.5, -0.5, -0.5, -1.0, 1.0])
    assert found("none") == pytest.approx(centred)
    assert found("leave_one_out") == pytest.approx([2.0, -2 / 3, -2 / 3, -2 / 3, -2.0, 2.0])
    assert found("global") == pytest.approx(centred / centred.std(), abs=1e-6)


def test_grpo_overlong() -> None:
    """The last 4 of 10 tokens are the buffer.

    A response of 6 tokens has no penalty, one of 8 tokens has a half, one of 10 has 1. A cut response has 1 at any
    length.
    """
    limit = ["rollout.max_tokens=10", "grpo.advantage=none"]

    def drawn() -> list[Sample]:
        cut = responses([1.0], 0, length=5, truncated=True)
        return [s for length in (6, 8, 10) for s in responses([1.0], 0, length)] + cut

    assert advantages(drawn(), *limit) == [0.0] * 4
    shaped = advantages(drawn(), *limit, "grpo.overlong=shape", "grpo.overlong_buffer=4")
    assert shaped == pytest.approx([0.625, 0.125, -0.375, -0.375])
    wider = advantages(drawn(), *limit, "grpo.overlong=shape", "grpo.overlong_buffer=8")
    assert wider == pytest.approx([0.3125, 0.0625, -0.1875, -0.1875])
    answered = drawn()
    answered[1].mask[3:5] = False  # tokens of an environment count
    assert advantages(answered, *limit, "grpo.overlong=shape", "grpo.overlong_buffer=4") == shaped
    samples = drawn()
    samples[3].reward = 5.0
    assert (
        advantages(samples, *limit, "grpo.overlong=mask") == [-1.0] * 3
    )  # it is no longer learned, but still part of the mean of 2
    learned, _ = algorithm("grpo", *limit[:1], "grpo.overlong=mask", "grpo.advantage=global").credit(
        samples + responses([0.0, 2.0], 1)
    )
    assert len(learned) == 5
    assert not any(s.truncated for s in learned)
    whitened = np.concatenate([s.advantages[s.mask] for s in learned])  # of the learned tokens only
    assert (whitened.mean(), whitened.std()) == pytest.approx((0.0, 1.0), abs=1e-6)


@pytest.mark.parametrize("unit", ["token", "sequence", "constant"])
def test_grpo_step_zero(unit: str) -> None:
    """Policy, old policy and reference are equal:

    ratio 1, nothing is clipped, KL 0, loss is minus the mean advantage.
    """
    found = means(
        algorithm("grpo", f"grpo.mean={unit}", "rollout.max_tokens=8").loss(
            "policy", packed(ref_logp="old_logp"), said("old_logp")
        )
    )
    assert found["kl"] == 0.0
    assert found["clipped"] == 0.0
    given = rows("advantages")
    each = [{"sequence": r.mean(), "constant": r.sum() / 8}.get(unit, 0.0) for r in given]
    wanted = np.concatenate(given).mean() if unit == "token" else np.mean(each)
    assert found["loss"] == pytest.approx(-wanted, abs=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [[], ["grpo.ratio=sequence"], ["grpo.objective=cispo"], ["grpo.mismatch_cap=1.1"], ["grpo.kl_ratio=true"]],
    ids=" ".join,
)
def test_grpo_of_a_single_update_asks_nobody_beforehand(overrides: list[str]) -> None:
    """With one update per step there is no score pass for old_logp.

    The loss's own log-probs replace it: loss, gradient and metrics are the same.
    """
    found = []
    for updates in (1, 2):
        made, out = algorithm("grpo", f"batch.minibatches={updates}", *overrides), said("logp")
        out.logp.requires_grad_()
        loss = made.loss("policy", packed(old_logp="logp"), out)
        (gradient,) = torch.autograd.grad(loss.total, out.logp)
        found.append((mean(loss), gradient.tolist(), means(loss)))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]
    gap = np.abs(np.concatenate(rows("logp")) - np.concatenate(rows("sampler_logp"))).mean()
    assert found[0][2].pop("mismatch") == pytest.approx(gap, rel=1e-5)
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("mode", ["grpo", "rlhf"])
@pytest.mark.parametrize("key", ["rollout.top_p=0.9", "rollout.top_k=5"])
def test_a_filtered_sampler_is_not_compared(mode: str, key: str) -> None:
    """The engine's log-probs are then those of a filtered distribution, and the policy's are not."""
    section = "ppo" if mode == "rlhf" else mode
    keys = ["batch.minibatches=1", f"{section}.kl=0"]
    assert "mismatch" in means(algorithm(mode, *keys).loss("policy", packed(), said()))
    assert "mismatch" not in means(algorithm(mode, *keys, key).loss("policy", packed(), said()))
    for more in ([f"{section}.mismatch_cap=2"], ["rollout.inflight=1.5"]):
        with pytest.raises(
            UserError, match=rf"^{section}.mismatch_cap=2 compares .* top_p=1 and top_k=0, or {section}"
        ):
            algorithm(mode, key, *more)
    assert algorithm(mode, key, "rollout.inflight=1.5", f"{section}.mismatch_cap=0").weight_limits is None


def grpo_loss(*overrides: str, sampler: float = 0.0) -> tuple[dict[str, float], list[float]]:
    """Return the loss and its gradient by token for one response of two tokens.

    Ratios are 1.5 and 0.9, the advantage is 1, and the reference's probability is twice the policy's.
    """
    streams = {
        "old_logp": np.zeros(2),
        "ref_logp": np.full(2, math.log(2)),
        "sampler_logp": np.full(2, sampler),
        "advantages": np.ones(2),
    }
    named = {name: x.astype(np.float32) for name, x in streams.items()}
    batch = pack([Sample(np.zeros(3, np.int32), np.ones(2, bool), 0, **named)])
    logp = torch.tensor([1.5, 0.9]).log().requires_grad_()
    loss = algorithm("grpo", "grpo.kl=0", *overrides).loss("policy", batch, Output(logp=logp, entropy=torch.zeros(2)))
    loss.total.backward()
    return means(loss), (logp.grad / loss.count).tolist()


def test_grpo_ratio_and_objective() -> None:
    found, gradient = grpo_loss()
    assert found["loss"] == pytest.approx(-(1.2 + 0.9) / 2)
    assert found["clipped"] == 0.5
    assert gradient == pytest.approx([0.0, -0.45])
    mean_ratio = math.sqrt(1.5 * 0.9)
    found, gradient = grpo_loss("grpo.ratio=sequence", "grpo.clip_high=0.5")
    assert found["loss"] == pytest.approx(-mean_ratio)
    assert gradient == pytest.approx([-mean_ratio / 2] * 2)
    found, gradient = grpo_loss("grpo.objective=cispo")
    assert found["loss"] == pytest.approx(-(1.2 * math.log(1.5) + 0.9 * math.log(0.9)) / 2)
    assert gradient == pytest.approx([-0.6, -0.45])  # the clipped token keeps its gradient
    assert grpo_loss("grpo.objective=cispo", "grpo.clip_low=0.05")[1] == pytest.approx([-0.6, -0.475])


def test_grpo_clip_kl_mean_and_mismatch() -> None:
    assert grpo_loss("grpo.clip_high=0.28")[0]["loss"] == pytest.approx(-(1.28 + 0.9) / 2)
    assert grpo_loss("grpo.mean=constant", "rollout.max_tokens=4")[0]["loss"] == pytest.approx(-(1.2 + 0.9) / 4)
    k1 = [math.log(1.5 / 2), math.log(0.9 / 2)]
    k3 = [2 / 1.5 - 1 + k1[0], 2 / 0.9 - 1 + k1[1]]
    for kind, kl in (("k1", np.mean(k1)), ("k2", np.mean(np.square(k1)) / 2), ("k3", np.mean(k3))):
        found, _ = grpo_loss("grpo.kl=0.5", f"grpo.kl_kind={kind}")
        assert found["kl"] == pytest.approx(kl, abs=1e-6)
        assert found["loss"] == pytest.approx(-1.05 + 0.5 * kl, abs=1e-6)
    found, _ = grpo_loss(
        "grpo.mismatch_cap=4", sampler=math.log(0.5)
    )  # the learner's probability is twice the engine's
    assert (found["loss"], found["capped"]) == pytest.approx((-2.1, 0.0))
    found, _ = grpo_loss("grpo.mismatch_cap=1.5", "grpo.kl=0.5", "grpo.kl_kind=k1", sampler=math.log(0.5))
    assert found["loss"] == pytest.approx(
        -1.05 * 1.5 + 0.5 * np.mean(k1), abs=1e-6
    )  # the weight does not apply to the KL
    assert found["capped"] == 1.0
    far = ["grpo.mismatch_cap=1.5", "grpo.mismatch_mode=sequence_mask", "grpo.kl=0.5"]
    found, gradient = grpo_loss(*far, sampler=-1000.0)  # the product overflows
    assert (found["loss"], found["capped"]) == pytest.approx((0.5 * np.mean(k3), 1.0))
    assert np.isfinite(gradient).all()


def test_rewards_that_float32_cannot_tell_apart_tie() -> None:
    """0.1 + 0.2 and 0.3 are a tie: they give no pair, count as tied, and the group is not kept by the rounds."""
    samples = responses([0.1 + 0.2, 0.3], group=0)
    assert samples[0].reward != samples[1].reward
    assert pack(samples).pairs.shape == (2, 0)
    assert not differ([s.reward for s in samples])
    kept, sums = algorithm("online-dpo", "rollout.group=2").credit(samples)
    assert (kept, sums["tied"]) == ([], (1.0, 1.0))
    assert algorithm("grpo", "rollout.group=2").credit(samples)[1]["silent"] == (1.0, 1.0)


@pytest.mark.parametrize(
    ("mode", "role", "overrides"),
    [
        *(
            ("grpo", "policy", [f"grpo.mean={unit}", "grpo.mismatch_cap=2"])
            for unit in ("sequence", "token", "constant")
        ),
        ("grpo", "policy", ["grpo.ratio=sequence", "grpo.advantage=global"]),
        ("rlhf", "policy", ["ppo.ngram=2", "ppo.ngram_penalty=0.5", "ppo.lam=0.9", "ppo.whiten=true"]),
        ("rlhf", "critic", ["ppo.lam=0.9"]),
    ],
)
def test_what_an_environment_says_within_a_response_changes_nothing(mode: str, role: str, overrides: list[str]) -> None:
    """Tokens that are not learned may lie between learned ones. They change neither rewards nor losses."""
    streams = ("old_logp", "ref_logp", "sampler_logp", "values")
    draw = np.random.default_rng(1)
    whole = [s for group in range(2) for s in responses([0.0, 1.0, 0.5], group, 5)]
    for s in whole:
        for name in streams:
            setattr(s, name, draw.normal(-1, 0.3, len(s.mask)).astype(np.float32))

    def gap(row: np.ndarray) -> np.ndarray:
        return np.insert(row, 3, [50, 50])  # between the second and the third token of a response

    answered = []
    for s in whole:
        mask = np.insert(s.mask, 3, [False, False])
        answered.append(
            Sample(gap(s.tokens), mask, s.group, s.reward, **{name: gap(getattr(s, name)) for name in streams})
        )
    said = [draw.normal(-1, 0.3, len(s.mask)).astype(np.float32) for s in whole]
    losses = []
    for samples, spoken in ((whole, said), (answered, [gap(row) for row in said])):
        made = algorithm(mode, *overrides)
        learned, sums = made.credit(samples)
        row = torch.from_numpy(np.concatenate(spoken))
        loss = made.loss(role, pack(learned), Output(logp=row, entropy=row, value=row))
        losses.append([mean(loss), *means(loss).values(), *(total for total, _ in sums.values())])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
