"""PPO: rewards per token, the loss at step zero, and every key that it reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from streams import algorithm, mean, means, packed, responses, rows, said

from rlhf.contracts import Output, Sample
from rlhf.data.packing import pack


def ppo_samples(rewards: list[float], values: float = 0.0, gap: float = 0.1, length: int = 2) -> list[Sample]:
    """Return samples whose old policy and reference differ by `gap` in the response.

    In the prompt they differ by much more, which must not matter.
    """
    made = responses(rewards, 0, length)
    for s in made:
        s.old_logp = np.where(s.mask, -1.0, 50.0).astype(np.float32)
        s.ref_logp = np.where(s.mask, -1.0 - gap, -50.0).astype(np.float32)
        s.values = np.where(s.mask, values, 77.0).astype(np.float32)
    return made


def returns(samples: list[Sample], *overrides: str) -> list[list[float]]:
    """Return the sum of the rewards from each token on: gamma and lambda are 1, values are 0."""
    return [s.returns[s.mask].tolist() for s in algorithm("rlhf", "ppo.lam=1", *overrides).credit(samples)[0]]


def test_ppo_rewards_by_hand() -> None:
    """The last token has the reward, and every response token minus coefficient times KL.

    Prompt tokens have no KL and are not learned.
    """
    samples = ppo_samples([1.0])
    (found,) = returns(samples, "ppo.kl=0.5")
    assert found == pytest.approx([1 - 0.5 * 0.2, 1 - 0.5 * 0.1], abs=1e-6)
    assert samples[0].returns[0] == samples[0].advantages[0] == 0.0
    assert returns(ppo_samples([1.0]), "ppo.kl=0") == [[1.0, 1.0]]
    assert returns(ppo_samples([1.0]), "ppo.kl=0.5", "ppo.kl_kind=k2")[0] == pytest.approx(
        [1 - 0.005, 1 - 0.0025], abs=1e-6
    )
    k3 = math.exp(-0.1) - 1 + 0.1
    assert returns(ppo_samples([1.0]), "ppo.kl=0.5", "ppo.kl_kind=k3")[0] == pytest.approx(
        [1 - k3, 1 - k3 / 2], abs=1e-6
    )


def test_ppo_truncated_response_gets_no_bonus() -> None:
    """In complete and truncated responses, the last sampled token has the reward."""
    cut = ppo_samples([1.0])
    cut[0].truncated = True
    assert returns(cut) == returns(ppo_samples([1.0]))


def test_ppo_gamma_and_lam() -> None:
    def found(*overrides: str) -> list[float]:
        samples, _ = algorithm("rlhf", "ppo.kl=0", "ppo.whiten=false", *overrides).credit(
            ppo_samples([1.0], values=0.5)
        )
        return samples[0].advantages[1:].tolist()

    assert found("ppo.lam=0.5") == pytest.approx([0.25, 0.5])
    assert found("ppo.lam=0.5", "ppo.gamma=0.8") == pytest.approx([0.4 - 0.5 + 0.4 * 0.5, 0.5])


def test_ppo_whitening_and_returns() -> None:
    """Advantages have mean 0 and deviation 1 over all response tokens of the step. Returns use the raw advantages."""
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
    """Rewards are divided by the deviation of all rewards so far, then clipped.

    The deviation is kept from step to step.
    """
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
    """Their mean may differ from them by a rounding error. The program does not divide by such a deviation."""
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
    """The KL of whole responses (length 4 x 0.1) is compared with the target.

    The error is clipped to 0.2, and n / horizon of it is applied.
    """

    def run(target: float, horizon: float = 20) -> list[float]:
        ppo = algorithm(
            "rlhf",
            "ppo.kl=0.5",
            f"ppo.kl_target={target}",
            f"ppo.kl_horizon={horizon}",
            "batch.prompts=1",
            "rollout.group=2",
        )
        steps = [ppo.credit(ppo_samples([1.0, 2.0], length=4))[1] for _ in range(3)]
        assert all(sums["kl"][0] / sums["kl"][1] == pytest.approx(0.4, abs=1e-6) for sums in steps)
        return [sums["kl_coefficient"][0] for sums in steps]

    assert run(0) == [0.5, 0.5, 0.5]
    assert run(0.1) == pytest.approx([0.5, 0.5 * 1.02, 0.5 * 1.02**2])
    assert run(4) == pytest.approx([0.5, 0.5 * 0.98, 0.5 * 0.98**2])
    assert run(0.1, horizon=2) == pytest.approx([0.5, 0.6, 0.72])
    assert run(0.4 / 1.1) == pytest.approx([0.5, 0.505, 0.51005], abs=1e-6)


def test_ppo_metrics() -> None:
    """The shaped reward is the sum over a response. Values that equal the returns explain all of their variance."""
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
    """Ratio 1 at step zero. The clips of policy and value apply. critic_warmup delays the policy."""
    found = means(algorithm("rlhf").loss("policy", packed(), said("old_logp")))
    assert (found["drift"], found["clipped"]) == (0.0, 0.0)
    assert found["loss"] == pytest.approx(-np.concatenate(rows("advantages")).mean(), abs=1e-6)

    def loss(role: str, *overrides: str) -> float:
        return mean(algorithm("rlhf", *overrides).loss(role, packed(), said()))

    ratio, gain = (
        np.exp(np.concatenate(rows("logp")) - np.concatenate(rows("old_logp"))),
        np.concatenate(rows("advantages")),
    )
    for low, high in ((0.2, 0.2), (0.05, 0.2), (0.2, 0.5)):
        wanted = -np.minimum(ratio * gain, ratio.clip(1 - low, 1 + high) * gain).mean()
        assert loss("policy", f"ppo.clip_low={low}", f"ppo.clip_high={high}") == pytest.approx(wanted, abs=1e-6)
    plain = 0.5 * ((np.concatenate(rows("values")) - np.concatenate(rows("returns"))) ** 2).mean()
    assert loss("critic", "ppo.value_clip=0") == pytest.approx(plain, abs=1e-6)
    assert plain < loss("critic", "ppo.value_clip=0.5") < loss("critic", "ppo.value_clip=0.2")
    assert algorithm("rlhf").warmup == {"policy": 0}
    assert algorithm("rlhf", "ppo.critic_warmup=3").warmup == {"policy": 3}


def test_ppo_weighs_tokens_by_who_drew_them() -> None:
    """The weight is the ratio of policy before the update to sampler, truncated.

    With a single update and no KL there is no score pass for it.
    """
    learner, sampler = np.array([-1.0, -1.0]), np.array([-2.0, -0.5])  # one is more likely to the learner, and one less
    named = {"sampler_logp": sampler, "old_logp": learner, "advantages": np.array([1.0, 3.0])}
    batch = pack(
        [
            Sample(
                np.zeros(3, np.int32), np.ones(2, bool), 0, **{name: x.astype(np.float32) for name, x in named.items()}
            )
        ]
    )
    for keys, weights in (
        ([], [1, 1]),
        (["ppo.mismatch_cap=10"], [math.e, math.exp(-0.5)]),
        (["rollout.inflight=2"], [2, math.exp(-0.5)]),
    ):
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
    """The policy has drifted on the prompt by e^200: the loss of the response is still not NaN."""
    for mode, overrides in (("rlhf", []), ("grpo", ["grpo.mismatch_cap=2"])):
        made, samples = algorithm(mode, *overrides), ppo_samples([1.0, 0.0])
        for s in samples:
            s.old_logp, s.ref_logp, s.sampler_logp = (
                np.where(s.mask, -1.0, x).astype(np.float32) for x in (-200, 200, -400)
            )
        batch = pack(made.credit(samples)[0])
        logp = torch.where(batch.mask > 0, -1.0, 0.0).requires_grad_()
        made.loss("policy", batch, Output(logp=logp, entropy=torch.zeros_like(logp))).total.backward()
        assert logp.grad.isfinite().all()
        assert logp.grad.abs().sum() > 0
