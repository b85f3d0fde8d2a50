"""Online DPO (Guo et al., 2402.04792): the policy samples responses, rewards rank them, and DPO learns from the pairs.

Equal responses of a group count as one. Otherwise the rounding of the reward model could make a pair of two equal
texts.
"""

from __future__ import annotations

from rlhf.algorithms.dpo import DPO
from rlhf.config import Config
from rlhf.contracts import Sample, Sums, Total, alone, differ, groups, worth
from rlhf.errors import UserError


class OnlineDPO(DPO):
    summary = "DPO on pairs of sampled responses, ranked by their rewards"
    form = "prompts"
    aliases = ("online_dpo",)
    online = True

    def __init__(self, config: Config):
        super().__init__(config)
        if config.rollout.group < 2:
            raise UserError("rollout.group=1 makes no pairs: set it to 2 or more")

    def credit(self, samples: list[Sample], total: Total = alone) -> tuple[list[Sample], Sums]:
        """Return each group's best and worst response (dpo.pairs=best_worst) or all its responses, and metrics.

        Among equal rewards, the first response is taken. Groups of equal rewards are dropped. If all groups are
        dropped on all replicas, the step has no update.
        """
        kept: list[Sample] = []
        drawn, tied, lone, gap = groups(samples), 0, 0, 0.0
        for group in drawn:
            lone += len(group) == 1  # failures have left no other response to compare with
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
        sums = {"tied": float(tied), "lone": float(lone), "reward_gap": gap}
        return kept, {name: (total, float(len(drawn))) for name, total in sums.items()}
