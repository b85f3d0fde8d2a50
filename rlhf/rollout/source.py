"""Samples from an engine that answers prompts, and from an environment that answers it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlhf.config import Config
from rlhf.contracts import ABSENT, Completion, Request, Sample, Sampling, Sums, Verdict, differ, groups
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.metrics import Progress
from rlhf.parallel.mesh import Mesh
from rlhf.rewards import Environments
from rlhf.rollout.dialogues import Dialogues, Place
from rlhf.rollout.flight import Group, Response, choose
from rlhf.rollout.judge import Judge, Warnings, ages, summary
from rlhf.rollout.offline import Weights
from rlhf.rollout.owner import EngineOwner
from rlhf.rollout.stops import Stops


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
    dialogues: Dialogues | None = field(init=False, default=None)
    warn: Callable[[], None] = field(init=False, default=lambda: None)
    stops: Stops = field(init=False)
    waited: float = 0.0  # seconds since the last step in which rewards or environments alone were awaited
    flight: list[Group] = field(default_factory=list)  # of this engine, in the order in which they were drawn (rollout.inflight > 1)
    drawn: int = 0  # groups of all engines that have been begun since the run began, ...
    taken: int = 0  # ... and that steps have taken
    notes: list[str] = field(default_factory=list)  # on what was resumed

    def __post_init__(self) -> None:
        self.stops = Stops(self.tokenizer, self.config.rollout.stop)
        if self.environments and self.config.rollout.environment:
            self.warn = Warnings(self.environments, self.mesh, "environment")
            self.dialogues = Dialogues(self.config, self.tokenizer, self.environments, self.mesh.gatherer(self.config.rollout.tp))

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
        sums: Sums = {"time/reward": (self.waited, 1.0)}  # within the rollout's time
        self.waited = 0.0
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
        return [f"publish: {stay / 1e9:.3g} GB of weights stay on their ranks, {cross / 1e9:.3g} GB cross", *self.notes]

    def state(self) -> dict[str, Any] | None:
        """The groups that are in flight on all engines, oldest first, with all that is known of their responses."""
        if self.config.rollout.inflight == 1:
            return None
        mine = [
            (group.key, k, {"begun": group.begun, **response.state()})
            for group in self.flight
            for k, response in enumerate(group.responses)
            if self._judges(group, k)
        ]
        found = sorted((item for part in self.mesh.all_gather(mine) for item in part), key=lambda item: item[:2])
        responses = [(key, response) for key, _, response in found]
        return {"engines": self._engines[0], "drawn": self.drawn, "taken": self.taken, "responses": responses}

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
        self.flight = self._opened([group for group in self._span(oldest, self.drawn, step) if group.key in held])
        if state["engines"] != self._engines[0]:
            self.notes.append(f"{len(held)} groups that were in flight on {state['engines']} engines begin anew on {self._engines[0]}")
            return
        for group in self.flight:
            group.begun = held[group.key][0]["begun"]
            for k, known in enumerate(held[group.key]):
                response = group.responses[k] = Response.restored(known)
                if response.finish and self._judges(group, k):
                    response.sample = self._sample(group.prompt, response)
                    response.sample.reward = known["reward"]
                    response.sample.verdict = Verdict(known["rule"], known["score"], known["failed"])

    def answer(self, prompts: list[Sample], judge: Judge) -> list[Sample]:
        """One rewarded response per held-out prompt, at evaluate.temperature; the same draws at every evaluation."""
        sampling = replace(self.sampling(), temperature=self.config.evaluate.temperature, top_p=1.0, top_k=0)
        return self.sample(prompts, sampling, 1, 0, judge)

    def probe(self, prompts: list[Sample]) -> list[Sample]:
        """A few tokens after each prompt, drawn from the unfiltered distribution, to compare log-probs with; never rewarded."""
        sampling = replace(self.sampling(), max_tokens=min(8, self.config.rollout.max_tokens), top_p=1.0, top_k=0)
        return self._gather(self._run(prompts, sampling, 1, 0, None))

    def sampling(self) -> Sampling:
        """How the configuration says to sample. A stop string of one token is a stop id; for others the tokens are watched."""
        r = self.config.rollout
        stop_ids = (*self.tokenizer.stop_ids, *self.stops.ids)
        return Sampling(max_tokens=r.max_tokens, temperature=r.temperature, top_p=r.top_p, top_k=r.top_k, stop_ids=stop_ids)

    def sample(self, prompts: list[Sample], sampling: Sampling, group: int, step: int, judge: Judge) -> list[Sample]:
        """`group` rewarded responses to each prompt. Draws depend on (seed, step, prompt, sibling) alone."""
        return self._gather(self._run(prompts, sampling, group, step, judge))

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
        engines, engine = self._engines
        quota = len(range(engine, self.config.batch.prompts, engines))  # where they do not divide it, the first ones give one more
        flight = self.flight + self._opened(self._fresh(step, turn))
        chosen = self._generate(flight, self.sampling(), step, quota, self.judge)
        taken = set(map(id, chosen))
        self.flight = [group for group in flight if id(group) not in taken]
        self.taken += self.config.batch.prompts
        return self._gather(chosen)

    def _run(self, prompts: list[Sample], sampling: Sampling, size: int, step: int, judge: Judge | None) -> list[Group]:
        """This engine's share of the prompts, answered as a whole."""
        groups = self._begin(prompts, size, step, step)
        return self._generate(self._opened(groups) if judge else groups, sampling, step, len(groups), judge)

    def _fresh(self, step: int, turn: int) -> list[Group]:
        """The groups of this engine that are begun now. Who is drawn when depends on nothing but the seed, the step and the turn.

        As many as a step takes; with rollout.inflight > 1, as many as bring those in flight back to that many times batch.prompts.
        """
        count, seed = self.config.batch.prompts, self.config.seed
        if self.config.rollout.inflight == 1:  # further rounds go through the data in orders of their own
            prompts = self.records.draw(step, count, _seed(seed, turn) if turn else seed)
            for prompt in prompts:
                prompt.group += turn * count
            return self._begin(prompts, self.config.rollout.group, step, step)
        begin, self.drawn = self.drawn, self.taken + round(self.config.rollout.inflight * count)
        return self._span(begin, self.drawn, step)

    def _span(self, begin: int, end: int, step: int) -> list[Group]:
        """This engine's groups of the prompts from begin to end, counted from the run's first one, begun in a step."""
        count, size = self.config.batch.prompts, self.config.rollout.group
        groups: list[Group] = []
        for batch in range(begin // count, -(-end // count)):
            groups += self._begin(self.records.draw(batch, count, self.config.seed), size, batch, step)
        for group in groups:
            group.prompt.group += group.key[0] * count  # unique among all that are in flight
        return [group for group in groups if begin <= group.prompt.group < end]

    def _begin(self, prompts: list[Sample], size: int, batch: int, step: int) -> list[Group]:
        """This engine's share of the prompts of a batch, as groups of `size` responses that are begun in a step."""
        engines, engine = self._engines
        mine = [prompt for prompt in prompts if prompt.group % engines == engine]
        return [Group(prompt, (batch, prompt.group), step, [Response() for _ in range(size)]) for prompt in mine]

    @property
    def _engines(self) -> tuple[int, int]:
        """How many engines there are, and which one is this rank's."""
        return self.mesh.world // self.config.rollout.tp, self.mesh.rank // self.config.rollout.tp

    def _opened(self, groups: list[Group]) -> list[Group]:
        """With the prompts that their environments give them. Every rank calls it."""
        if self.dialogues:
            self.mesh.agree(self.dialogues.open(groups, self._judges))
            self.warn()
        return groups

    def _generate(self, groups: list[Group], sampling: Sampling, step: int, quota: int, judge: Judge | None) -> list[Group]:
        """Generate until a step can take `quota` of these groups from this engine: those. The others are as far as they are.

        All ranks of an engine know all of its responses. The judge gets a rank's portion of them, each when it is complete; without a
        judge no environment answers either.
        """
        chosen = choose(groups, quota, step, self.config.rollout.max_lag)
        waiting = [(group, k) for group in groups for k, response in enumerate(group.responses) if not response.finish]
        jobs: list[Place] = [] if chosen else waiting
        requests = [self._request(n, group, k, sampling) for n, (group, k) in enumerate(jobs)]
        total = min(len(jobs), quota * len(groups[0].responses)) if groups else 0
        with Progress("rollout", "responses", total, shown=self.mesh.rank == 0) as progress, closing(self.owner.stream(requests)) as stream:
            for completed in stream:
                ended = []
                for n, completion in completed:
                    progress.add(0, len(completion.tokens))
                    ended += self._end_turn(*jobs[n], completion, judge)
                for group, k in self._answered() if judge else ():
                    if group.responses[k].finish:
                        ended.append((group, k))
                    else:
                        self.owner.submit([self._request(len(jobs), group, k, sampling)])
                        jobs.append((group, k))
                self._complete(ended, judge)
                progress.add(len(ended), 0)
                if ended and (chosen := choose(groups, quota, step, self.config.rollout.max_lag)):
                    break
        for n, completion in self.owner.withdraw():
            group, k = jobs[n]
            group.responses[k].extend(completion, self.owner.version)
        start = time.perf_counter()
        if judge:
            rest = self.dialogues.finish() if self.dialogues else []
            self._complete([(group, k) for group, k in rest if group.responses[k].finish], judge)
            judge.collect(block=True)
        self.waited += time.perf_counter() - start
        return chosen

    def _answered(self) -> Iterator[Place]:
        """The responses that an environment has answered after one more step of the engine, or instead of one without work."""
        pending = self.dialogues is not None
        while self.dialogues and pending:
            start = time.perf_counter()
            answered = self.dialogues.advance(self.owner.idle)
            self.waited += time.perf_counter() - start
            self.warn()
            yield from answered
            pending = self.owner.idle and self.dialogues.pending

    def _request(self, n: int, group: Group, k: int, sampling: Sampling) -> Request:
        """The rest of a response. What there is of it makes the prompt longer, and its seed another."""
        response = group.responses[k]
        known = response.tokens
        seed = _seed(self.config.seed, *group.key, k, *([len(known)] if known else []))
        rest = replace(sampling, max_tokens=sampling.max_tokens - len(known))
        return Request(n, group.prompt.tokens.tolist() + known, rest, seed, self.stops.after(response.turn))

    def _end_turn(self, group: Group, k: int, completion: Completion, judge: Judge | None) -> list[Place]:
        """Take up the end of a turn, and give it to the environment. The response, if that ends it."""
        response = group.responses[k]
        response.extend(completion, self.owner.version)
        end = self.stops.end(response.turn)
        if end is not None:
            response.cut(end)
            response.finish = "stop"
        if not self.dialogues or not judge:
            return [(group, k)]
        response.turns.append({"role": "assistant", "content": self.tokenizer.decode(response.turn)})
        if response.finish == "length":
            self.dialogues.end(group, k)
            return [(group, k)]
        self.dialogues.ask(group, k, self._judges(group, k))
        return []

    def _complete(self, ended: list[Place], judge: Judge | None) -> None:
        """Have complete responses judged that are this rank's, and take up what others were found to be worth."""
        for group, k in ended:
            if self._judges(group, k):
                sample = group.responses[k].sample = self._sample(group.prompt, group.responses[k])
                if judge:
                    judge.give(sample)
        if judge:
            judge.collect()

    def _judges(self, group: Group, k: int) -> bool:
        """Whether a response is in this rank's portion of those of its engine."""
        tp = self.config.rollout.tp
        return (group.key[1] * len(group.responses) + k) % tp == self.mesh.rank % tp

    def _gather(self, groups: list[Group]) -> list[Sample]:
        """The samples of complete groups of all engines on every rank, in the order in which their prompts were drawn."""
        mine = [(group.key, k, r.sample) for group in groups for k, r in enumerate(group.responses) if r.sample]
        found = [item for part in self.mesh.all_gather(mine) for item in part]
        return [sample for *_, sample in sorted(found, key=lambda item: item[:2])]

    def _sample(self, prompt: Sample, response: Response) -> Sample:
        """A complete response as a sample. What an environment has said in it is not learned."""
        tokens, first = np.concatenate([prompt.tokens, np.array(response.tokens, np.int32)]), len(prompt.tokens) - 1
        logp, version = np.zeros(len(tokens) - 1, np.float32), np.full(len(tokens) - 1, -1, np.int32)
        logp[first:], version[first:] = response.logp, response.version
        return Sample(
            tokens,
            version >= 0,
            prompt.group,
            reward=response.earned,
            truncated=response.finish == "length",
            text=replace(prompt.text, response=self.tokenizer.decode(response.tokens), turns=tuple(response.turns)),
            verdict=Verdict(rule=response.earned, failed=response.failed),
            version=version,
            sampler_logp=logp,
        )


def _gaps(samples: Sequence[Sample], logp: Sequence[np.ndarray]) -> np.ndarray:
    """|engine - learner| of the log-prob of every sampled token."""
    return np.concatenate([np.abs(learner - s.sampler_logp)[s.mask] for s, learner in zip(samples, logp, strict=True)])


def _seed(*key: int) -> int:
    """63 bits that depend on every part of the key: engines with equal seeds would sample alike."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
