"""The source of a run's samples: the data set itself, or an engine that generates responses to its prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from rlhf.config import Config
from rlhf.contracts import ABSENT, Sample, Sampling, Sums, Verdict, differ, groups, rewarded
from rlhf.data.records import Records
from rlhf.data.shares import Header, Key, deliver, headers
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import RewardError
from rlhf.output import say
from rlhf.parallel.mesh import Mesh
from rlhf.rewards import Environments
from rlhf.rollout.flight import Group, Response
from rlhf.rollout.grader import Grader
from rlhf.rollout.measures import ages, by_set, lengths, summary
from rlhf.rollout.owner import EngineOwner
from rlhf.rollout.sampler import Sampler, seeded

Weights = Mapping[str, Tensor]


class Source(Protocol):
    """Samples for the steps of a run."""

    def take(self, step: int) -> tuple[list[Sample], Sums]:
        """Return this replica's share of the samples of a step (counted from 0), and metrics.

        All ranks of a replica get the same samples. Groups are whole. The metrics are those of the whole step.
        """
        ...

    def offer(self, weights: Weights, version: int, check: bool = False) -> None:
        """Use these weights of the policy, after `version` steps, for the next samples.

        With check, raise RuntimeError if the engine does not generate with them.
        """
        ...

    def describe(self, samples: list[Sample]) -> Sums:
        """Return metrics of a replica's share of samples, whose streams and rewards are complete."""
        ...

    def remarks(self) -> list[str]:
        """Return lines to print when a run starts."""
        ...

    def state(self) -> dict[str, Any] | None:
        """Return the state that a checkpoint must save, identical on every rank; None if there is none.

        Every rank calls it.
        """
        ...

    def resume(self, step: int, state: dict[str, Any] | None) -> None:
        """Continue after `step` steps with a saved state()."""
        ...


@dataclass(slots=True)
class DataSource:
    """Takes samples directly from the records of the data set."""

    config: Config
    records: Records
    share: Callable[[list[Sample]], list[Sample]]  # this replica's share of samples that all ranks have

    def take(self, step: int) -> tuple[list[Sample], Sums]:
        return self.share(self.records.draw(step, self.config.batch.prompts, self.config.seed)), {}

    def offer(self, weights: Weights, version: int, check: bool = False) -> None:
        pass

    def describe(self, samples: list[Sample]) -> Sums:
        return by_set(samples, self.records.sets, lengths)

    def remarks(self) -> list[str]:
        return []

    def state(self) -> dict[str, Any] | None:
        return None

    def resume(self, step: int, state: dict[str, Any] | None) -> None:
        pass


@dataclass(slots=True)
class EngineSource:
    """Generates samples. Each engine (rollout.tp consecutive ranks) answers its share of the prompts.

    Afterwards each replica gets its share of the samples, balanced by their cost (rlhf.data.shares).
    """

    config: Config
    mesh: Mesh
    owner: EngineOwner
    tokenizer: Tokenizer
    records: Records
    grader: Grader
    hidden: int  # width of the policy, for the cost of a sample
    score: Callable[[Sequence[Sample]], list[np.ndarray]] = ABSENT  # the policy's log-probs [L] of each sample
    tolerance: float = 0.0  # largest allowed mean |engine - policy| over log-probs
    environments: Environments | None = None  # answer the turns of responses that get rewards
    sampler: Sampler = field(init=False)
    flight: list[Group] = field(default_factory=list)  # this engine's groups in flight, oldest first
    drawn: int = 0  # groups that all engines together have begun since the start of the run
    taken: int = 0  # groups that steps have used since the start of the run; the others are in flight
    notes: list[str] = field(default_factory=list)  # remarks about the resumed state

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.config, self.mesh, self.owner, self.tokenizer, self.environments)

    def take(self, step: int) -> tuple[list[Sample], Sums]:
        """Return this replica's share of the step's samples, grouped by prompt, and metrics.

        With rollout.rounds > 1, groups of equal rewards are dropped, and another round generates responses to more
        prompts (dynamic sampling, DAPO, 2503.14476). This ends when batch.prompts groups are kept, or after
        rollout.rounds rounds. If no group was kept, the groups of the last round are returned. Raises RewardError on
        all ranks if too many rewards of a round have failed.
        """
        rounds, count = self.config.rollout.rounds, self.config.batch.prompts
        made: dict[Key, Sample] = {}
        kept: list[list[Header]] = []
        for turn in range(rounds):
            fresh = self._next(step, turn)
            made |= fresh
            known = headers(self.mesh, fresh)
            self._limit(known, self.grader, f"step {step + 1}")
            drawn = groups(known)
            kept += drawn if rounds == 1 else [g for g in drawn if differ([h.reward for h in g if not h.failed])]
            if len(kept) >= count:
                break
        chosen = [header for group in (kept or drawn)[:count] for header in group]
        sums: Sums = {"time/reward": (self.sampler.waited, 1.0)}  # included in time/rollout
        self.sampler.waited = 0.0
        if rounds > 1:
            sums |= {"rounds": (turn + 1.0, 1.0), "groups_kept": (float(len(kept)), float((turn + 1) * count))}
        if self.config.rollout.inflight > 1:
            sums |= {
                **ages(chosen, step, self.config.rollout.max_lag),
                "in_flight": (float(self.drawn - self.taken), 1.0),
            }
        return deliver(self.mesh, made, chosen, self.hidden), sums

    def offer(self, weights: Weights, version: int, check: bool = False) -> None:
        self.owner.offer(weights, version)
        if check or self.config.rollout.check:
            self._compare()  # the engine sleeps while the policy scores, and loses its weights: publish again
            self.owner.offer(weights, version)

    def describe(self, samples: list[Sample]) -> Sums:
        """Return summary() of all samples and of each data set, and mean |engine - learner| of comparable log-probs.

        The policy must have scored the samples, and no filter may have changed the engine's distribution.
        """
        sums = {**summary(samples), **by_set(samples, self.records.sets, summary)}
        scored = rewarded(samples)
        if not self.config.rollout.filters and all(s.old_logp is not ABSENT for s in scored):
            gaps = _gaps(scored, [s.old_logp for s in scored])
            sums["mismatch"] = (float(gaps.sum()), float(len(gaps)))
        return sums

    def remarks(self) -> list[str]:
        stay, cross = self.owner.volume()
        own = f"{stay / 1e9:.3g} GB of weights stay on this rank"
        return [f"publish: {own}, {cross / 1e9:.3g} GB come from other ranks", *self.notes]

    def state(self) -> dict[str, Any] | None:
        """Return the groups in flight of all engines, oldest first, with the complete state of their responses."""
        if self.config.rollout.inflight == 1:
            return None
        mine = [
            (group.key, k, {"begun": group.begun, **response.state()})
            for group in self.flight
            for k, response in enumerate(group.responses)
            if self.sampler.grades(group, k)
        ]
        found = sorted((item for part in self.mesh.all_gather(mine) for item in part), key=lambda item: item[:2])
        responses = [(key, response) for key, _, response in found]
        engines, _ = self.sampler.engines
        return {"engines": engines, "drawn": self.drawn, "taken": self.taken, "responses": responses}

    def resume(self, step: int, state: dict[str, Any] | None) -> None:
        """Restore the groups in flight. If the number of engines has changed, they start again from their prompts."""
        if self.config.rollout.inflight == 1:
            return
        if state is None:  # checkpoints of older versions have no such state
            self.drawn = self.taken = step * self.config.batch.prompts
            return
        self.drawn, self.taken = state["drawn"], state["taken"]
        held: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for key, response in state["responses"]:
            held.setdefault(tuple(key), []).append(response)
        oldest = min((batch for batch, _ in held), default=0) * self.config.batch.prompts
        self.flight = self.sampler.opened(
            [group for group in self._span(oldest, self.drawn, step) if group.key in held]
        )
        if state["engines"] != self.sampler.engines[0]:
            before, now = state["engines"], self.sampler.engines[0]
            self.notes.append(f"{len(held)} groups in flight on {before} engines start again on {now}")
            return
        for group in self.flight:
            group.begun = held[group.key][0]["begun"]
            for k, known in enumerate(held[group.key]):
                response = group.responses[k] = Response.restored(known)
                if response.finish and self.sampler.grades(group, k):
                    response.sample = self.sampler.sample(group.prompt, response)
                    response.sample.reward = known["reward"]
                    parts = known.get("parts", {})  # checkpoints of older versions have none
                    response.sample.verdict = Verdict(known["rule"], known["score"], parts, known["failed"])

    def answer(self, prompts: list[Sample], grader: Grader) -> list[Sample]:
        """Return this replica's share of evaluate.samples responses with rewards to each held-out prompt.

        They are sampled at evaluate.temperature, with the same seeds at every evaluation. Raises RewardError on all
        ranks if too many rewards have failed.
        """
        keys = self.config.evaluate
        sampling = replace(self.sampler.sampling(), temperature=keys.temperature, top_p=1.0, top_k=0)
        return self.sample(prompts, sampling, keys.samples, 0, grader)

    def probe(self, prompts: list[Sample]) -> list[Sample]:
        """Sample a few tokens after each prompt, without top_p and top_k, to compare log-probs. They get no rewards.

        Return this replica's share of the samples.
        """
        sampling = replace(
            self.sampler.sampling(), max_tokens=min(8, self.config.rollout.max_tokens), top_p=1.0, top_k=0
        )
        return self._deliver(self._run(prompts, sampling, 1, 0, None), self.grader, "the probe")

    def sample(self, prompts: list[Sample], sampling: Sampling, group: int, step: int, grader: Grader) -> list[Sample]:
        """Return this replica's share of `group` responses with rewards to each prompt.

        The random numbers depend only on the seed, the step, the prompt and the index of the response in its group.
        """
        where = f"the evaluation on {prompts[0].text.set}"
        return self._deliver(self._run(prompts, sampling, group, step, grader), grader, where)

    def _compare(self) -> None:
        """Sample a few tokens and score them with the policy.

        Raises RuntimeError if the log-probs of engine and learner differ by more than the tolerance.
        """
        samples = self.probe(self.records.head(2 * self.mesh.world))
        gaps = _gaps(samples, self.score(samples))
        summed, count = self.mesh.total(np.array([gaps.sum(), len(gaps)], np.float64)).tolist()
        if not summed / count < self.tolerance:
            most = max(self.mesh.all_gather(float(gaps.max(initial=0.0))))
            raise RuntimeError(
                f"after publishing, the engine's log-probs differ from the policy's by {summed / count:.3g} on average"
                f" ({most:.3g} at most): the engine does not generate with the trained weights"
            )

    def _deliver(self, groups: list[Group], grader: Grader, where: str) -> list[Sample]:
        """Return this replica's share of the samples of complete groups of all engines. where: for an error."""
        made = self.sampler.made(groups)
        known = headers(self.mesh, made)
        self._limit(known, grader, where)
        return deliver(self.mesh, made, known, self.hidden)

    def _limit(self, known: Sequence[Header], grader: Grader, when: str) -> None:
        """Raise RewardError on all ranks if the share of failed rewards is above reward.max_failed."""
        failed, most = sum(header.failed for header in known), self.config.reward.max_failed
        if failed <= most * len(known):
            return
        own = (grader.failure, self.environments.failure if self.environments else "")
        kinds = zip(*self.mesh.all_gather(own), strict=True)  # the errors of all ranks, by kind
        traces = [trace.strip() for errors in kinds if (trace := next(filter(None, errors), ""))]
        if self.mesh.rank == 0:
            say(textwrap.indent("\n".join(traces), "    "))
        share = f"{failed} of {len(known)} rewards of {when} failed, and reward.max_failed={most:g}"
        first = "; ".join(trace.splitlines()[-1] for trace in traces)
        raise RewardError(f"{share}; the first error, shown above, was: {first}")

    def _next(self, step: int, turn: int) -> dict[Key, Sample]:
        """Complete the next batch.prompts groups, and return this rank's portion of their samples.

        The other groups stay in flight on their engines.
        """
        engines, engine = self.sampler.engines
        # This engine's share of batch.prompts. If it is not divisible, the first engines take one group more.
        quota = len(range(engine, self.config.batch.prompts, engines))
        flight = self.flight + self.sampler.opened(self._fresh(step, turn))
        chosen = self.sampler.generate(flight, self.sampler.sampling(), step, quota, self.grader)
        taken = set(chosen)
        self.flight = [group for group in flight if group not in taken]
        self.taken += self.config.batch.prompts
        return self.sampler.made(chosen)

    def _run(
        self, prompts: list[Sample], sampling: Sampling, size: int, step: int, grader: Grader | None
    ) -> list[Group]:
        """Return this engine's share of the prompts as complete groups."""
        groups = self.sampler.begin(prompts, size, step, step)
        if grader:
            groups = self.sampler.opened(groups)
        return self.sampler.generate(groups, sampling, step, len(groups), grader)

    def _fresh(self, step: int, turn: int) -> list[Group]:
        """Return the groups that this engine begins now. The prompts depend only on the seed, the step and the turn.

        All engines together begin batch.prompts groups. With rollout.inflight > 1, they begin as many as are needed to
        have rollout.inflight * batch.prompts groups in flight.
        """
        count, seed = self.config.batch.prompts, self.config.seed
        if self.config.rollout.inflight == 1:  # each further round uses another order of the data
            prompts = self.records.draw(step, count, seeded(seed, turn) if turn else seed)
            for prompt in prompts:
                prompt.group += turn * count
            return self.sampler.begin(prompts, self.config.rollout.group, step, step)
        begin, self.drawn = self.drawn, self.taken + round(self.config.rollout.inflight * count)
        return self._span(begin, self.drawn, step)

    def _span(self, begin: int, end: int, step: int) -> list[Group]:
        """Return this engine's groups of the run's prompts begin to end - 1. `step` is the step that begins them."""
        count, size = self.config.batch.prompts, self.config.rollout.group
        groups: list[Group] = []
        for batch in range(begin // count, -(-end // count)):
            groups += self.sampler.begin(self.records.draw(batch, count, self.config.seed), size, batch, step)
        for group in groups:
            group.prompt.group += group.key[0] * count  # unique among all groups in flight
        return [group for group in groups if begin <= group.prompt.group < end]


def _gaps(samples: Sequence[Sample], logp: Sequence[np.ndarray]) -> np.ndarray:
    """Return |engine - learner| of the log-prob of every sampled token."""
    gaps = [np.abs(learner - s.sampler_logp)[s.mask] for s, learner in zip(samples, logp, strict=True)]
    return np.concatenate([np.empty(0, np.float32), *gaps])
