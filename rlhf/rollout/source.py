"""Where a run's samples come from: straight from the data, or from an engine that answers its prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from rlhf.config import Config
from rlhf.contracts import ABSENT, Sample, Sampling, Sums, Verdict, differ, groups
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.parallel.mesh import Mesh
from rlhf.rewards import Environments
from rlhf.rollout.flight import Group, Response
from rlhf.rollout.judge import Judge
from rlhf.rollout.owner import EngineOwner
from rlhf.rollout.sampler import Sampler, seeded

Weights = Mapping[str, Tensor]


class Source(Protocol):
    """Samples for the steps of a run."""

    def take(self, step: int) -> tuple[list[Sample], Sums]:
        """The samples of a step, counted from 0, identical on every rank, with metrics."""
        ...

    def offer(self, weights: Weights, version: int, check: bool = False) -> None:
        """The policy's weights after `version` steps. With check, prove that samples will be drawn with them."""
        ...

    def describe(self, samples: list[Sample]) -> Sums:
        """Metrics of samples whose streams and rewards are complete."""
        ...

    def remarks(self) -> list[str]:
        """What a person should know of it when a run starts."""
        ...

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must keep for the next step to be the same, identical on every rank; None: nothing. Every rank calls it."""
        ...

    def resume(self, step: int, state: dict[str, Any] | None) -> None:
        """Go on after so many steps, from what state() gave."""
        ...


@dataclass(slots=True)
class DataSource:
    """The records themselves are the samples."""

    config: Config
    records: Records

    def take(self, step: int) -> tuple[list[Sample], Sums]:
        return self.records.draw(step, self.config.batch.prompts, self.config.seed), {}

    def offer(self, weights: Weights, version: int, check: bool = False) -> None:
        pass

    def describe(self, samples: list[Sample]) -> Sums:
        return {}

    def remarks(self) -> list[str]:
        return []

    def state(self) -> dict[str, Any] | None:
        return None

    def resume(self, step: int, state: dict[str, Any] | None) -> None:
        pass


@dataclass(slots=True)
class EngineSource:
    """Every engine (rollout.tp consecutive ranks) generates for its share of the prompts; then all ranks know all samples."""

    config: Config
    mesh: Mesh
    owner: EngineOwner
    tokenizer: Tokenizer
    records: Records
    judge: Judge
    score: Callable[[Sequence[Sample]], list[np.ndarray]] = ABSENT  # the policy's log-probs [L] of each sample
    tolerance: float = 0.0  # of the mean |engine - policy| over log-probs
    environments: Environments | None = None  # that answer the turns of responses that are judged
    sampler: Sampler = field(init=False)
    flight: list[Group] = field(default_factory=list)  # of this engine, in the order in which they were drawn (rollout.inflight > 1)
    drawn: int = 0  # groups of all engines that have been begun since the run began, ...
    taken: int = 0  # ... and that steps have taken
    notes: list[str] = field(default_factory=list)  # on what was resumed

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.config, self.mesh, self.owner, self.tokenizer, self.environments)

    def take(self, step: int) -> tuple[list[Sample], Sums]:
        """The step's samples, grouped by prompt.

        With rollout.rounds > 1, groups of equal rewards are left out and more prompts drawn instead (dynamic sampling, DAPO, 2503.14476),
        until batch.prompts groups are kept or the rounds are over; if no group is ever kept, the last round's are.
        """
        rounds, count = self.config.rollout.rounds, self.config.batch.prompts
        kept: list[list[Sample]] = []
        for turn in range(rounds):
            drawn = groups(self._next(step, turn))
            kept += drawn if rounds == 1 else [group for group in drawn if differ([s.reward for s in group])]
            if len(kept) >= count:
                break
        samples = [sample for group in (kept or drawn)[:count] for sample in group]
        sums: Sums = {"time/reward": (self.sampler.waited, 1.0)}  # within the rollout's time
        self.sampler.waited = 0.0
        if rounds > 1:
            sums |= {"rounds": (turn + 1.0, 1.0), "groups_kept": (float(len(kept)), float((turn + 1) * count))}
        if self.config.rollout.inflight > 1:
            sums |= {**ages(samples, step, self.config.rollout.max_lag), "in_flight": (float(self.drawn - self.taken), 1.0)}
        return samples, sums

    def offer(self, weights: Weights, version: int, check: bool = False) -> None:
        self.owner.offer(weights, version)
        if check or self.config.rollout.check:
            self._compare()  # the policy scores, and the engine sleeps meanwhile
            self.owner.offer(weights, version)

    def describe(self, samples: list[Sample]) -> Sums:
        """As summary(), with the mean |engine - learner| of log-probs where the policy has scored them."""
        sums = summary(samples)
        if all(s.old_logp is not ABSENT for s in samples):
            gaps = _gaps(samples, [s.old_logp for s in samples])
            sums["mismatch"] = (float(gaps.sum()), float(len(gaps)))
        return sums

    def remarks(self) -> list[str]:
        stay, cross = self.owner.volume()
        return [f"publish: of the weights {stay / 1e9:.3g} GB stay on this rank, and {cross / 1e9:.3g} GB come from others", *self.notes]

    def state(self) -> dict[str, Any] | None:
        """The groups that are in flight on all engines, oldest first, with all that is known of their responses."""
        if self.config.rollout.inflight == 1:
            return None
        mine = [
            (group.key, k, {"begun": group.begun, **response.state()})
            for group in self.flight
            for k, response in enumerate(group.responses)
            if self.sampler.judges(group, k)
        ]
        found = sorted((item for part in self.mesh.all_gather(mine) for item in part), key=lambda item: item[:2])
        responses = [(key, response) for key, _, response in found]
        engines, _ = self.sampler.engines
        return {"engines": engines, "drawn": self.drawn, "taken": self.taken, "responses": responses}

    def resume(self, step: int, state: dict[str, Any] | None) -> None:
        """Take up what was in flight. Where the number of engines is another, those groups are begun anew."""
        if self.config.rollout.inflight == 1:
            return
        if state is None:  # a checkpoint of before
            self.drawn = self.taken = step * self.config.batch.prompts
            return
        self.drawn, self.taken = state["drawn"], state["taken"]
        held: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for key, response in state["responses"]:
            held.setdefault(tuple(key), []).append(response)
        oldest = min((batch for batch, _ in held), default=0) * self.config.batch.prompts
        self.flight = self.sampler.opened([group for group in self._span(oldest, self.drawn, step) if group.key in held])
        if state["engines"] != self.sampler.engines[0]:
            self.notes.append(
                f"{len(held)} groups that were in flight on {state['engines']} engines begin anew on {self.sampler.engines[0]}"
            )
            return
        for group in self.flight:
            group.begun = held[group.key][0]["begun"]
            for k, known in enumerate(held[group.key]):
                response = group.responses[k] = Response.restored(known)
                if response.finish and self.sampler.judges(group, k):
                    response.sample = self.sampler.sample(group.prompt, response)
                    response.sample.reward = known["reward"]
                    response.sample.verdict = Verdict(known["rule"], known["score"], known["failed"])

    def answer(self, prompts: list[Sample], judge: Judge) -> list[Sample]:
        """One rewarded response per held-out prompt, at evaluate.temperature; the same draws at every evaluation."""
        sampling = replace(self.sampler.sampling(), temperature=self.config.evaluate.temperature, top_p=1.0, top_k=0)
        return self.sample(prompts, sampling, 1, 0, judge)

    def probe(self, prompts: list[Sample]) -> list[Sample]:
        """A few tokens after each prompt, drawn from the unfiltered distribution, to compare log-probs with; never rewarded."""
        sampling = replace(self.sampler.sampling(), max_tokens=min(8, self.config.rollout.max_tokens), top_p=1.0, top_k=0)
        return self.sampler.gather(self._run(prompts, sampling, 1, 0, None))

    def sample(self, prompts: list[Sample], sampling: Sampling, group: int, step: int, judge: Judge) -> list[Sample]:
        """`group` rewarded responses to each prompt. Draws depend on (seed, step, prompt, sibling) alone."""
        return self.sampler.gather(self._run(prompts, sampling, group, step, judge))

    def _compare(self) -> None:
        """Sample a little and let the policy score it: engine and learner must give the same log-probs."""
        samples = self.probe(self.records.head(2 * self.mesh.world))
        gaps = _gaps(samples, self.score(samples))
        if not gaps.mean() < self.tolerance:
            raise RuntimeError(
                f"after publishing, the engine's log-probs differ from the policy's by {gaps.mean():.3g} on average"
                f" ({gaps.max():.3g} at most): it does not generate with the weights that were trained"
            )

    def _next(self, step: int, turn: int) -> list[Sample]:
        """The samples of batch.prompts more groups. Each engine gives its share of them, and keeps what is in flight beyond that."""
        engines, engine = self.sampler.engines
        quota = len(range(engine, self.config.batch.prompts, engines))  # where they do not divide it, the first ones give one more
        flight = self.flight + self.sampler.opened(self._fresh(step, turn))
        chosen = self.sampler.generate(flight, self.sampler.sampling(), step, quota, self.judge)
        taken = set(chosen)
        self.flight = [group for group in flight if group not in taken]
        self.taken += self.config.batch.prompts
        return self.sampler.gather(chosen)

    def _run(self, prompts: list[Sample], sampling: Sampling, size: int, step: int, judge: Judge | None) -> list[Group]:
        """This engine's share of the prompts, answered as a whole."""
        groups = self.sampler.begin(prompts, size, step, step)
        if judge:
            groups = self.sampler.opened(groups)
        return self.sampler.generate(groups, sampling, step, len(groups), judge)

    def _fresh(self, step: int, turn: int) -> list[Group]:
        """The groups of this engine that are begun now. Who is drawn when depends on nothing but the seed, the step and the turn.

        As many as a step takes; with rollout.inflight > 1, as many as bring those in flight back to that many times batch.prompts.
        """
        count, seed = self.config.batch.prompts, self.config.seed
        if self.config.rollout.inflight == 1:  # further rounds go through the data in orders of their own
            prompts = self.records.draw(step, count, seeded(seed, turn) if turn else seed)
            for prompt in prompts:
                prompt.group += turn * count
            return self.sampler.begin(prompts, self.config.rollout.group, step, step)
        begin, self.drawn = self.drawn, self.taken + round(self.config.rollout.inflight * count)
        return self._span(begin, self.drawn, step)

    def _span(self, begin: int, end: int, step: int) -> list[Group]:
        """This engine's groups of the prompts from begin to end, counted from the run's first one, begun in a step."""
        count, size = self.config.batch.prompts, self.config.rollout.group
        groups: list[Group] = []
        for batch in range(begin // count, -(-end // count)):
            groups += self.sampler.begin(self.records.draw(batch, count, self.config.seed), size, batch, step)
        for group in groups:
            group.prompt.group += group.key[0] * count  # unique among all that are in flight
        return [group for group in groups if begin <= group.prompt.group < end]


def summary(samples: list[Sample]) -> Sums:
    """What a step's samples look like, as (sum, count)."""
    n = float(len(samples))
    both = [(s.verdict.rule, s.verdict.score) for s in samples if s.verdict.score is not None]  # those that a reward model scored, too
    return {
        "reward_rule": (sum(rule for rule, _ in both), float(len(both))),
        "reward_score": (sum(score for _, score in both), float(len(both))),
        "reward": (sum(s.reward for s in samples), n),
        "response_tokens": (float(sum(s.mask.sum() for s in samples)), n),
        "truncated": (float(sum(s.truncated for s in samples)), n),
        "reward_failed": (float(sum(s.verdict.failed for s in samples)), n),
    }


def ages(samples: list[Sample], step: int, max_lag: int) -> Sums:
    """How many steps old the weights were that drew what a step learns from: the share of tokens of each age, and the highest age."""
    lags = np.concatenate([step - s.version[s.mask] for s in samples])
    shares = {f"lag/{lag}": (float((lags == lag).sum()), float(len(lags))) for lag in range(max_lag + 1)}
    return {**shares, "lag_max": (float(lags.max()), 1.0)}


def _gaps(samples: Sequence[Sample], logp: Sequence[np.ndarray]) -> np.ndarray:
    """|engine - learner| of the log-prob of every sampled token."""
    return np.concatenate([np.abs(learner - s.sampler_logp)[s.mask] for s, learner in zip(samples, logp, strict=True)])
