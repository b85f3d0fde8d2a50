"""PPO with a critic (Schulman et al., 1707.06347), as InstructGPT uses it (2203.02155): the KL to the reference is in the reward.

Reward of a response: its worth, divided by the running deviation (ppo.reward_scale) and then clipped (ppo.reward_clip), at its last token;
minus at every token the coefficient times the KL estimate of old policy and reference, and ppo.ngram_penalty where the token completes an
n-gram again. A response that the length limit cut is worth what its text is worth: no EOS is made up, and since the value behind its last
token was never computed, it is an end like others (no bootstrap).
"""

from __future__ import annotations

import numpy as np
import torch

from rlhf.algorithms.functional import clipped_surrogate, clipped_value, gae, kl_estimate, mean_loss, repeats, whiten
from rlhf.config import Config
from rlhf.contracts import Algorithm, Batch, Loss, Output, Sample, Sums


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

    def credit(self, samples: list[Sample]) -> tuple[list[Sample], Sums]:
        """Advantages and returns of every response token. kl is of whole responses: the sum of k1 over tokens, never divided by them."""
        c, n = self.config, float(len(samples))
        coefficient = self.state.get("kl_coefficient", c.kl) if c.kl_target else c.kl
        worth = self._worth(np.array([s.reward for s in samples]))
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
            error = np.clip(kl / n / c.kl_target - 1, -0.2, 0.2)  # 1909.08593, section 2.2
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

    def _worth(self, rewards: np.ndarray) -> np.ndarray:
        """Rewards of responses, scaled by the deviation of all seen so far (these included; as they are while it is 0) and clipped."""
        c, state = self.config, self.state
        if c.reward_scale:
            count, mean, squares = (state.get(f"reward_{name}", 0.0) for name in ("count", "mean", "squares"))
            total, shift = count + len(rewards), rewards.mean() - mean
            squares += ((rewards - rewards.mean()) ** 2).sum() + shift**2 * count * len(rewards) / total
            mean += shift * len(rewards) / total
            state |= {"reward_count": total, "reward_mean": float(mean), "reward_squares": float(squares)}
            rewards = rewards / (np.sqrt(squares / total) or 1.0)
        return np.clip(rewards, -c.reward_clip, c.reward_clip) if c.reward_clip else rewards


def _summary(samples: list[Sample]) -> Sums:
    """Means over response tokens, and the share of the returns' variance that the values explain."""
    flat = {name: np.concatenate([getattr(s, name)[s.mask] for s in samples]) for name in ("values", "returns", "advantages")}
    sums: Sums = {name: (float(stream.sum()), float(len(stream))) for name, stream in flat.items()}
    variance = float(flat["returns"].var())
    if variance:
        sums["explained_variance"] = (1.0 - float((flat["returns"] - flat["values"]).var()) / variance, 1.0)
    return sums
