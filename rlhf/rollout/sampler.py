"""From prompts to rewarded samples, over all engines of the world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from rlhf.config import Config
from rlhf.contracts import Completion, Engine, Sample, Sampling, Sums, groups
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.parallel.mesh import Mesh, portion
from rlhf.weights.publish import Publisher


@dataclass(slots=True)
class Sampler:
    """Every engine (rollout.tp consecutive ranks) generates for its share of the prompts; then all ranks know all samples."""

    config: Config
    mesh: Mesh
    engine: Engine
    publisher: Publisher | None  # None: the engine loaded its weights by itself
    tokenizer: Tokenizer
    reward: Callable[[list[Sample]], None]  # writes reward and meta["failed"]
    records: Records

    def draw(self, step: int) -> tuple[list[Sample], Sums]:
        """The step's samples, grouped by prompt, alike on every rank.

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
            drawn = groups(self.sample(prompts, self.sampling(), self.config.rollout.group, step, self.reward))
            kept += drawn if rounds == 1 else [g for g in drawn if len({s.reward for s in g}) > 1]
            if len(kept) >= count:
                break
        sums = {"rounds": (turn + 1.0, 1.0), "groups_kept": (float(len(kept)), float((turn + 1) * count))} if rounds > 1 else {}
        return [sample for group in (kept or drawn)[:count] for sample in group], sums

    def publish(self, parameters: Mapping[str, Tensor]) -> None:
        """Give the engine, whose weights are awake, the learner's (by megatron-core's names); then it has to wake before it generates."""
        assert self.publisher, "an engine that loaded its own weights is never published to"
        self.publisher.publish(parameters, self.engine.parameters())
        if self.config.rollout.check:
            self.publisher.verify(parameters, self.engine.parameters())

    def sampling(self) -> Sampling:
        """How the configuration says to sample. A stop string that is a single token ends generation at once."""
        r = self.config.rollout
        single = [ids[0] for text in r.stop if len(ids := self.tokenizer.encode(text, continues=True, control=True)) == 1]
        stop_ids = (*self.tokenizer.stop_ids, *single)
        return Sampling(max_tokens=r.max_tokens, temperature=r.temperature, top_p=r.top_p, top_k=r.top_k, stop_ids=stop_ids)

    def answer(self, prompts: list[Sample], reward: Callable[[list[Sample]], None]) -> list[Sample]:
        """One rewarded response per held-out prompt, at evaluate.temperature; the same draws at every evaluation."""
        sampling = replace(self.sampling(), temperature=self.config.evaluate.temperature, top_p=1.0, top_k=0)
        return self.sample(prompts, sampling, 1, 0, reward)

    def probe(self, prompts: list[Sample]) -> list[Sample]:
        """A few tokens after each prompt, drawn from the unfiltered distribution, to compare log-probs with; never rewarded."""
        sampling = replace(self.sampling(), max_tokens=min(8, self.config.rollout.max_tokens), top_p=1.0, top_k=0)
        return self._gather(self._generate(prompts, sampling, 1, 0))

    def sample(
        self, prompts: list[Sample], sampling: Sampling, group: int, step: int, reward: Callable[[list[Sample]], None]
    ) -> list[Sample]:
        """`group` rewarded responses to each prompt. Draws depend on (seed, step, prompt, sibling) alone."""
        samples = self._generate(prompts, sampling, group, step)
        reward(samples)
        return self._gather(samples)

    def _generate(self, prompts: list[Sample], sampling: Sampling, group: int, step: int) -> list[Sample]:
        """This rank's portion of the responses of its engine, all of whose ranks know them."""
        tp = self.config.rollout.tp
        engines, engine = self.mesh.world // tp, self.mesh.rank // tp
        mine = [i for i in range(len(prompts)) if i % engines == engine]
        jobs = [(i, k) for i in mine for k in range(group)]
        completions = self.engine.generate(
            [prompts[i].tokens.tolist() for i, _ in jobs], sampling, [_seed(self.config.seed, step, prompts[i].group, k) for i, k in jobs]
        )
        answered = [(prompts[i], completion) for (i, _), completion in zip(jobs, completions, strict=True)]
        return [self._sample(*pair) for pair in portion(answered, self.mesh.rank % tp, tp)]

    def _gather(self, samples: list[Sample]) -> list[Sample]:
        """The samples of all ranks on every rank, by group; siblings keep their order."""
        found = [sample for part in self.mesh.all_gather(samples) for sample in part]
        return sorted(found, key=lambda s: s.group)

    def _sample(self, prompt: Sample, completion: Completion) -> Sample:
        completion = self._cut(completion)
        text = self.tokenizer.decode(completion.tokens)
        tokens = np.concatenate([prompt.tokens, np.array(completion.tokens, np.int32)])
        mask, logp = np.zeros(len(tokens) - 1, bool), np.zeros(len(tokens) - 1, np.float32)
        mask[len(prompt.tokens) - 1 :] = True
        logp[len(prompt.tokens) - 1 :] = completion.logp
        meta = {**prompt.meta, "response": text}
        return Sample(tokens, mask, prompt.group, truncated=completion.finish == "length", meta=meta, sampler_logp=logp)

    def _cut(self, completion: Completion) -> Completion:
        """End the response behind the first stop string. Tokens are cut, never made again from text."""

        def stopped(tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens, skip_special=False)  # a stop string may be a special token, as <|im_end|>
            return any(stop in text for stop in self.config.rollout.stop)

        if not stopped(completion.tokens):
            return completion
        n = next(n for n in range(1, len(completion.tokens) + 1) if stopped(completion.tokens[:n]))
        return Completion(completion.tokens[:n], completion.logp[:n], "stop")


def summary(samples: list[Sample]) -> Sums:
    """What a step's samples look like, as (sum, count)."""
    n = float(len(samples))
    judged = [s.meta for s in samples if "score" in s.meta]  # by a reward model, beside the rule
    parts = {f"reward_{name}": (sum(meta[name] for meta in judged), float(len(judged))) for name in ("rule", "score")}
    return {
        **parts,
        "reward": (sum(s.reward for s in samples), n),
        "response_tokens": (float(sum(s.mask.sum() for s in samples)), n),
        "truncated": (float(sum(s.truncated for s in samples)), n),
        "reward_failed": (float(sum(s.meta["failed"] for s in samples)), n),
    }


def _seed(*key: int) -> int:
    """63 bits that depend on every part of the key: engines with equal seeds would sample alike."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
