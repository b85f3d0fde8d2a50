"""GRPO and PPO: what they make of rewards, step zero, and every key that they read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from streams import algorithm, mean, means, packed, responses, rows, said

from rlhf.contracts import Output, Sample, differ
from rlhf.data.packing import pack

# GRPO


def advantages(samples: list[Sample], *overrides: str) -> list[float]:
    return [float(s.advantages[-1]) for s in algorithm("grpo", *overrides).credit(samples)[0]]


def test_grpo_advantages() -> None:
    """The prompt gets none; a tie teaches nothing."""
    samples = responses([1.0, 0.0], 3) + responses([0.5, 0.5], 4) + responses([3.0, 1.0, 1.0, 1.0], 5)
    credited, sums = algorithm("grpo").credit(samples)
    wanted = [1.0, -1.0, 0.0, 0.0, math.sqrt(3)] + [-1 / math.sqrt(3)] * 3
    assert [s.advantages[-1] for s in credited] == pytest.approx(wanted, abs=1e-5)
    assert all(s.advantages[0] == 0.0 for s in credited)
    assert sums == {"silent": (1.0, 3.0)}


def test_grpo_advantage_kinds() -> None:
    def found(kind: str) -> list[float]:
        return advantages(responses([3.0, 1.0, 1.0, 1.0], 0) + responses([0.0, 2.0], 1), f"grpo.advantage={kind}")

    centred = np.array([1.5, -0.5, -0.5, -0.5, -1.0, 1.0])
    assert found("none") == pytest.approx(centred)
    assert found("leave_one_out") == pytest.approx([2.0, -2 / 3, -2 / 3, -2 / 3, -2.0, 2.0])
    assert found("global") == pytest.approx(centred / centred.std(), abs=1e-6)


def test_grpo_overlong() -> None:
    """Of 10 tokens the last 4 are the buffer: 6 cost nothing, 8 a half, 10 one, and what was cut one at any length."""
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
    answered[1].mask[3:5] = False  # what an environment has said counts
    assert advantages(answered, *limit, "grpo.overlong=shape", "grpo.overlong_buffer=4") == shaped
    samples = drawn()
    samples[3].reward = 5.0
    assert advantages(samples, *limit, "grpo.overlong=mask") == [-1.0] * 3  # it is no longer learned, but still in the mean of 2
    learned, _ = algorithm("grpo", *limit[:1], "grpo.overlong=mask", "grpo.advantage=global").credit(samples + responses([0.0, 2.0], 1))
    assert len(learned) == 5
    assert not any(s.truncated for s in learned)
    whitened = np.concatenate([s.advantages[s.mask] for s in learned])  # of what is learned, and of nothing else
    assert (whitened.mean(), whitened.std()) == pytest.approx((0.0, 1.0), abs=1e-6)


@pytest.mark.parametrize("unit", ["token", "sequence", "constant"])
def test_grpo_step_zero(unit: str) -> None:
    """Where policy, old policy and reference are one: ratio 1, nothing clipped, KL 0, loss minus the mean advantage."""
    found = means(
        algorithm("grpo", f"grpo.mean={unit}", "rollout.max_tokens=8").loss("policy", packed(ref_logp="old_logp"), said("old_logp"))
    )
    assert found["kl"] == 0.0
    assert found["clipped"] == 0.0
    given = rows("advantages")
    each = [{"sequence": r.mean(), "constant": r.sum() / 8}.get(unit, 0.0) for r in given]
    wanted = np.concatenate(given).mean() if unit == "token" else np.mean(each)
    assert found["loss"] == pytest.approx(-wanted, abs=1e-6)


@pytest.mark.parametrize("overrides", [[], ["grpo.ratio=sequence"], ["grpo.objective=cispo"], ["grpo.mismatch_cap=1.1"]], ids=" ".join)
def test_grpo_of_a_single_update_asks_nobody_beforehand(overrides: list[str]) -> None:
    """Its log-probs are those of the policy that sampled: loss, gradient and metrics as with old log-probs that were scored."""
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


def grpo_loss(*overrides: str, sampler: float = 0.0) -> tuple[dict[str, float], list[float]]:
    """One response of two tokens with ratios 1.5 and 0.9 and advantage 1, reference twice as likely; the loss and its gradient by token."""
    streams = {"old_logp": np.zeros(2), "ref_logp": np.full(2, math.log(2)), "sampler_logp": np.full(2, sampler), "advantages": np.ones(2)}
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
    found, _ = grpo_loss("grpo.mismatch_cap=4", sampler=math.log(0.5))  # the learner is twice as sure as the engine was
    assert (found["loss"], found["capped"]) == pytest.approx((-2.1, 0.0))
    found, _ = grpo_loss("grpo.mismatch_cap=1.5", "grpo.kl=0.5", "grpo.kl_kind=k1", sampler=math.log(0.5))
    assert found["loss"] == pytest.approx(-1.05 * 1.5 + 0.5 * np.mean(k1), abs=1e-6)  # the weight is not on the KL
    assert found["capped"] == 1.0


# PPO


def ppo_samples(rewards: list[float], values: float = 0.0, gap: float = 0.1, length: int = 2) -> list[Sample]:
    """Old policy and reference differ by `gap` at every response token, and by nonsense in the prompt."""
    made = responses(rewards, 0, length)
    for s in made:
        s.old_logp = np.where(s.mask, -1.0, 50.0).astype(np.float32)
        s.ref_logp = np.where(s.mask, -1.0 - gap, -50.0).astype(np.float32)
        s.values = np.where(s.mask, values, 77.0).astype(np.float32)
    return made


def returns(samples: list[Sample], *overrides: str) -> list[list[float]]:
    """With gamma and lambda 1 and values 0: the rewards from each token on."""
    return [s.returns[s.mask].tolist() for s in algorithm("rlhf", "ppo.lam=1", *overrides).credit(samples)[0]]


def test_ppo_rewards_by_hand() -> None:
    """The worth at the last token, minus coefficient times KL at every token; no KL of the prompt; nothing learned there."""
    samples = ppo_samples([1.0])
    (found,) = returns(samples, "ppo.kl=0.5")
    assert found == pytest.approx([1 - 0.5 * 0.2, 1 - 0.5 * 0.1], abs=1e-6)
    assert samples[0].returns[0] == samples[0].advantages[0] == 0.0
    assert returns(ppo_samples([1.0]), "ppo.kl=0") == [[1.0, 1.0]]
    assert returns(ppo_samples([1.0]), "ppo.kl=0.5", "ppo.kl_kind=k2")[0] == pytest.approx([1 - 0.005, 1 - 0.0025], abs=1e-6)
    k3 = math.exp(-0.1) - 1 + 0.1
    assert returns(ppo_samples([1.0]), "ppo.kl=0.5", "ppo.kl_kind=k3")[0] == pytest.approx([1 - k3, 1 - k3 / 2], abs=1e-6)


def test_ppo_truncated_response_gets_no_bonus() -> None:
    """Cut or not, the reward stands at the last token that was sampled."""
    cut = ppo_samples([1.0])
    cut[0].truncated = True
    assert returns(cut) == returns(ppo_samples([1.0]))


def test_ppo_gamma_and_lam() -> None:
    def found(*overrides: str) -> list[float]:
        samples, _ = algorithm("rlhf", "ppo.kl=0", "ppo.whiten=false", *overrides).credit(ppo_samples([1.0], values=0.5))
        return samples[0].advantages[1:].tolist()

    assert found("ppo.lam=0.5") == pytest.approx([0.25, 0.5])
    assert found("ppo.lam=0.5", "ppo.gamma=0.8") == pytest.approx([0.4 - 0.5 + 0.4 * 0.5, 0.5])


def test_ppo_whitening_and_returns() -> None:
    """Mean 0 and deviation 1 over all response tokens of the step; returns are of the raw advantages."""
    samples = ppo_samples([1.0, 0.0, 3.0], values=0.5, length=3) + ppo_samples([2.0], length=7)
    plain, _ = algorithm("rlhf", "ppo.whiten=false").credit(samples)
    raw, wanted = np.concatenate([s.advantages[s.mask] for s in plain]), [s.returns for s in plain]
    white, sums = algorithm("rlhf").credit(samples)
    whole = np.concatenate([s.advantages[s.mask] for s in white])
    assert (whole.mean(), whole.std()) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert whole == pytest.approx((raw - raw.mean()) / raw.std(), abs=1e-5)
    assert all(np.array_equal(a, s.returns) for a, s in zip(wanted, white, strict=True))
    assert sums["advantages"] == pytest.approx((raw.sum(), 16.0), abs=1e-5)
    assert all((s.advantages[~s.mask] == 0).all() for s in white)


def test_ppo_reward_clip_and_scale() -> None:
    """Scaled by the deviation of all rewards so far, then clipped; the deviation is carried from step to step."""
    assert [r[-1] for r in returns(ppo_samples([5.0, -5.0, 0.5]), "ppo.kl=0", "ppo.reward_clip=2")] == [2.0, -2.0, 0.5]
    ppo = algorithm("rlhf", "ppo.kl=0", "ppo.lam=1", "ppo.reward_scale=true", "ppo.reward_clip=1.5")
    seen: list[float] = []
    for step in ([3.0, 3.0], [1.0, 5.0, 9.0], [-2.0]):
        seen += step
        samples, _ = ppo.credit(ppo_samples(step))
        wanted = np.clip(np.array(step) / (np.std(seen) or 1.0), -1.5, 1.5)
        assert [s.returns[-1] for s in samples] == pytest.approx(wanted, abs=1e-6)
    assert ppo.state["reward_count"] == 6
    resumed = algorithm("rlhf", "ppo.kl=0", "ppo.lam=1", "ppo.reward_scale=true")
    resumed.state.update(ppo.state)
    assert resumed.credit(ppo_samples([4.0]))[0][0].returns[-1] == pytest.approx(4 / np.std([*seen, 4.0]), abs=1e-6)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 2.7, -0.7])
def test_ppo_scale_of_equal_rewards(reward: float) -> None:
    """Their mean may differ from them by a rounding error: that is no deviation to divide by."""
    ppo = algorithm("rlhf", "ppo.kl=0", "ppo.lam=1", "ppo.reward_scale=true")
    for count in (3, 7, 10, 100):
        assert [s.returns[-1] for s in ppo.credit(ppo_samples([reward] * count))[0]] == pytest.approx([reward] * count)


def test_ppo_ngram_penalty() -> None:
    samples = ppo_samples([1.0], length=4)
    samples[0].tokens[2:] = [8, 9, 8, 9]
    assert returns(samples, "ppo.kl=0", "ppo.ngram=2", "ppo.ngram_penalty=0.25") == [[0.75] * 4]
    assert returns(samples, "ppo.kl=0", "ppo.ngram=1") == [[-1.0, -1.0, -1.0, 0.0]]
    assert returns(samples, "ppo.kl=0", "ppo.ngram=3") == [[1.0] * 4]
    assert algorithm("rlhf", "ppo.ngram=2").credit(samples)[1]["repeated"] == (1.0, 4.0)


def test_ppo_adaptive_kl() -> None:
    """KL of whole responses (length 4 x 0.1) to the reference against the target: the error is held to 0.2, n / horizon of it acts."""

    def run(target: float, horizon: float = 20) -> list[float]:
        ppo = algorithm("rlhf", "ppo.kl=0.5", f"ppo.kl_target={target}", f"ppo.kl_horizon={horizon}", "batch.prompts=1", "rollout.group=2")
        steps = [ppo.credit(ppo_samples([1.0, 2.0], length=4))[1] for _ in range(3)]
        assert all(sums["kl"][0] / sums["kl"][1] == pytest.approx(0.4, abs=1e-6) for sums in steps)
        return [sums["kl_coefficient"][0] for sums in steps]

    assert run(0) == [0.5, 0.5, 0.5]
    assert run(0.1) == pytest.approx([0.5, 0.5 * 1.02, 0.5 * 1.02**2])
    assert run(4) == pytest.approx([0.5, 0.5 * 0.98, 0.5 * 0.98**2])
    assert run(0.1, horizon=2) == pytest.approx([0.5, 0.6, 0.72])
    assert run(0.4 / 1.1) == pytest.approx([0.5, 0.505, 0.51005], abs=1e-6)


def test_ppo_metrics() -> None:
    """Shaped reward is a response's sum; values that are the returns explain all of their variance."""
    _, sums = algorithm("rlhf", "ppo.kl=0.5").credit(ppo_samples([1.0, 3.0]))
    assert sums["shaped_reward"] == pytest.approx((4 - 0.5 * 0.4, 2.0), abs=1e-6)
    assert sums["kl"] == pytest.approx((0.4, 2.0), abs=1e-6)
    assert sums["explained_variance"] == pytest.approx((0.0, 1.0))
    samples = ppo_samples([1.0, 3.0])
    for s in samples:
        s.values = np.where(s.mask, s.reward, 0.0).astype(np.float32)
    _, sums = algorithm("rlhf", "ppo.kl=0").credit(samples)
    assert sums["explained_variance"] == pytest.approx((1.0, 1.0))
    assert sums["values"] == sums["returns"] == pytest.approx((8.0, 4.0))


def test_ppo_losses_and_keys() -> None:
    """Ratio 1 at step zero; the policy's and the value's clips act; critic_warmup holds the policy back."""
    found = means(algorithm("rlhf").loss("policy", packed(), said("old_logp")))
    assert (found["drift"], found["clipped"]) == (0.0, 0.0)
    assert found["loss"] == pytest.approx(-np.concatenate(rows("advantages")).mean(), abs=1e-6)

    def loss(role: str, *overrides: str) -> float:
        return mean(algorithm("rlhf", *overrides).loss(role, packed(), said()))

    ratio, gain = np.exp(np.concatenate(rows("logp")) - np.concatenate(rows("old_logp"))), np.concatenate(rows("advantages"))
    for low, high in ((0.2, 0.2), (0.05, 0.2), (0.2, 0.5)):
        wanted = -np.minimum(ratio * gain, ratio.clip(1 - low, 1 + high) * gain).mean()
        assert loss("policy", f"ppo.clip_low={low}", f"ppo.clip_high={high}") == pytest.approx(wanted, abs=1e-6)
    plain = 0.5 * ((np.concatenate(rows("values")) - np.concatenate(rows("returns"))) ** 2).mean()
    assert loss("critic", "ppo.value_clip=0") == pytest.approx(plain, abs=1e-6)
    assert plain < loss("critic", "ppo.value_clip=0.5") < loss("critic", "ppo.value_clip=0.2")
    assert algorithm("rlhf").warmup == {"policy": 0}
    assert algorithm("rlhf", "ppo.critic_warmup=3").warmup == {"policy": 3}


def test_ppo_weighs_tokens_by_who_drew_them() -> None:
    """Policy before the update over sampler, truncated; of a single update without a KL nobody is asked beforehand."""
    learner, sampler = np.array([-1.0, -1.0]), np.array([-2.0, -0.5])  # e more likely to the learner, and less
    named = {"sampler_logp": sampler, "old_logp": learner, "advantages": np.array([1.0, 3.0])}
    batch = pack([Sample(np.zeros(3, np.int32), np.ones(2, bool), 0, **{name: x.astype(np.float32) for name, x in named.items()})])
    for keys, weights in (([], [1, 1]), (["ppo.mismatch_cap=10"], [math.e, math.exp(-0.5)]), (["rollout.inflight=2"], [2, math.exp(-0.5)])):
        for kl in ("ppo.kl=0.1", "ppo.kl=0"):
            made = algorithm("rlhf", kl, "batch.minibatches=1", *keys)
            assert ("old_logp" in made.streams) == (kl == "ppo.kl=0.1")
            logp = torch.tensor(learner, dtype=torch.float32, requires_grad=True)
            loss = made.loss("policy", batch, Output(logp=logp, entropy=torch.zeros(2)))
            (gradient,) = torch.autograd.grad(loss.total, logp)
            assert gradient.tolist() == pytest.approx([-weights[0], -3 * weights[1]], abs=1e-5)
            assert means(loss).get("capped") == (pytest.approx(float(weights[0] == 2) / 2) if keys else None)
    assert "old_logp" in algorithm("rlhf", "ppo.kl=0", "batch.minibatches=2").streams


def test_prompts_cannot_overflow() -> None:
    """A policy that drifted on the prompt by e^200 does not make the loss of the response NaN."""
    for mode, overrides in (("rlhf", []), ("grpo", ["grpo.mismatch_cap=2"])):
        made, samples = algorithm(mode, *overrides), ppo_samples([1.0, 0.0])
        for s in samples:
            s.old_logp, s.ref_logp, s.sampler_logp = (np.where(s.mask, -1.0, x).astype(np.float32) for x in (-200, 200, -400))
        batch = pack(made.credit(samples)[0])
        logp = torch.where(batch.mask > 0, -1.0, 0.0).requires_grad_()
        made.loss("policy", batch, Output(logp=logp, entropy=torch.zeros_like(logp))).total.backward()
        assert logp.grad.isfinite().all()
        assert logp.grad.abs().sum() > 0


def test_rewards_that_float32_cannot_tell_apart_tie() -> None:
    """0.1 + 0.2 and 0.3: no pair, and counted as tied, silent and not worth keeping alike."""
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
        *(("grpo", "policy", [f"grpo.mean={unit}", "grpo.mismatch_cap=2"]) for unit in ("sequence", "token", "constant")),
        ("grpo", "policy", ["grpo.ratio=sequence", "grpo.advantage=global"]),
        ("rlhf", "policy", ["ppo.ngram=2", "ppo.ngram_penalty=0.5", "ppo.lam=0.9", "ppo.whiten=true"]),
        ("rlhf", "critic", ["ppo.lam=0.9"]),
    ],
)
def test_what_an_environment_says_within_a_response_changes_nothing(mode: str, role: str, overrides: list[str]) -> None:
    """Tokens that are not learned between those that are: neither rewards nor losses see them."""
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
        answered.append(Sample(gap(s.tokens), mask, s.group, s.reward, **{name: gap(getattr(s, name)) for name in streams}))
    said = [draw.normal(-1, 0.3, len(s.mask)).astype(np.float32) for s in whole]
    losses = []
    for samples, spoken in ((whole, said), (answered, [gap(row) for row in said])):
        made = algorithm(mode, *overrides)
        learned, sums = made.credit(samples)
        row = torch.from_numpy(np.concatenate(spoken))
        loss = made.loss(role, pack(learned), Output(logp=row, entropy=row, value=row))
        losses.append([mean(loss), *means(loss).values(), *(total for total, _ in sums.values())])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
