"""How one engine's share of the prompts becomes samples: requests, responses that go on, and what all ranks know at the end."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace

import numpy as np

from rlhf.config import Config
from rlhf.contracts import Completion, Request, Sample, Sampling
from rlhf.data.tokenizer import Tokenizer
from rlhf.metrics import Progress
from rlhf.parallel.mesh import Mesh
from rlhf.rollout.flight import Group, Response, choose
from rlhf.rollout.judge import Judge
from rlhf.rollout.owner import EngineOwner
from rlhf.rollout.stops import Stops


class Sampler:
    """This rank's part of an engine, which is rollout.tp consecutive ranks: all of them know all of its responses."""

    def __init__(self, config: Config, mesh: Mesh, owner: EngineOwner, tokenizer: Tokenizer):
        self.config, self.mesh, self.owner, self.tokenizer = config, mesh, owner, tokenizer
        self.stops = Stops(tokenizer, config.rollout.stop)
        self.waited = 0.0  # seconds in which rewards alone were awaited

    @property
    def engines(self) -> tuple[int, int]:
        """How many engines there are, and which one is this rank's."""
        tp = self.config.rollout.tp
        return self.mesh.world // tp, self.mesh.rank // tp

    def sampling(self) -> Sampling:
        """How the configuration says to sample. A stop string of one token is a stop id; for others the tokens are watched."""
        r = self.config.rollout
        stop_ids = (*self.tokenizer.stop_ids, *self.stops.ids)
        return Sampling(max_tokens=r.max_tokens, temperature=r.temperature, top_p=r.top_p, top_k=r.top_k, stop_ids=stop_ids)

    def begin(self, prompts: list[Sample], size: int, batch: int, step: int) -> list[Group]:
        """This engine's share of the prompts of a batch, as groups of `size` responses that are begun in a step."""
        engines, engine = self.engines
        mine = [prompt for prompt in prompts if prompt.group % engines == engine]
        return [Group(prompt, (batch, prompt.group), step, [Response() for _ in range(size)]) for prompt in mine]

    def generate(self, groups: list[Group], sampling: Sampling, step: int, quota: int, judge: Judge | None) -> list[Group]:
        """Generate until a step can take `quota` of these groups from this engine: those. The others are as far as they are.

        All ranks of an engine know all of its responses. The judge gets a rank's portion of them, each when it is complete.
        """
        max_lag = self.config.rollout.max_lag
        chosen = choose(groups, quota, step, max_lag)
        waiting = [(group, k) for group in groups for k, response in enumerate(group.responses) if not response.finish]
        jobs = [] if chosen else waiting
        requests = [self._request(n, group, k, sampling) for n, (group, k) in enumerate(jobs)]
        total = min(len(jobs), quota * len(groups[0].responses)) if groups else 0
        with Progress("rollout", "responses", total, shown=self.mesh.rank == 0) as progress, closing(self.owner.stream(requests)) as stream:
            for completed in stream:
                for n, completion in completed:
                    progress.add(1, len(completion.tokens))
                    self._complete(*jobs[n], completion, judge)
                if judge:
                    judge.collect()
                if completed and (chosen := choose(groups, quota, step, max_lag)):
                    break
        for n, completion in self.owner.withdraw():
            group, k = jobs[n]
            group.responses[k].extend(completion, self.owner.version)
        start = time.perf_counter()
        if judge:
            judge.collect(block=True)
        self.waited += time.perf_counter() - start
        return chosen

    def _request(self, n: int, group: Group, k: int, sampling: Sampling) -> Request:
        """The rest of a response. What was drawn of it makes the prompt longer, and its seed another."""
        drawn = group.responses[k].tokens
        seed = seeded(self.config.seed, *group.key, k, *([len(drawn)] if drawn else []))
        rest = replace(sampling, max_tokens=sampling.max_tokens - len(drawn))
        return Request(n, group.prompt.tokens.tolist() + drawn, rest, seed, self.stops.after(drawn))

    def _complete(self, group: Group, k: int, completion: Completion, judge: Judge | None) -> None:
        """Take up the end of a response, and have it judged if it is this rank's."""
        response = group.responses[k]
        response.extend(completion, self.owner.version)
        if self.judges(group, k):
            response.sample = self.sample(group.prompt, response)
            if judge:
                judge.give(response.sample)

    def judges(self, group: Group, k: int) -> bool:
        """Whether a response is in this rank's portion of those of its engine."""
        tp = self.config.rollout.tp
        return (group.key[1] * len(group.responses) + k) % tp == self.mesh.rank % tp

    def gather(self, groups: list[Group]) -> list[Sample]:
        """The samples of complete groups of all engines on every rank, in the order in which their prompts were drawn."""
        mine = [(group.key, k, r.sample) for group in groups for k, r in enumerate(group.responses) if r.sample]
        found = [item for part in self.mesh.all_gather(mine) for item in part]
        return [sample for *_, sample in sorted(found, key=lambda item: item[:2])]

    def sample(self, prompt: Sample, response: Response) -> Sample:
        """A complete response as a sample, cut behind its first stop string."""
        end = self.stops.end(response.tokens)
        drawn = response.tokens[:end]
        tokens, first = np.concatenate([prompt.tokens, np.array(drawn, np.int32)]), len(prompt.tokens) - 1
        mask, logp, version = np.zeros(len(tokens) - 1, bool), np.zeros(len(tokens) - 1, np.float32), np.full(len(tokens) - 1, -1, np.int32)
        mask[first:], logp[first:], version[first:] = True, response.logp[:end], response.version[:end]
        return Sample(
            tokens,
            mask,
            prompt.group,
            truncated=end is None and response.finish == "length",
            text=replace(prompt.text, response=self.tokenizer.decode(drawn)),
            version=version,
            sampler_logp=logp,
        )


def seeded(*key: int) -> int:
    """63 bits that depend on every part of the key: engines with equal seeds would sample alike."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
