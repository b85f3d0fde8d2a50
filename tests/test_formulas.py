"""Every formula against results of published implementations (tests/fixtures), and against numbers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from streams import EXPECTED, FIXTURE, algorithm, flat, mean, means, packed, rows, said

from rlhf.algorithms.functional import (
    clipped_surrogate,
    clipped_value,
    gae,
    kl_estimate,
    preference,
    repeats,
    whiten,
    wins,
)
from rlhf.algorithms.grpo import group_advantages
from rlhf.contracts import Output, Sample
from rlhf.data.packing import pack
from rlhf.model import operations

NO_KL = "grpo.kl=0"
HIGHER = "grpo.clip_high=0.28"
GSPO = "grpo.ratio=sequence"
TOKEN, CONSTANT = "grpo.mean=token", "grpo.mean=constant"
PUBLISHED = [
    (
        (NO_KL, TOKEN),
        [
            "verl.ppo_vanilla[token-mean]",
            "openrlhf.ppo[token-mean]",
            "slime.ppo[token-mean]",
            "nemo_rl.ppo[token-mean]",
        ],
    ),
    ((NO_KL, TOKEN), ["megatron_rl.grpo_beta0[token-mean]"]),
    # a second clip at 3 changes nothing here
    (
        (NO_KL, TOKEN),
        ["openrlhf.ppo_dual3[token-mean]", "slime.ppo_dual3[token-mean]", "nemo_rl.ppo_dual3[token-mean]"],
    ),
    (
        (NO_KL,),
        [
            "verl.ppo_vanilla[seq-mean-token-mean]",
            "openrlhf.ppo[seq-mean-token-mean]",
            "nemo_rl.ppo[seq-mean-token-mean]",
        ],
    ),
    ((NO_KL, CONSTANT, "rollout.max_tokens=1"), ["verl.ppo_vanilla[seq-mean-token-sum]"]),
    ((NO_KL, CONSTANT, "rollout.max_tokens=6"), ["verl.ppo_vanilla[seq-mean-token-sum-norm]"]),
    ((NO_KL, TOKEN, HIGHER), ["verl.dapo_clip_higher[token-mean]", "openrlhf.dapo_clip_higher[token-mean]"]),
    ((NO_KL, TOKEN, HIGHER), ["slime.dapo_clip_higher[token-mean]", "nemo_rl.dapo_clip_higher[token-mean]"]),
    (
        (NO_KL, TOKEN, "grpo.mismatch_cap=2"),
        ["verl.ppo_vanilla_TIS2[token-mean]", "openrlhf.ppo_TIS2_dual3[token-mean]"],
    ),
    ((NO_KL, TOKEN, "grpo.mismatch_cap=2"), ["megatron_rl.grpo_TIS2[token-mean]", "nemo_rl.ppo_TIS2[token-mean]"]),
    ((NO_KL, GSPO), ["verl.gspo", "openrlhf.gspo", "nemo_rl.gspo"]),
    # verl clips at 1.28 and, like the paper, not from below
    ((NO_KL, TOKEN, HIGHER, "grpo.clip_low=1", "grpo.objective=cispo"), ["verl.cispo[token-mean]"]),
    (("grpo.kl=0.1", TOKEN), ["nemo_rl.ppo+0.1k3"]),
]
KL = {
    "k1": ["verl.kl[kl]", "openrlhf.kl[k1]", "slime.kl[k1]", "nemo_rl.kl[k1]"],
    "k2": ["verl.kl[mse]", "openrlhf.kl[k2]", "slime.kl[k2]", "nemo_rl.kl[k2]"],
    "k3": [
        "verl.kl[low_var_kl]",
        "openrlhf.kl[k3]",
        "slime.kl[k3]",
        "slime.kl[low_var_kl]",
        "megatron_rl.kl[k3]",
        "nemo_rl.kl[k3]",
    ],
}


def published(names: list[str]) -> list[float]:
    return [EXPECTED[system][entry] for system, entry in (name.split(".", 1) for name in names)]


@pytest.mark.parametrize(("overrides", "names"), PUBLISHED)
def test_policy_losses_equal_published(overrides: tuple[str, ...], names: list[str]) -> None:
    assert published(names) == pytest.approx(
        [mean(algorithm("grpo", *overrides).loss("policy", packed(), said()))] * len(names), abs=2e-6
    )


def corrections(mode: str, low: float, high: float) -> list[np.ndarray]:
    """Return the weight of each token of the fixture's responses [N], by the formulas as they are published.

    token_* and sequence_*: TRL's vllm_importance_sampling_mode. token_mask: also IcePop, 2510.18855.
    geometric_mask: seq-mask-tis of NeMo RL and OpenRLHF.
    """
    found = []
    for old, sampler in zip(rows("old_logp"), rows("sampler_logp"), strict=True):
        ratio = np.exp(old.astype(np.float64) - sampler)
        if mode.startswith("sequence"):
            ratio = np.full(len(ratio), ratio.prod())
        judged = ratio.prod() ** (1 / len(ratio)) if mode.startswith("geometric") else ratio
        kept = (judged >= low) & (judged <= high)
        found.append(np.clip(ratio, low, high) if mode.endswith("truncate") else ratio * kept)
    return found


@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [
        *(
            (f"{unit}_{action}", low, 1.04)
            for unit in ("token", "sequence")
            for action in ("truncate", "mask")
            for low in (0.0, 0.98)
        ),
        ("geometric_mask", 0.0, 1.005),
        ("geometric_mask", 0.995, 1.005),
    ],
)
def test_importance_weights_equal_published_formulas(mode: str, low: float, high: float) -> None:
    """The weight multiplies the clipped surrogate, but not the KL. Masked tokens still count in the mean.

    PPO has the same weight.
    """
    weights = np.concatenate(corrections(mode, low, high))
    plain = np.exp(np.concatenate(rows("old_logp")) - np.concatenate(rows("sampler_logp")))
    assert (np.abs(weights - plain) > 1e-3).any(), "the limits change nothing"
    ratio = np.exp(np.concatenate(rows("logp")) - np.concatenate(rows("old_logp")).astype(np.float64))
    advantages = np.concatenate(rows("advantages"))
    surrogate = -np.minimum(ratio * advantages, ratio.clip(0.8, 1.2) * advantages)
    d = np.concatenate(rows("ref_logp")).astype(np.float64) - np.concatenate(rows("logp"))
    kl = 0.1 * (np.exp(d) - d - 1)
    for name, keys, term in (("grpo", ["grpo.kl=0.1", TOKEN], kl), ("rlhf", [], 0.0)):
        section = "ppo" if name == "rlhf" else name
        limits = [f"{section}.mismatch_{key}={value}" for key, value in (("cap", high), ("floor", low), ("mode", mode))]
        loss = algorithm(name, *keys, *limits).loss("policy", packed(), said())
        assert mean(loss) == pytest.approx((weights * surrogate + term).mean(), abs=2e-6)


def test_unbiased_kl_equals_published_formula() -> None:
    """The KL of a token times its ratio (DeepSeek-V3.2, 2512.02556; TRL's use_bias_correction_kl with k3)."""
    logp, old, ref = (np.concatenate(rows(name)).astype(np.float64) for name in ("logp", "old_logp", "ref_logp"))
    wanted = np.exp(logp - old) * (np.exp(ref - logp) - (ref - logp) - 1)
    without, found = (
        algorithm("grpo", TOKEN, "grpo.kl=0.1", *keys).loss("policy", packed(), said())
        for keys in ([], ["grpo.kl_ratio=true"])
    )
    plain = mean(algorithm("grpo", TOKEN, NO_KL).loss("policy", packed(), said()))
    assert mean(found) - plain == pytest.approx(0.1 * wanted.mean(), abs=2e-6)
    assert mean(found) != pytest.approx(mean(without), abs=1e-4)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_unbiased_kl_has_the_gradient_of_the_kl(kind: str, unit: str) -> None:
    """Each of five tokens is a response of one token. Their mean by the old policy's probabilities is exact."""
    generator = torch.Generator().manual_seed(2)
    logits, old, ref = torch.randn(3, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    logits.requires_grad_()
    logp = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    made = algorithm("grpo", "grpo.kl=1", f"grpo.kl_kind={kind}", "grpo.kl_ratio=true", f"grpo.ratio={unit}")
    total = torch.zeros((), dtype=torch.float64)
    for token in range(5):
        streams = {"old_logp": old, "ref_logp": ref}
        named = {name: np.array([stream[token]], np.float32) for name, stream in streams.items()}
        batch = pack([Sample(np.zeros(2, np.int32), np.ones(1, bool), 0, advantages=np.zeros(1, np.float32), **named)])
        out = Output(logp=logp[token : token + 1].float(), entropy=torch.zeros(1))
        total = total + old[token].exp() * made.loss("policy", batch, out).total
    assert total.item() == pytest.approx((logp.exp() * (logp - ref)).sum().item(), abs=1e-6)
    assert torch.autograd.grad(total, logits)[0].tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", KL)
def test_kl_equals_published(kind: str) -> None:
    """Our KL is k3 without a clamp. In the loss of GRPO it is the same."""
    found = kl_estimate(kind, flat("logp"), flat("ref_logp")).sum().item() / 18
    metric = means(algorithm("grpo", f"grpo.kl_kind={kind}").loss("policy", packed(), said()))["kl"]
    assert published(KL[kind]) == pytest.approx([found] * len(KL[kind]), abs=2e-6)
    assert metric == pytest.approx(found, abs=1e-6)


def test_ppo_losses_equal_published() -> None:
    """The critic's loss is half the larger squared error, as a mean over tokens."""
    ppo = algorithm("rlhf")
    names = ["verl.ppo_vanilla[token-mean]", "openrlhf.ppo[token-mean]"]
    assert published(names) == pytest.approx([mean(ppo.loss("policy", packed(), said()))] * 2, abs=2e-6)
    names = ["verl.value_clip0.2", "openrlhf.value_clip0.2"]
    assert published(names) == pytest.approx([mean(ppo.loss("critic", packed(), said()))] * 2, abs=2e-6)


def test_gae_equals_published() -> None:
    """gamma 1, lambda 0.95.

    verl whitens with the sample variance, and this program with the population variance: over 18 tokens the factor is
    sqrt(17 / 18).
    """
    samples = []
    for row, (rewards, values) in enumerate(zip(rows("token_rewards"), rows("values"), strict=True)):
        advantages, returns = gae(rewards, values, 1.0, 0.95)
        samples.append(
            Sample(
                np.zeros(len(values) + 1, np.int32),
                np.ones(len(values), bool),
                row,
                advantages=advantages,
                returns=returns,
            )
        )
    assert samples[0].advantages == pytest.approx(EXPECTED["slime"]["gae_raw_adv_row0"], abs=2e-6)
    assert sum(s.returns.sum() for s in samples) == pytest.approx(EXPECTED["verl"]["gae_returns_sum"], abs=2e-6)
    whiten(samples)
    whole = np.concatenate([s.advantages for s in samples]).astype(np.float64)
    assert np.abs(whole).sum() * math.sqrt(17 / 18) == pytest.approx(
        EXPECTED["verl"]["gae_whitened_adv_abs_sum"], abs=2e-6
    )
    assert whole.mean() == pytest.approx(0, abs=1e-7)
    assert whole.std() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("sigmoid", 0.1), ["openrlhf.dpo", "nemo_rl.dpo"]),
        (("sigmoid", 0.1, 0.1), ["openrlhf.cdpo"]),
        (("ipo", 0.1), ["openrlhf.ipo"]),
    ],
)
def test_preference_equals_published(options: tuple, names: list[str]) -> None:
    logp = {name: torch.tensor(values) for name, values in FIXTURE["pairs"].items()}
    h = (logp["policy_chosen"] - logp["ref_chosen"]) - (logp["policy_rejected"] - logp["ref_rejected"])
    assert published(names) == pytest.approx([preference(h, *options).mean().item()] * len(names), rel=1e-6, abs=2e-6)


def test_group_advantages_equal_published() -> None:
    """This program divides by the population deviation plus 1e-6. Each other system differs by a known factor."""
    rewards, two = np.array([1.0, 0.0]), math.sqrt(2)
    std = group_advantages(rewards, "std")
    assert std == pytest.approx([0.5 / (0.5 + 1e-6), -0.5 / (0.5 + 1e-6)], abs=1e-12)
    ours = (0.5 + 1e-6) * std
    assert list(ours / (0.5 + 1e-4)) * 2 == pytest.approx(EXPECTED["megatron_rl"]["grpo_adv"], abs=2e-6)
    for wanted in (EXPECTED["verl"]["grpo_adv"], EXPECTED["nemo_rl"]["grpo_adv[loo=False]"]):
        assert list(ours / (0.5 * two + 1e-6)) * 2 == pytest.approx(wanted, abs=2e-6)
    assert list(group_advantages(rewards, "none")) * 2 == pytest.approx(EXPECTED["verl"]["drgrpo_adv"], abs=2e-6)
    for wanted in (EXPECTED["verl"]["rloo_adv"], EXPECTED["nemo_rl"]["grpo_adv[loo=True]"]):
        assert list(group_advantages(rewards, "leave_one_out")) * 2 == pytest.approx(wanted, abs=2e-6)
    assert group_advantages(np.array([3.0]), "leave_one_out").tolist() == [0.0]


def test_global_advantages_equal_published() -> None:
    """REINFORCE++ with the group's baseline, whitened over tokens.

    verl uses the sample variance of 18 tokens.
    """
    samples = [
        Sample(np.zeros(len(row) + 1, np.int32), np.ones(len(row), bool), i // 2, reward=1.0 - i % 2)
        for i, row in enumerate(rows("logp"))
    ]
    found = [
        s.advantages[0] * math.sqrt(17 / 18) for s in algorithm("grpo", "grpo.advantage=global").credit(samples)[0]
    ]
    assert found == pytest.approx(EXPECTED["verl"]["rpp_adv0"], abs=2e-6)


def test_surrogate_by_hand() -> None:
    """At ratio 1.5 a good action is clipped to 1.2, and a bad one is not. At ratio 0.5 it is the other way round."""
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    loss, clipped = clipped_surrogate(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    assert clipped.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_value_by_hand() -> None:
    """Old value 0, return 1.

    Beyond the clip the larger error of the clipped value counts, without a gradient. A value that moves away is never
    clipped.
    """
    values = torch.tensor([0.1, 0.5, -0.5], requires_grad=True)
    loss, clipped = clipped_value(values, torch.zeros(3), torch.ones(3), 0.2)
    assert loss.tolist() == pytest.approx([0.5 * 0.9**2, 0.5 * 0.8**2, 0.5 * 1.5**2])
    assert clipped.tolist() == [0.0, 1.0, 0.0]
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, -1.5])
    assert clipped_value(values, torch.zeros(3), torch.ones(3), 0.0)[0].tolist() == pytest.approx([0.405, 0.125, 1.125])


def test_kl_by_hand() -> None:
    """The policy's probability is twice the reference's: log 2, its square over 2, 1/2 - 1 + log 2.

    The formulas also hold for large differences: they are not Taylor series.
    """
    pair = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    two = math.log(2)
    assert [kl_estimate(k, *pair).item() for k in ("k1", "k2", "k3")] == pytest.approx([two, two**2 / 2, two - 0.5])
    assert kl_estimate("k3", torch.tensor([-10.0]), torch.tensor([0.0])).item() == pytest.approx(math.exp(10) - 11)


def test_preference_by_hand() -> None:
    h = torch.tensor([0.0, 2.0])
    assert preference(h, "sigmoid", 0.5).tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1))])
    assert preference(h, "sigmoid", 0.5, 0.25)[1].item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.25)
    assert preference(h, "sigmoid", 0.5, 0.0, 1.0).tolist() == pytest.approx([math.log(1 + math.e), math.log(2)])
    assert preference(h, "ipo", 0.5).tolist() == [1.0, 1.0]
    assert wins(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_gae_by_hand() -> None:
    """With two tokens, the last gets its reward alone.

    The first one gets the second's value and, times gamma lambda, its advantage.
    """
    advantages, returns = gae(np.array([0.5, 1.0]), np.array([0.2, 0.4]), 0.9, 0.5)
    assert advantages.tolist() == pytest.approx([0.5 + 0.9 * 0.4 - 0.2 + 0.45 * 0.6, 0.6])
    assert returns.tolist() == pytest.approx([0.5 + 0.36 + 0.27, 1.0])


def test_repeats_by_hand() -> None:
    assert repeats(np.array([1, 2, 1, 2, 1]), 2).tolist() == [False, False, False, True, True]
    assert repeats(np.array([7, 7, 7]), 1).tolist() == [False, True, True]
    assert not repeats(np.array([7, 7]), 3).any()


def test_adamw_equals_torch() -> None:
    torch.manual_seed(0)
    p = torch.randn(500, dtype=torch.float64)
    twin, moments = torch.nn.Parameter(p.clone()), (torch.zeros_like(p), torch.zeros_like(p))
    published = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), eps=0.1, weight_decay=0.1)
    for step in range(1, 6):
        grad, shrink = torch.randn_like(p), 0.3 if step % 2 else 1.0
        twin.grad = grad * shrink
        published.step()
        operations.adamw(p, grad, moments, step, 1e-2, (0.9, 0.95), 0.1, 0.1, shrink)
        torch.testing.assert_close(p, twin.data, rtol=1e-12, atol=1e-14)
