"""PPO with a critic (Schulman et al., 1707.06347). As in InstructGPT (2203.02155), rewards include a KL penalty.

The rewards of a response's tokens are:
  last token   the reward of the response. It is first divided by the deviation of all rewards so far (ppo.reward_scale)
               unless that is 0, and then clipped (ppo.reward_clip).
  every token  minus the KL coefficient times the KL estimate between the old policy and the reference; minus
               ppo.ngram_penalty if the token completes a repeated n-gram.
A response that the length limit ended is treated like the others. No EOS is added, and the value after its last token
is 0 (no bootstrap).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf.algorithms.functional import (
    MismatchCap,
    MismatchMode,
    clipped_surrogate,
    clipped_value,
    gae,
    kl_estimate,
    learned,
    mean_loss,
    mismatch_limits,
    moments,
    repeats,
    running_deviation,
    sampler_weight,
    whiten,
)
from rlhf.config import Between, Config
from rlhf.contracts import Algorithm, Batch, Loss, Output, Sample, Sums, Total, alone
from rlhf.errors import UserError
from rlhf.lazy import np, torch

ERROR = 0.2  # the relative error of the KL against ppo.kl_target is clipped to this (1909.08593, section 2.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Proximal policy optimisation with a critic (1707.06347, 2203.02155)."""

    clip_low: float = 0.2  # ratio >= 1 - clip_low
    clip_high: float = 0.2  # ratio <= 1 + clip_high
    value_clip: float = 0.2  # the value loss is clipped if a value moves further than this from its old value; 0: off
    gamma: Annotated[float, Between(0, 1)] = 1.0  # discount of returns
    lam: Annotated[float, Between(0, 1)] = 0.95  # lambda of generalised advantage estimation (1506.02438)
    whiten: bool = True  # advantages of the step get mean 0 and deviation 1
    kl: float = 0.02  # coefficient of the KL to the reference in each token's reward; 0 needs no reference
    kl_kind: Literal["k1", "k2", "k3"] = "k1"  # estimator of that KL
    kl_target: float = 0.0  # adapt ppo.kl to reach this KL of a whole response (1909.08593); 0: ppo.kl stays fixed
    kl_horizon: float = 10000.0  # number of responses over which ppo.kl adapts
    reward_clip: float = 0.0  # largest absolute reward of a response, after scaling; 0: no clipping
    reward_scale: bool = False  # divide rewards by their running standard deviation
    ngram: int = 0  # length of n-grams; a token that completes a repeated n-gram gets a penalty; 0: no penalty
    ngram_penalty: float = 1.0  # amount that is subtracted from such a token's reward
    mismatch_cap: MismatchCap = -1.0  # cap of policy / sampler ratio; -1: 2 if inflight > 1; 0: off (for top_p, top_k)
    mismatch_floor: float = 0.0  # lower limit of that ratio
    mismatch_mode: MismatchMode = "token_truncate"  # clip or mask tokens or responses (docs/rollouts.md)
    critic_warmup: int = 0  # number of first steps in which only the critic learns


class PPO(Algorithm):
    summary = "PPO: sample, score with the reward model, update policy and critic (also called ppo)"
    form = "prompts"
    aliases = ("ppo",)
    section = "ppo", Keys
    online = True
    weighs = True
    models = {"policy": "train", "critic": "train"}

    def __init__(self, config: Config):
        super().__init__(config)
        self.keys: Keys = config.sections["ppo"]
        c = self.keys
        self.weight_limits = mismatch_limits(config, "ppo", c.mismatch_mode, c.mismatch_floor, c.mismatch_cap)
        # The first update of a step starts at the old policy. If it is the only update, its own forward pass gives
        # old_logp, and a scoring pass is needed only for the KL.
        self.scored = config.batch.epochs * config.batch.minibatches > 1 or bool(self.keys.kl)
        self.compares = not self.scored and not config.rollout.filters  # with the engine's log-probs
        self.streams = ("old_logp",) * self.scored + ("values",) + ("ref_logp",) * bool(self.keys.kl)
        self.warmup = {"policy": self.keys.critic_warmup}
        if self.keys.kl:
            self.models = {**self.models, "reference": "frozen"}
        elif self.keys.kl_target:
            raise UserError("ppo.kl_target adapts ppo.kl, but ppo.kl=0 stays 0: raise ppo.kl, or set ppo.kl_target=0")
        if self.keys.critic_warmup >= config.steps and not config.epochs:
            given = f"ppo.critic_warmup={self.keys.critic_warmup}"
            raise UserError(f"{given} leaves no step of steps={config.steps} for the policy: lower it")
        responses = config.batch.prompts * config.rollout.group
        if self.keys.kl_target and self.keys.kl_horizon <= ERROR * responses:  # the coefficient could turn negative
            short = f"ppo.kl_horizon={self.keys.kl_horizon} is too short for steps of {responses} responses"
            raise UserError(f"{short}: set it above {ERROR * responses:g}")

    def credit(self, samples: list[Sample], total: Total = alone) -> tuple[list[Sample], Sums]:
        """Write advantages and returns of every response token. Return the samples, and metrics.

        The metric kl is the mean over responses of the sum of k1 over the response's tokens.
        """
        c, n = self.keys, float(len(samples))
        coefficient = self.state.get("kl_coefficient", c.kl) if c.kl_target else c.kl
        worth = np.array([s.reward for s in samples])
        if c.reward_scale:
            worth = worth / (running_deviation(self.state, worth, total) or 1.0)
        if c.reward_clip:
            worth = np.clip(worth, -c.reward_clip, c.reward_clip)
        kl = shaped = repeated = 0.0
        for sample, reward in zip(samples, worth, strict=True):
            here = np.flatnonzero(sample.mask)  # [N] the response
            rewards = np.zeros(len(here))
            if c.kl:
                old, ref = (
                    torch.from_numpy(stream[here].astype(np.float64)) for stream in (sample.old_logp, sample.ref_logp)
                )
                rewards -= coefficient * kl_estimate(c.kl_kind, old, ref).numpy()
                kl += float((old - ref).sum())
            if c.ngram:
                again = repeats(sample.tokens[1:][here], c.ngram)
                rewards -= c.ngram_penalty * again
                repeated += float(again.sum())
            rewards[-1] += reward
            shaped += float(rewards.sum())
            sample.advantages, sample.returns = (
                np.zeros(len(sample.mask), np.float32),
                np.zeros(len(sample.mask), np.float32),
            )
            sample.advantages[here], sample.returns[here] = gae(rewards, sample.values[here], c.gamma, c.lam)
        sums = {"shaped_reward": (shaped, n), **_summary(samples, total)}
        if c.kl:
            sums |= {"kl": (kl, n), "kl_coefficient": (coefficient, 1.0)}
        if c.ngram:
            sums["repeated"] = (repeated, sums["returns"][1])
        if c.kl_target:
            kl, n = total(np.array([kl, n])).tolist()
            error = np.clip(kl / n / c.kl_target - 1, -ERROR, ERROR)
            self.state["kl_coefficient"] = float(coefficient * (1 + error * n / c.kl_horizon))
        if c.whiten:
            whiten(samples, total)
        return samples, sums

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        c, x = self.keys, batch.streams
        if role == "critic":
            loss, clipped = clipped_value(out.value, x["values"], x["returns"], c.value_clip)
            return mean_loss(loss, batch, clipped=clipped, value=out.value)
        old = x["old_logp"] if self.scored else out.logp.detach()
        log_ratio = (out.logp - old) * batch.mask  # 0 on prompts, which are not learned: exp() could overflow there
        loss, clipped = clipped_surrogate(log_ratio, x["advantages"], c.clip_low, c.clip_high)
        drift = torch.expm1(log_ratio) - log_ratio  # k3 estimate of KL(old || new): how far this step moved the policy
        metrics = {"clipped": clipped, "entropy": out.entropy, "drift": drift}
        if self.compares:
            metrics["mismatch"] = (old - x["sampler_logp"]).abs()
        if self.weight_limits:
            weight, metrics["capped"] = sampler_weight(old, x["sampler_logp"], batch, *self.weight_limits)
            loss = loss * weight
        return mean_loss(loss, batch, "token", 0, **metrics)


def _summary(samples: list[Sample], total: Total) -> Sums:
    """Return means over response tokens, and the share of the returns' variance that the values explain.

    This share is that of all replicas, and each of them counts it once.
    """
    flat = {name: learned(samples, name) for name in ("values", "returns", "advantages")}
    sums: Sums = {name: (float(stream.sum()), float(len(stream))) for name, stream in flat.items()}
    *_, whole = moments(flat["returns"], total)
    *_, rest = moments(flat["returns"] - flat["values"], total)
    if whole:
        sums["explained_variance"] = (1.0 - rest / whole, 1.0)
    return sums
