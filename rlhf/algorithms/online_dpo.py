"""Online DPO (Guo et al., 2402.04792): the policy samples, the reward ranks, and DPO learns from the pairs.

A response that was drawn twice is one response: equal texts would make pairs out of the scorer's rounding.
"""

from __future__ import annotations

from rlhf.algorithms.dpo import DPO
from rlhf.config import Config
from rlhf.contracts import Sample, Sums, differ, groups, worth
from rlhf.errors import UserError


class OnlineDPO(DPO):
    summary = "DPO on pairs that the policy samples and the reward ranks"
    form = "prompts"
    aliases = ("online_dpo",)
    online = True

    def __init__(self, config: Config):
        super().__init__(config)
        if config.rollout.group < 2:
            raise UserError("rollout.group=1 makes no pairs: sample at least 2 responses per prompt")

    def credit(self, samples: list[Sample]) -> tuple[list[Sample], Sums]:
        """Each group's best and worst response (the first of equals), or all of them; groups of equal rewards are dropped.

        Empty where all groups tie: then there is nothing to learn in this step.
        """
        kept: list[Sample] = []
        drawn, tied, gap = groups(samples), 0, 0.0
        for group in drawn:
            distinct: dict[bytes, Sample] = {}
            for sample in group:
                distinct.setdefault(sample.tokens.tobytes(), sample)
            members = list(distinct.values())
            ranked = worth([s.reward for s in members])
            best, worst = members[ranked.argmax()], members[ranked.argmin()]
            gap += best.reward - worst.reward
            if not differ([best.reward, worst.reward]):
                tied += 1
            else:
                kept += [best, worst] if self.keys.pairs == "best_worst" else members
        return kept, {"tied": (float(tied), float(len(drawn))), "reward_gap": (gap, float(len(drawn)))}
