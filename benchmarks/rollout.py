"""Measure the speed of the sampler, relative to vLLM alone with the same prompts.

    python benchmarks/rollout.py                                     one GPU: Llama-2-7B, 512 prompts
    python benchmarks/rollout.py --model toy --prompts 4 --new 8     on a CPU

By default, prompts have 128 tokens and responses 256. The weights are vLLM's dummy weights. Two more cases show the
cost of what training needs per request: log-probs and a seed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import record
from publish import MODELS

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task

from rlhf import configuration
from rlhf.contracts import ABSENT, Sample
from rlhf.data.tokenizer import Tokenizer
from rlhf.model.architecture import Architecture
from rlhf.parallel.mesh import Mesh
from rlhf.residence import Residence
from rlhf.rollout.owner import EngineOwner
from rlhf.rollout.source import EngineSource
from rlhf.weights.formats import hf


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", choices=MODELS, default="7b")
    p.add_argument("--prompts", type=int, default=512)
    p.add_argument("--length", type=int, default=128, help="tokens per prompt")
    p.add_argument("--new", type=int, default=256, help="tokens per response")
    p.add_argument(
        "--memory", type=float, default=0.85, help="share of the device's memory for the engine (rollout.memory)"
    )


def build(a: argparse.Namespace, folder: Path) -> EngineSource:
    """Return a sampler with a vLLM engine that has had no publish."""
    arch: Architecture = MODELS[a.model]
    demo_task.write(folder / "data", num_sft=512, num_rl=1, num_heldout=1)
    demo_task.make_model(folder / "model", folder / "data", hf.description(arch))
    longest = a.length + a.new
    overrides = [
        f"policy.load={folder}/model",
        f"rollout.max_tokens={a.new}",
        f"data.max_tokens={longest}",
        f"rollout.memory={a.memory}",
    ]
    config = configuration.load("grpo", overrides)
    mesh = Mesh(config.parallel, 1)
    from rlhf.rollout.vllm import VLLM

    dtype = "bfloat16" if mesh.device.type == "cuda" else "float32"
    engine = VLLM(str(folder / "model"), tp=1, dtype=dtype, seed=1, max_len=longest, memory=a.memory, cache=0.0)
    owner = EngineOwner(engine, Residence((), mesh.device))
    return EngineSource(config, mesh, owner, Tokenizer.load(folder / "model"), ABSENT, Free(), arch.hidden)


class Free:
    """A grader that gives reward 0 to every response."""

    def give(self, sample: Sample) -> None:
        pass

    def collect(self, block: bool = False) -> None:
        pass


def measure(a: argparse.Namespace, source: EngineSource) -> None:
    """Measure four ways to generate the same number of tokens, each after an uncounted call."""
    from vllm import SamplingParams

    rng = np.random.default_rng(1)
    vocab = MODELS[a.model].vocab
    tokens = [rng.integers(3, vocab, a.length).astype(np.int32) for _ in range(a.prompts)]
    prompts = [Sample(t, np.zeros(a.length - 1, bool), group=i) for i, t in enumerate(tokens)]
    llm = source.owner.engine.llm
    plain = {"temperature": 1.0, "max_tokens": a.new, "ignore_eos": True, "detokenize": False}

    def alone(seeded: bool, **more: Any) -> None:
        requests = [SamplingParams(**plain, **more, seed=i if seeded else None) for i in range(a.prompts)]
        llm.generate([{"prompt_token_ids": t.tolist()} for t in tokens], requests, use_tqdm=False)

    def ours() -> None:
        samples = source.sample(prompts, source.sampler.sampling(), 1, 0, Free())
        made.append(sum(int(s.mask.sum()) for s in samples))

    made: list[int] = []
    ways: dict[str, Callable[[], None]] = {
        "alone": partial(alone, False),
        "alone, with log-probs": partial(alone, False, logprobs=0, flat_logprobs=True),
        "alone, with log-probs and seeds": partial(alone, True, logprobs=0, flat_logprobs=True),
        "sampler": ours,
    }
    first = 0.0

    def uncached(way: Callable[[], None]) -> None:
        llm.reset_prefix_cache()
        way()

    for name, way in ways.items():
        taken = record.seconds(partial(uncached, way), 1)
        rate = (made[-1] if made else a.prompts * a.new) / taken  # a few of the sampler's responses may end early
        first = first or rate
        result = {
            "model": a.model,
            "prompts": a.prompts,
            "prompt_tokens": a.length,
            "new_tokens": a.new,
            "memory": a.memory,
        }
        record.say("rollout", name, result | {"seconds": taken, "tokens_per_s": rate, "share_of_alone": rate / first})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(p)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(a, build(a, Path(folder)))
    os._exit(0)  # at a normal exit vLLM and torch.distributed would destroy each other's groups


if __name__ == "__main__":
    main()
