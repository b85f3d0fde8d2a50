"""Generates the responses to one engine's share of the prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from rlhf.config import Config
from rlhf.contracts import Completion, Request, Sample, Sampling, Verdict
from rlhf.data.shares import Key
from rlhf.data.tokenizer import Tokenizer
from rlhf.output import Progress
from rlhf.parallel.layout import spread
from rlhf.parallel.mesh import Mesh
from rlhf.rewards import Environments
from rlhf.rollout.dialogues import Dialogues, Place
from rlhf.rollout.flight import Group, Response, choose
from rlhf.rollout.grader import Grader, Warnings
from rlhf.rollout.owner import EngineOwner
from rlhf.rollout.stops import Stops


class Sampler:
    """Generates responses with the engine of this rank. An engine spans rollout.tp consecutive ranks.

    All ranks of an engine have all of its responses.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        owner: EngineOwner,
        tokenizer: Tokenizer,
        environments: Environments | None = None,
    ):
        """environments: answer the turns of responses if rollout.environment is set and the responses get rewards."""
        self.config, self.mesh, self.owner, self.tokenizer = config, mesh, owner, tokenizer
        self.stops = Stops(tokenizer, config.rollout.stop)
        self.waited = 0.0  # seconds in which the engine was idle because of rewards or environments
        self.dialogues: Dialogues | None = None
        if environments and config.rollout.environment:
            self.warn = Warnings(environments, mesh, "environment")
            self.dialogues = Dialogues(config, tokenizer, environments, mesh.gatherer(config.rollout.tp))

    @property
    def engines(self) -> tuple[int, int]:
        """Return the number of engines, and the index of this rank's engine."""
        layout = spread(self.mesh.world, self.config.rollout.tp)
        return layout.dp, layout.coordinates(self.mesh.rank)[2]

    def sampling(self) -> Sampling:
        """Return the sampling parameters of the configuration.

        A stop string that is one token becomes a stop id. Request.ends checks for the other stop strings.
        """
        r = self.config.rollout
        stop_ids = (*self.tokenizer.stop_ids, *self.stops.ids)
        return Sampling(
            max_tokens=r.max_tokens, temperature=r.temperature, top_p=r.top_p, top_k=r.top_k, stop_ids=stop_ids
        )

    def begin(self, prompts: list[Sample], size: int, batch: int, step: int) -> list[Group]:
        """Return this engine's share of the prompts of a batch, as new groups of `size` empty responses.

        `step` is the step in which the groups are begun.
        """
        engines, engine = self.engines
        mine = [prompt for prompt in prompts if prompt.group % engines == engine]
        return [Group(prompt, (batch, prompt.group), step, [Response() for _ in range(size)]) for prompt in mine]

    def opened(self, groups: list[Group]) -> list[Group]:
        """Replace the prompts of the groups by those that their environments give. Every rank calls it."""
        if self.dialogues:
            self.mesh.agree(self.dialogues.open(groups, self.grades))
            self.warn()
        return groups

    def generate(
        self, groups: list[Group], sampling: Sampling, step: int, quota: int, grader: Grader | None
    ) -> list[Group]:
        """Generate until the step can take `quota` complete groups of this engine, and return these groups.

        The responses of the other groups keep the tokens that they have so far. Each rank gives its portion of the
        engine's responses to the grader, each as soon as it is complete. Without a grader, environments are not used
        either.
        """
        chosen = choose(groups, quota, step, self.config.rollout.max_lag)
        waiting = [(group, k) for group in groups for k, response in enumerate(group.responses) if not response.finish]
        jobs: list[Place] = [] if chosen else waiting
        requests = [self._request(n, group, k, sampling) for n, (group, k) in enumerate(jobs)]
        total = min(len(jobs), quota * len(groups[0].responses)) if groups else 0
        with (
            Progress("rollout", "responses", total, shown=self.mesh.rank == 0) as progress,
            closing(self.owner.stream(requests)) as stream,
        ):
            for completed in stream:
                ended = []
                for n, completion in completed:
                    progress.add(0, len(completion.tokens))
                    ended += self._end_turn(*jobs[n], completion, grader)
                for group, k in self._answered() if grader else ():
                    if group.responses[k].finish:
                        ended.append((group, k))
                    else:
                        self.owner.submit([self._request(len(jobs), group, k, sampling)])
                        jobs.append((group, k))
                self._complete(ended, grader)
                progress.add(len(ended), 0)
                if ended and (chosen := choose(groups, quota, step, self.config.rollout.max_lag)):
                    break
        for n, completion in self.owner.withdraw():
            group, k = jobs[n]
            group.responses[k].extend(completion, self.owner.version)
        start = time.perf_counter()
        if grader:
            rest = self.dialogues.finish() if self.dialogues else []
            self._complete([(group, k) for group, k in rest if group.responses[k].finish], grader)
            grader.collect(block=True)
        self.waited += time.perf_counter() - start
        return chosen

    def complete(self, prompts: Sequence[tuple[list[int], Sampling]], *key: int) -> list[Completion]:
        """Return a completion of each prompt, in order, on every rank. Each engine generates its share of them.

        They get no rewards, and environments are not used. The random numbers depend only on the seed, the key and the
        index of the prompt.
        """
        engines, engine = self.engines
        requests = [
            Request(n, *prompts[n], seeded(self.config.seed, *key, n), self.stops.after([]))
            for n in range(engine, len(prompts), engines)
        ]
        found: dict[int, Completion] = {}
        with (
            Progress("rollout", "responses", len(requests), shown=self.mesh.rank == 0) as progress,
            closing(self.owner.stream(requests)) as stream,
        ):
            for completed in stream:
                for n, completion in completed:
                    found[n] = self._stopped(completion)
                    progress.add(1, len(completion.tokens))
        place = spread(self.mesh.world, self.config.rollout.tp).place(self.mesh.rank)
        for part in self.mesh.all_gather({} if place.tp[0] else found):
            found |= part
        return [found[n] for n in range(len(prompts))]

    def _stopped(self, completion: Completion) -> Completion:
        """Return the completion without the tokens after a stop string."""
        end = self.stops.end(completion.tokens)
        return completion if end is None else Completion(completion.tokens[:end], completion.logp[:end], "stop")

    def _answered(self) -> Iterator[Place]:
        """Yield the responses that their environment has answered after one more step of the engine.

        If the engine is idle, wait until there are new requests for it, or until no answer is pending.
        """
        pending = self.dialogues is not None
        while self.dialogues and pending:
            start = time.perf_counter()
            answered = self.dialogues.advance(self.owner.idle)
            self.waited += time.perf_counter() - start
            self.warn()
            yield from answered
            pending = self.owner.idle and self.dialogues.pending

    def _request(self, n: int, group: Group, k: int, sampling: Sampling) -> Request:
        """Return the request for the rest of a response. The tokens so far are part of its prompt and of its seed."""
        response = group.responses[k]
        known = response.tokens
        seed = seeded(self.config.seed, *group.key, k, *([len(known)] if known else []))
        rest = replace(sampling, max_tokens=sampling.max_tokens - len(known))
        return Request(n, group.prompt.tokens.tolist() + known, rest, seed, self.stops.after(response.turn))

    def _end_turn(self, group: Group, k: int, completion: Completion, grader: Grader | None) -> list[Place]:
        """Add a finished turn to its response, and give it to the environment. Return the response if it is complete.

        The result is a list of one or no response.
        """
        response = group.responses[k]
        response.extend(completion, self.owner.version)
        end = self.stops.end(response.turn)
        if end is not None:
            response.cut(end)
            response.finish = "stop"
        if not self.dialogues or not grader:
            return [(group, k)]
        response.turns.append({"role": "assistant", "content": self.tokenizer.decode(response.turn)})
        if response.finish == "length":
            self.dialogues.end(group, k)
            return [(group, k)]
        self.dialogues.ask(group, k, self.grades(group, k))
        return []

    def _complete(self, ended: list[Place], grader: Grader | None) -> None:
        """Give the complete responses of this rank's portion to the grader, and collect the rewards that are ready."""
        for group, k in ended:
            if self.grades(group, k):
                sample = group.responses[k].sample = self.sample(group.prompt, group.responses[k])
                if grader:
                    grader.give(sample)
        if grader:
            grader.collect()

    def grades(self, group: Group, k: int) -> bool:
        """Return whether a response is in this rank's portion of its engine's responses."""
        rank, tp = spread(self.mesh.world, self.config.rollout.tp).place(self.mesh.rank).tp
        return (group.key[1] * len(group.responses) + k) % tp == rank

    @staticmethod
    def made(groups: list[Group]) -> dict[Key, Sample]:
        """Return the samples of complete groups that are in this rank's portion of its engine's responses."""
        return {(r.sample.group, k): r.sample for group in groups for k, r in enumerate(group.responses) if r.sample}

    def sample(self, prompt: Sample, response: Response) -> Sample:
        """Return a complete response as a sample. Tokens of an environment are not learned."""
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


def seeded(*key: int) -> int:
    """Return a seed of 63 bits that depends on every part of the key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
