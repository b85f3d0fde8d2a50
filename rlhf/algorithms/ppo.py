"""PPO with a critic (Schulman et al., 1707.06347), as InstructGPT uses it (2203.02155): the KL to the reference is in the reward.

A response's reward, divided by the deviation of all rewards so far (ppo.reward_scale; not while that is 0) and then clipped
(ppo.reward_clip), stands at its last token. From every token's reward are taken the coefficient times the KL estimate between old policy
and reference, and ppo.ngram_penalty where the token completes an n-gram again. A response that the length limit cut is worth what its text
is worth: no EOS is made up, and since nobody computed the value behind its last token, it ends there like the others (no bootstrap).
"""

from __future__ import annotations

import numpy as np
import torch

from rlhf.algorithms.functional import clipped_surrogate, clipped_value, gae, kl_estimate, mean_loss, repeats, running_deviation, whiten
from rlhf.config import Config
from rlhf.contracts import Algorithm, Batch, Loss, Output, Sample, Sums
from rlhf.errors import UserError

ERROR = 0.2  # of the KL relative to ppo.kl_target, at most, that one step answers (1909.08593, section 2.2)


class PPO(Algorithm):
    online = True

    def __init__(self, config: Config):
        self.config = config.ppo
        self.models = {"policy": "train", "critic": "train"}
        self.streams = ("old_logp", "values")
        self.warmup = {"policy": self.config.critic_warmup}
        self.state = {}
        if self.config.kl:
            self.models["reference"] = "frozen"
            self.streams += ("ref_logp",)
        elif self.config.kl_target:
            raise UserError("ppo.kl_target adapts ppo.kl, which is 0 and would stay 0: set ppo.kl to where it starts, or ppo.kl_target=0")
        if self.config.critic_warmup >= config.steps:
            raise UserError(f"ppo.critic_warmup={self.config.critic_warmup} leaves the policy none of steps={config.steps}: lower it")
        responses = config.batch.prompts * config.rollout.group
        if self.config.kl_target and self.config.kl_horizon <= ERROR * responses:  # the coefficient could turn negative
            short = f"ppo.kl_horizon={self.config.kl_horizon} is too short for steps of {responses} responses"
            raise UserError(f"{short}: set it above {ERROR * responses:g}")

    def credit(self, samples: list[Sample]) -> tuple[list[Sample], Sums]:
        """Advantages and returns of every response token. kl is of whole responses: the sum of k1 over tokens, never divided by them."""
        c, n = self.config, float(len(samples))
        coefficient = self.state.get("kl_coefficient", c.kl) if c.kl_target else c.kl
        worth = np.array([s.reward for s in samples])
        if c.reward_scale:
            worth = worth / (running_deviation(self.state, worth) or 1.0)
        if c.reward_clip:
            worth = np.clip(worth, -c.reward_clip, c.reward_clip)
        kl = shaped = repeated = 0.0
        for sample, reward in zip(samples, worth, strict=True):
            here = np.flatnonzero(sample.mask)  # [N] the response
            rewards = np.zeros(len(here))
            if c.kl:
                old, ref = (torch.from_numpy(stream[here].astype(np.float64)) for stream in (sample.old_logp, sample.ref_logp))
                rewards -= coefficient * kl_estimate(c.kl_kind, old, ref).numpy()
                kl += float((old - ref).sum())
            if c.ngram:
                again = repeats(sample.tokens[1:][here], c.ngram)
                rewards -= c.ngram_penalty * again
                repeated += float(again.sum())
            rewards[-1] += reward
            shaped += float(rewards.sum())
            sample.advantages, sample.returns = np.zeros(len(sample.mask), np.float32), np.zeros(len(sample.mask), np.float32)
            sample.advantages[here], sample.returns[here] = gae(rewards, sample.values[here], c.gamma, c.lam)
        sums = {"shaped_reward": (shaped, n), **_summary(samples)}
        if c.kl:
            sums |= {"kl": (kl, n), "kl_coefficient": (coefficient, 1.0)}
        if c.ngram:
            sums["repeated"] = (repeated, sums["returns"][1])
        if c.kl_target:
            error = np.clip(kl / n / c.kl_target - 1, -ERROR, ERROR)
            self.state["kl_coefficient"] = float(coefficient * (1 + error * n / c.kl_horizon))
        if c.whiten:
            whiten(samples)
        return samples, sums

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        c, x = self.config, batch.streams
        if role == "critic":
            loss, clipped = clipped_value(out.value, x["values"], x["returns"], c.value_clip)
            return mean_loss(loss, batch, clipped=clipped, value=out.value)
        log_ratio = (out.logp - x["old_logp"]) * batch.mask  # prompts are not learned and may drift: no exp of theirs
        loss, clipped = clipped_surrogate(log_ratio, x["advantages"], c.clip_low, c.clip_high)
        drift = torch.expm1(log_ratio) - log_ratio  # k3 of KL(old || new): how far this step's updates have gone
        return mean_loss(loss, batch, clipped=clipped, entropy=out.entropy, drift=drift)


def _summary(samples: list[Sample]) -> Sums:
    """Means over response tokens, and the share of the returns' variance that the values explain."""
    flat = {name: np.concatenate([getattr(s, name)[s.mask] for s in samples]) for name in ("values", "returns", "advantages")}
    sums: Sums = {name: (float(stream.sum()), float(len(stream))) for name, stream in flat.items()}
    variance = float(flat["returns"].var())
    if variance:
        sums["explained_variance"] = (1.0 - float((flat["returns"] - flat["values"]).var()) / variance, 1.0)
    return sums
