"""Group relative policy optimisation (Shao et al., 2402.03300) and variants. The group's mean reward is the baseline.

All tokens of a response have the same advantage. It depends on the rewards r of the group and on grpo.advantage:
  std            (r - mean) / (std + 1e-6) with the population deviation (Megatron: 1e-4; verl, NeMo: sample deviation)
  none           r - mean (Dr.GRPO, 2503.20783)
  leave_one_out  r - mean of the group's other rewards (RLOO, 2402.14740)
  global         r - mean, then whitened over all tokens of the step (REINFORCE++ baseline, 2501.03262). The variance is
                 the population variance. verl uses the sample variance.
The paper averages the loss over the tokens of each response, then over responses. grpo.mean also offers the averages of
DAPO (2503.14476) and Dr.GRPO.

grpo.kl_ratio multiplies the KL estimate of a token by its ratio policy / old policy, through which the gradient flows
(DeepSeek-V3.2, 2512.02556; TRL's use_bias_correction_kl). With k1 and k3, the expected value and gradient are then
those of KL(policy || reference), although the old policy sampled the token. With grpo.ratio=sequence, TRL uses the
ratio of the response instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.algorithms.functional import (
    MismatchCap,
    MismatchMode,
    clipped_surrogate,
    clipped_weight,
    kl_estimate,
    mean_loss,
    mismatch_limits,
    sampler_weight,
    seq_mean,
    spread,
    whiten,
)
from rlhf.config import Config
from rlhf.contracts import Algorithm, Batch, Loss, Output, Sample, Sums, Total, alone, differ, groups
from rlhf.errors import UserError
from rlhf.lazy import np


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Group relative policy optimisation (2402.03300) and its variants."""

    advantage: Literal["std", "none", "leave_one_out", "global"] = "std"  # as GRPO, Dr.GRPO, RLOO or REINFORCE++
    ratio: Literal["token", "sequence"] = "token"  # sequence: geometric mean over the response (GSPO, 2507.18071)
    objective: Literal["clip", "cispo"] = "clip"  # cispo: the clipped ratio is a constant weight of logp (2506.13585)
    clip_low: float = 0.2  # ratio >= 1 - clip_low
    clip_high: float = 0.2  # ratio <= 1 + clip_high
    kl: float = 0.04  # weight of the KL to the reference in the loss; 0 needs no reference model
    kl_kind: Literal["k1", "k2", "k3"] = "k3"  # estimator of that KL
    kl_ratio: bool = False  # multiply that KL by the policy / old policy ratio: unbiased after updates (2512.02556)
    mean: Literal["sequence", "token", "constant"] = "sequence"  # average of the loss, as GRPO, DAPO or Dr.GRPO
    mismatch_cap: MismatchCap = -1.0  # cap of policy / sampler ratio; -1: 2 if inflight > 1; 0: off (for top_p, top_k)
    mismatch_floor: float = 0.0  # lower limit of that ratio
    mismatch_mode: MismatchMode = "token_truncate"  # clip or mask tokens or responses (docs/rollouts.md)
    overlong: Literal["keep", "mask", "shape"] = "keep"  # truncated responses: learned, not learned, penalised (DAPO)
    overlong_buffer: int = 0  # the penalty grows from 0 to 1 over this many tokens before rollout.max_tokens


class GRPO(Algorithm):
    summary = "group relative policy optimisation: sample, verify, update"
    form = "prompts"
    section = "grpo", Keys
    online = True
    weighs = True
    rule = "math"

    def __init__(self, config: Config):
        super().__init__(config)
        self.keys: Keys = config.sections["grpo"]
        c, self.limit = self.keys, config.rollout.max_tokens
        self.weight_limits = mismatch_limits(config, "grpo", c.mismatch_mode, c.mismatch_floor, c.mismatch_cap)
        if config.rollout.group < 2:
            raise UserError("rollout.group=1 gives no other response to compare with: set it to 2 or more")
        if self.keys.overlong == "shape" and not 0 < self.keys.overlong_buffer <= self.limit:
            given = f"grpo.overlong=shape with grpo.overlong_buffer={self.keys.overlong_buffer}"
            raise UserError(f"{given}: set it between 1 and rollout.max_tokens={self.limit}")
        if self.keys.kl_ratio and not self.keys.kl:
            raise UserError("grpo.kl_ratio=true weights the KL, but grpo.kl=0 leaves it out: raise grpo.kl")
        # The first update of a step starts at the old policy. If it is the only update, its own forward pass gives
        # old_logp, and no scoring pass is needed.
        self.scored = config.batch.epochs * config.batch.minibatches > 1
        self.compares = not self.scored and not config.rollout.filters  # with the engine's log-probs
        self.models = {"policy": "train", "reference": "frozen"} if self.keys.kl else {"policy": "train"}
        self.streams = ("old_logp",) * self.scored + ("ref_logp",) * bool(self.keys.kl)

    def credit(self, samples: list[Sample], total: Total = alone) -> tuple[list[Sample], Sums]:
        """Write advantages. Return the samples to learn from, and metrics.

        With overlong=mask, truncated responses count in their group's baseline but are not returned. A response that
        failures have left alone in its group has no baseline and is not returned.
        """
        c, drawn, silent = self.keys, groups(samples), 0
        for group in drawn:
            rewards = np.array([s.reward - self._penalty(s) for s in group])
            silent += not differ(rewards)
            for sample, advantage in zip(group, group_advantages(rewards, c.advantage), strict=True):
                sample.advantages = np.where(sample.mask, advantage, 0.0).astype(np.float32)
        lone = {group[0].group for group in drawn if len(group) == 1}
        learned = [s for s in samples if s.group not in lone and not (c.overlong == "mask" and s.truncated)]
        if c.advantage == "global":
            whiten(learned, total)
        of = float(len(drawn))
        sums = {"silent": (float(silent), of)}  # groups of equal rewards, whose advantages are all 0
        sums["lone"] = (float(len(lone)), of)
        if c.overlong == "shape":
            sums["overlong"] = (sum(map(self._penalty, samples)), float(len(samples)))
        return learned, sums

    def _penalty(self, sample: Sample) -> float:
        """Return the soft overlong punishment of DAPO (2503.14476, eq. 13) as a positive number.

        It is 0 before the buffer, and 1 at the length limit and for truncated responses.
        """
        if self.keys.overlong != "shape":
            return 0.0
        into = float(len(sample.mask) - sample.mask.argmax()) - (self.limit - self.keys.overlong_buffer)
        return 1.0 if sample.truncated else min(max(into / self.keys.overlong_buffer, 0.0), 1.0)

    def loss(self, role: str, batch: Batch, out: Output) -> Loss:
        c, x, mask = self.keys, batch.streams, batch.mask
        old = x["old_logp"] if self.scored else out.logp.detach()
        log_ratio = per_token = (out.logp - old) * mask  # 0 on prompts, which are not learned: exp() could overflow
        if c.ratio == "sequence":  # GSPO (2507.18071, eq. 7); the paper clips at 3e-4 and 4e-4
            log_ratio = spread(seq_mean(log_ratio, batch), batch)
        if c.objective == "cispo":
            loss, clipped = clipped_weight(out.logp, log_ratio, x["advantages"], c.clip_low, c.clip_high)
        else:
            loss, clipped = clipped_surrogate(log_ratio, x["advantages"], c.clip_low, c.clip_high)
        metrics = {"clipped": clipped, "entropy": out.entropy}
        if self.compares:
            metrics["mismatch"] = (old - x["sampler_logp"]).abs()
        if self.weight_limits:
            weight, metrics["capped"] = sampler_weight(old, x["sampler_logp"], batch, *self.weight_limits)
            loss = loss * weight
        if c.kl:
            metrics["kl"] = kl_estimate(c.kl_kind, out.logp * mask, x["ref_logp"] * mask)
            loss = loss + c.kl * (metrics["kl"] * per_token.exp() if c.kl_ratio else metrics["kl"])
        return mean_loss(loss, batch, c.mean, self.limit, **metrics)


def group_advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Return the advantages of one group from its rewards, before the whitening of "global".

    A group of one has the advantage 0.
    """
    centred = rewards - rewards.mean()
    if kind == "std":
        return centred / (rewards.std() + 1e-6)
    if kind == "leave_one_out":
        return centred * len(rewards) / max(len(rewards) - 1, 1)
    return centred
