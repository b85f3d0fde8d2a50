"""Where a run's samples come from: straight from the data, or from an engine that answers its prompts."""

from __future__ import annotations

import textwrap
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from torch import Tensor

from rlhf.config import Config
from rlhf.contracts import ABSENT, Completion, Request, Sample, Sampling, Sums, Verdict, differ, groups
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.metrics import Progress, say
from rlhf.parallel.mesh import Mesh, portion
from rlhf.rewards import Rewards
from rlhf.rollout.owner import EngineOwner

BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no character
Weights = Mapping[str, Tensor]


class Judge(Protocol):
    """Says what responses are worth, while others are still being generated."""

    def give(self, sample: Sample) -> None:
        """Take up a response."""
        ...

    def collect(self, block: bool = False) -> None:
        """Write reward and verdict into the responses that are judged by now; with block, into all that were given."""
        ...


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
    enders: dict[int, bool] = field(default_factory=dict)  # tokens that were asked: whether they may complete a stop string
    waited: float = 0.0  # seconds since the last step in which rewards alone were awaited

    def take(self, step: int) -> tuple[list[Sample], Sums]:
        """The step's samples, grouped by prompt.

        With rollout.rounds > 1, groups of equal rewards are left out and more prompts drawn instead (dynamic sampling, DAPO, 2503.14476),
        until batch.prompts groups are kept or the rounds are over; if no group is ever kept, the last round's are.
        """
        rounds, count = self.config.rollout.rounds, self.config.batch.prompts
        kept: list[list[Sample]] = []
        for turn in range(rounds):
            # Further rounds go through the data in orders of their own: who is drawn when depends on nothing but (seed, step, turn).
            prompts = self.records.draw(step, count, _seed(self.config.seed, turn) if turn else self.config.seed)
            for prompt in prompts:
                prompt.group += turn * count
            drawn = groups(self.sample(prompts, self.sampling(), self.config.rollout.group, step, self.judge))
            kept += drawn if rounds == 1 else [group for group in drawn if differ([s.reward for s in group])]
            if len(kept) >= count:
                break
        sums: Sums = {"time/reward": (self.waited, 1.0)}  # within the rollout's time
        self.waited = 0.0
        if rounds > 1:
            sums |= {"rounds": (turn + 1.0, 1.0), "groups_kept": (float(len(kept)), float((turn + 1) * count))}
        return [sample for group in (kept or drawn)[:count] for sample in group], sums

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
        return [f"publish: {stay / 1e9:.3g} GB of weights stay on their ranks, {cross / 1e9:.3g} GB cross"]

    def answer(self, prompts: list[Sample], judge: Judge) -> list[Sample]:
        """One rewarded response per held-out prompt, at evaluate.temperature; the same draws at every evaluation."""
        sampling = replace(self.sampling(), temperature=self.config.evaluate.temperature, top_p=1.0, top_k=0)
        return self.sample(prompts, sampling, 1, 0, judge)

    def probe(self, prompts: list[Sample]) -> list[Sample]:
        """A few tokens after each prompt, drawn from the unfiltered distribution, to compare log-probs with; never rewarded."""
        sampling = replace(self.sampling(), max_tokens=min(8, self.config.rollout.max_tokens), top_p=1.0, top_k=0)
        return self._gather(self._generate(prompts, sampling, 1, 0, None))

    def sampling(self) -> Sampling:
        """How the configuration says to sample. A stop string of one token is a stop id; for others the tokens are watched."""
        r = self.config.rollout
        stop_ids = (*self.tokenizer.stop_ids, *(ids[0] for ids in self._stops() if len(ids) == 1))
        return Sampling(max_tokens=r.max_tokens, temperature=r.temperature, top_p=r.top_p, top_k=r.top_k, stop_ids=stop_ids)

    def sample(self, prompts: list[Sample], sampling: Sampling, group: int, step: int, judge: Judge) -> list[Sample]:
        """`group` rewarded responses to each prompt. Draws depend on (seed, step, prompt, sibling) alone."""
        samples = self._generate(prompts, sampling, group, step, judge)
        start = time.perf_counter()
        judge.collect(block=True)
        self.waited += time.perf_counter() - start
        return self._gather(samples)

    def _compare(self) -> None:
        """Sample a little and let the policy score it: engine and learner must give the same log-probs."""
        samples = self.probe(self.records.head(2 * self.mesh.world))
        gaps = _gaps(samples, self.score(samples))
        if not gaps.mean() < self.tolerance:
            raise RuntimeError(
                f"after publishing, the engine's log-probs differ from the policy's by {gaps.mean():.3g} on average"
                f" ({gaps.max():.3g} at most): it does not generate with the weights that were trained"
            )

    def _generate(self, prompts: list[Sample], sampling: Sampling, group: int, step: int, judge: Judge | None) -> list[Sample]:
        """This rank's portion of the responses of its engine, all of whose ranks know them. The judge gets each when it is complete."""
        tp = self.config.rollout.tp
        engines, engine = self.mesh.world // tp, self.mesh.rank // tp
        jobs = [(i, k) for i in range(len(prompts)) if i % engines == engine for k in range(group)]
        mine = set(portion(range(len(jobs)), self.mesh.rank % tp, tp))
        ends = self._ends if any(len(ids) > 1 for ids in self._stops()) else None
        requests = [
            Request(n, prompts[i].tokens.tolist(), sampling, _seed(self.config.seed, step, prompts[i].group, k), ends)
            for n, (i, k) in enumerate(jobs)
        ]
        samples: dict[int, Sample] = {}
        with Progress("rollout", "responses", len(jobs), shown=self.mesh.rank == 0) as progress:
            for completed in self.owner.stream(requests):
                for n, completion in completed:
                    progress.add(1, len(completion.tokens))
                    if n in mine:
                        samples[n] = self._sample(prompts[jobs[n][0]], completion)
                        if judge:
                            judge.give(samples[n])
                if judge:
                    judge.collect()
        return [samples[n] for n in sorted(samples)]

    def _gather(self, samples: list[Sample]) -> list[Sample]:
        """The samples of all ranks on every rank, by group; siblings keep their order."""
        found = [sample for part in self.mesh.all_gather(samples) for sample in part]
        return sorted(found, key=lambda s: s.group)

    def _sample(self, prompt: Sample, completion: Completion) -> Sample:
        completion = self._cut(completion)
        text = self.tokenizer.decode(completion.tokens)
        tokens = np.concatenate([prompt.tokens, np.array(completion.tokens, np.int32)])
        first = len(prompt.tokens) - 1
        mask, logp, version = np.zeros(len(tokens) - 1, bool), np.zeros(len(tokens) - 1, np.float32), np.full(len(tokens) - 1, -1, np.int32)
        mask[first:], logp[first:], version[first:] = True, completion.logp, self.owner.version
        return Sample(
            tokens,
            mask,
            prompt.group,
            truncated=completion.finish == "length",
            text=replace(prompt.text, response=text),
            version=version,
            sampler_logp=logp,
        )

    def _stops(self) -> list[list[int]]:
        """The stop strings as tokens."""
        return [self.tokenizer.encode(text, continues=True, control=True) for text in self.config.rollout.stop]

    def _ends(self, tokens: list[int]) -> bool:
        """Whether the last token has completed a stop string. It may miss one that only the whole text shows; _cut() finds that."""
        if not self._may_end(tokens[-1]):
            return False
        longest = max(len(stop.encode()) for stop in self.config.rollout.stop)  # a token is a byte or more
        text = self.tokenizer.decode(tokens[-longest - 1 :], skip_special=False)
        return any(stop in text for stop in self.config.rollout.stop)

    def _may_end(self, token: int) -> bool:
        """Whether a token's text has the last character of a stop string in it, or part of one."""
        known = self.enders.get(token)
        if known is None:
            text = self.tokenizer.decode([token], skip_special=False)
            known = self.enders[token] = BROKEN in text or any(stop[-1] in text for stop in self.config.rollout.stop)
        return known

    def _cut(self, completion: Completion) -> Completion:
        """End the response behind the first stop string. Tokens are cut, never made again from text."""
        n = self._end(completion.tokens) if self.config.rollout.stop else None
        return completion if n is None else Completion(completion.tokens[:n], completion.logp[:n], "stop")

    def _end(self, tokens: list[int]) -> int | None:
        """How many tokens the shortest prefix has whose text has a stop string in it; None where the text of all has none.

        Text that tokens have spelled stays when more come, so whether a prefix has a stop string is bisected. Only bytes that are no
        character by themselves can change what is before them: some tokenizers then give up the whole run of bytes, with a stop string
        in it. So if a character is broken in the text, prefixes that end before such bytes are asked first.
        """

        def text(tokens: list[int]) -> str:
            return self.tokenizer.decode(tokens, skip_special=False)  # a stop string may be a special token, as <|im_end|>

        def stopped(n: int) -> bool:
            said = text(tokens[:n])
            return any(stop in said for stop in self.config.rollout.stop)

        def first(end: int) -> int:  # in 1..end, of which end is stopped
            return bisect_left(range(end), True, lo=1, key=stopped)

        if not stopped(len(tokens)):
            return None
        end = first(len(tokens))
        if BROKEN not in text(tokens[:end]):
            return end
        breaks = (n for n in range(1, end) if BROKEN in text([tokens[n]]))
        return first(next(filter(stopped, breaks), end))


class Rule:
    """A reward function as a judge. The first failure on each node is shown; all are counted."""

    def __init__(self, rewards: Rewards, mesh: Mesh):
        self.rewards, self.mesh = rewards, mesh
        self._given: list[Sample] = []

    def give(self, sample: Sample) -> None:
        if self.rewards.spec:  # without, the reward model alone judges
            self.rewards.give(len(self._given), (sample.text.prompt, sample.text.response, dict(sample.text.record)))
            self._given.append(sample)

    def collect(self, block: bool = False) -> None:
        silent = not self.rewards.failure and self.mesh.is_first_on_node
        for key, score in self.rewards.take(block).items():
            self._given[key].reward, self._given[key].verdict = score.value, Verdict(rule=score.value, failed=score.failed)
        if silent and self.rewards.failure:
            reason = textwrap.indent(self.rewards.failure, "    ")
            say(f"a reward failed and counts as 0 (see reward_failed in metrics.jsonl):\n{reason}")
        if block:
            self._given = []


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


def _gaps(samples: Sequence[Sample], logp: Sequence[np.ndarray]) -> np.ndarray:
    """|engine - learner| of the log-prob of every sampled token."""
    return np.concatenate([np.abs(learner - s.sampler_logp)[s.mask] for s, learner in zip(samples, logp, strict=True)])


def _seed(*key: int) -> int:
    """63 bits that depend on every part of the key: engines with equal seeds would sample alike."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
