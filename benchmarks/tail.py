"""Measure the rollout time per trained token with long-tailed response lengths, relative to equal lengths.

It shows the cost of long tails, and how much rollout.inflight saves.

    python benchmarks/tail.py                                        one GPU: 8B shapes, 64 and 16 groups of 8
    python benchmarks/tail.py --model toy --groups 2 --mean 12 --longest 48 --steps 1 --warm 1     on a CPU

Random weights never end a response, so the benchmark sets the lengths. They are lognormal with deviation 1 and a given
mean, from 16 to --longest tokens; the responses of a group share half of the variance. There is no training. But each
step counts as new weights: the cache is dropped, and responses in flight are prefilled again. --check compares runs of
an eighth of the tokens: two equal runs, and one that is restored from a checkpoint's state. If nothing is in flight
between steps, one step is counted.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import record
from publish import MODELS
from rollout import Free, demo_task

from rlhf import configuration
from rlhf.contracts import Request, Sample, Sampling, Text
from rlhf.data.tokenizer import Tokenizer
from rlhf.parallel.mesh import Mesh
from rlhf.residence import Residence
from rlhf.rollout.flight import Group
from rlhf.rollout.owner import EngineOwner
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.source import EngineSource
from rlhf.weights.formats import hf

SHORTEST, SHARED = 16, 0.5


class Forced(Sampler):
    """A sampler that ends each response at a length drawn in advance."""

    lengths: Lengths

    def _request(self, n: int, group: Group, k: int, sampling: Sampling) -> Request:
        request = super()._request(n, group, k, sampling)
        rest = self.lengths.of(group.key, k) - len(group.responses[k].tokens)
        request.sampling = replace(request.sampling, max_tokens=rest, stop_ids=())
        return request


class Lengths:
    """The length of each response in tokens. With sigma 0 all have the mean length."""

    def __init__(self, mean: int, longest: int, sigma: float):
        self.mean, self.longest, self.sigma = mean, longest, sigma

    def of(self, key: tuple[int, int], sibling: int) -> int:
        if not self.sigma:
            return self.mean
        z = [np.random.default_rng(part).normal() for part in ((1, *key), (2, *key, sibling))]
        spread = self.sigma * (math.sqrt(SHARED) * z[0] + math.sqrt(1 - SHARED) * z[1])
        return int(np.clip(self.mean * math.exp(spread - self.sigma**2 / 2), SHORTEST, self.longest))


class Prompts:
    """A data set of random tokens."""

    def __init__(self, vocab: int, length: int):
        self.vocab, self.length = vocab, length

    def draw(self, step: int, count: int, seed: int) -> list[Sample]:
        tokens = np.random.default_rng((seed, step)).integers(3, self.vocab, (count, self.length)).astype(np.int32)
        return [Sample(row, np.zeros(self.length - 1, bool), group=i, text=Text(row=i)) for i, row in enumerate(tokens)]


class Bench:
    """One engine, used by the sources of several configurations."""

    def __init__(self, a: argparse.Namespace, folder: Path):
        self.a, self.folder, self.groups = a, folder, a.groups[0]
        self.arch = replace(MODELS[a.model], context=a.length + a.longest)
        demo_task.write(folder / "data", num_sft=512, num_rl=1, num_heldout=1)
        demo_task.make_model(folder / "model", folder / "data", hf.description(self.arch))
        self.tokenizer = Tokenizer.load(folder / "model")
        self.mesh = Mesh(self.config(1).parallel, 1)
        from rlhf.rollout.vllm import VLLM

        dtype = "bfloat16" if self.mesh.device.type == "cuda" else "float32"
        self.engine = VLLM(
            str(folder / "model"),
            tp=1,
            dtype=dtype,
            seed=1,
            max_len=a.length + a.longest,
            memory=a.memory,
            cache=a.cache,
        )

    def config(self, inflight: float) -> Any:
        a = self.a
        keys = [
            f"batch.prompts={self.groups}",
            f"rollout.group={a.siblings}",
            f"rollout.inflight={inflight}",
            f"rollout.max_lag={a.max_lag}",
        ]
        keys += [
            f"policy.load={self.folder}/model",
            f"rollout.max_tokens={a.longest}",
            f"data.max_tokens={a.length + a.longest}",
        ]
        return configuration.load("grpo", keys)

    def source(self, inflight: float, lengths: Lengths) -> EngineSource:
        owner = EngineOwner(self.engine, Residence((), self.mesh.device))
        prompts: Any = Prompts(self.arch.vocab, self.a.length)
        made = EngineSource(self.config(inflight), self.mesh, owner, self.tokenizer, prompts, Free(), self.arch.hidden)
        made.sampler = Forced(made.config, self.mesh, owner, self.tokenizer)
        made.sampler.lengths = lengths
        return made

    def take(self, source: EngineSource, step: int) -> tuple[list[Sample], dict[str, float], float]:
        """Take one step. Returns its samples, metrics and seconds."""
        source.owner.version = step
        self.engine.llm.reset_prefix_cache()
        record.wait()
        start = time.perf_counter()
        samples, sums = source.take(step)
        record.wait()
        return samples, {name: total / count for name, (total, count) in sums.items()}, time.perf_counter() - start

    def measure(self, inflight: float, sigma: float, warm: int, steps: int) -> dict[str, Any]:
        """Measure the counted steps, after the warm-up steps."""
        source = self.source(inflight, Lengths(self.a.mean, self.a.longest, sigma))
        seconds, tokens, longest, ages = 0.0, 0, 0, {}
        for step in range(warm + steps):
            samples, sums, taken = self.take(source, step)
            print(f"  step {step}: {taken:.1f} s, {sum(int(s.mask.sum()) for s in samples):,} tokens", flush=True)
            if step >= warm:
                seconds, tokens = seconds + taken, tokens + sum(int(s.mask.sum()) for s in samples)
                longest = max(longest, *(int(s.mask.sum()) for s in samples))
                ages = {
                    name: ages.get(name, 0.0) + value / steps for name, value in sums.items() if name.startswith("lag")
                }
        return {
            "seconds": seconds,
            "tokens": tokens,
            "us_per_token": 1e6 * seconds / tokens,
            "longest": longest,
            **ages,
        }

    def same(self) -> dict[str, bool]:
        """Compare samples: of two equal runs, and of a run that is restored from its state after each step."""

        def said(samples: list[Sample]) -> list[tuple]:
            return [(s.tokens.tolist(), s.sampler_logp.tolist(), s.version.tolist()) for s in samples]

        lengths, found, steps = Lengths(self.a.mean // 8, self.a.longest // 8, 1.0), [], 4
        for resumed in (False, False, True):
            source, run = self.source(1.5, lengths), []
            for step in range(steps):
                run.append(said(self.take(source, step)[0]))
                if resumed:
                    state, source = source.state(), self.source(1.5, lengths)
                    source.resume(step + 1, state)
            found.append(run)
        return {"twice": found[0] == found[1], "resumed": found[0] == found[2]}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=MODELS, default="8b")
    p.add_argument("--groups", type=int, nargs="*", default=[64, 16], help="prompts per step (batch.prompts)")
    p.add_argument("--siblings", type=int, default=8, help="responses per prompt (rollout.group)")
    p.add_argument("--inflight", type=float, nargs="*", default=[1.0, 1.5], help="rollout.inflight")
    p.add_argument("--max-lag", type=int, default=4, help="rollout.max_lag")
    p.add_argument("--length", type=int, default=128, help="tokens per prompt")
    p.add_argument("--mean", type=int, default=906, help="mean tokens per response")
    p.add_argument("--longest", type=int, default=16384, help="largest number of tokens per response")
    p.add_argument("--warm", type=int, default=2, help="uncounted steps, if responses are in flight between steps")
    p.add_argument("--steps", type=int, default=2, help="number of counted steps")
    p.add_argument(
        "--memory", type=float, default=0.85, help="share of the device's memory for the engine (rollout.memory)"
    )
    p.add_argument("--cache", type=float, default=0.0, help="GiB of KV cache (rollout.cache)")
    p.add_argument("--check", action="store_true", help="also compare runs")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(a, Path(folder))
        shape = {"model": a.model, "siblings": a.siblings, "mean": a.mean, "longest": a.longest, "max_lag": a.max_lag}
        if a.check:
            record.say("tail", f"{bench.groups} groups, check", shape | bench.same())
        for bench.groups in a.groups:
            equal = bench.measure(1.0, 0.0, 0, 1)
            record.say("tail", f"{bench.groups} groups of equal lengths", shape | equal)
            for inflight in a.inflight:
                found = bench.measure(inflight, 1.0, *((a.warm, a.steps) if inflight > 1 else (0, 1)))
                ratio = found["us_per_token"] / equal["us_per_token"]
                record.say("tail", f"{bench.groups} groups, {inflight:g} in flight", shape | found | {"ratio": ratio})
    os._exit(0)  # at a normal exit vLLM and torch.distributed would destroy each other's groups


if __name__ == "__main__":
    main()
