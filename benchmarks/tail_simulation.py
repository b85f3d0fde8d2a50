"""Compute what tail.py would measure over many steps.

    python benchmarks/tail_simulation.py                             64 and 16 groups, several inflight and max_lag
    python benchmarks/tail_simulation.py --refill 3 --inflight 1     the same, if complete groups were replaced at once

The time of an engine step has a constant part, a part per sequence, and a part per token of context. Each sequence that
enters the engine is prefilled. The constants are fitted to tail.py's results for 8B shapes on an H200. The lengths are
tail.py's, and rlhf.rollout.flight chooses the groups of a step.
"""

from __future__ import annotations

import argparse

import numpy as np
from tail import Lengths

from rlhf.contracts import ABSENT
from rlhf.rollout.flight import Group, Response, choose

STEP, SEQUENCE, CONTEXT, PREFILL = 5.6e-3, 20e-6, 0.033e-6, 32e-6  # seconds
PROMPT, SIBLINGS = 128, 8


class Simulation:
    """Groups in flight: the number of tokens of each response, and the steps that drew them.

    refill: if above 0, a complete group is replaced at once, and this is the limit of groups in flight within a step,
    in units of prompts. 0: groups begin only between steps, as in rlhf.
    """

    def __init__(self, prompts: int, inflight: float, max_lag: int, lengths: Lengths, refill: int = 0):
        self.prompts, self.size, self.max_lag, self.lengths, self.refill = (
            prompts,
            round(inflight * prompts),
            max_lag,
            lengths,
            refill,
        )
        self.flight: list[Group] = []
        self.begun = 0

    def step(self, step: int) -> tuple[float, list[int]]:
        """Run one step. Returns its seconds, and the versions of the tokens on which it trains."""
        open_groups = sum(not group.complete for group in self.flight) if self.refill else len(self.flight)
        for _ in range(self.size - open_groups):
            self._begin(step)
        jobs = [
            (group, k) for group in self.flight for k, response in enumerate(group.responses) if not response.finish
        ]
        known, left = self._tokens(jobs)
        gone = np.zeros_like(left)
        chosen = choose(self.flight, self.prompts, step, self.max_lag)
        seconds = 0.0 if chosen else PREFILL * float((PROMPT + known).sum())
        while not chosen:
            active = gone < left
            tokens = int((left - gone)[active].min())
            context = (PROMPT + known + gone)[active].sum() + active.sum() * tokens / 2
            seconds += tokens * (STEP + SEQUENCE * active.sum() + CONTEXT * context)
            gone[active] += tokens
            for i in np.flatnonzero(active & (gone == left)):
                group, k = jobs[i]
                group.responses[k].finish = "length"
                if group.complete and len(self.flight) < self.refill * self.prompts:
                    begun = self._begin(step)
                    fresh = [(begun, k) for k in range(SIBLINGS)]
                    jobs += fresh
                    known, left = (
                        np.append(old, new) for old, new in zip((known, left), self._tokens(fresh), strict=True)
                    )
                    gone = np.append(gone, np.zeros(SIBLINGS, int))
                    seconds += PREFILL * PROMPT * SIBLINGS
            chosen = choose(self.flight, self.prompts, step, self.max_lag)
        for (group, k), tokens in zip(jobs, gone, strict=True):
            group.responses[k].version += [step] * int(tokens)
        self.flight = [group for group in self.flight if group not in chosen]
        return seconds, [version for group in chosen for response in group.responses for version in response.version]

    def _begin(self, step: int) -> Group:
        group = Group(ABSENT, divmod(self.begun, self.prompts), step, [Response() for _ in range(SIBLINGS)])
        self.flight.append(group)
        self.begun += 1
        return group

    def _tokens(self, jobs: list[tuple[Group, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of tokens of each of these responses, and the number still missing."""
        known = np.array([len(group.responses[k].version) for group, k in jobs])
        return known, np.array([self.lengths.of(group.key, k) for group, k in jobs]) - known


def measure(simulation: Simulation, warm: int, steps: int) -> tuple[float, dict[int, float]]:
    """Return the seconds per trained token, and the share of tokens by age."""
    total, lags = 0.0, np.zeros(0, int)
    for step in range(warm + steps):
        seconds, versions = simulation.step(step)
        if step >= warm:
            total, lags = total + seconds, np.concatenate([lags, step - np.array(versions)])
    return total / len(lags), {lag: float((lags == lag).mean()) for lag in range(int(lags.max()) + 1)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--groups", type=int, nargs="*", default=[64, 16])
    p.add_argument("--inflight", type=float, nargs="*", default=[1.0, 1.25, 1.5, 2.0])
    p.add_argument("--max-lag", type=int, nargs="*", default=[2, 4, 6])
    p.add_argument(
        "--refill",
        type=int,
        default=0,
        help="limit of groups in flight within a step, in units of prompts; 0: no replacement within a step",
    )
    p.add_argument("--warm", type=int, default=8)
    p.add_argument("--steps", type=int, default=12)
    a = p.parse_args()
    for groups in a.groups:
        equal, _ = measure(Simulation(groups, 1, 1, Lengths(906, 16384, 0.0)), 0, 1)
        print(f"{groups} groups of equal lengths: {1e6 * equal:.1f} us per token")
        for inflight in a.inflight:
            for max_lag in a.max_lag[: None if inflight > 1 or a.refill else 1]:
                seconds, ages = measure(
                    Simulation(groups, inflight, max_lag, Lengths(906, 16384, 1.0), a.refill), a.warm, a.steps
                )
                shares = ", ".join(f"{share:.0%}" for share in ages.values())
                print(
                    f"  {inflight:g} in flight, max_lag {max_lag}: {seconds / equal:.2f} x; tokens by age {shares}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
