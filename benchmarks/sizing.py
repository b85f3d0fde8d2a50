"""Write docs/sizing.md from the ledger, the estimate of a step, and benchmarks/results: python benchmarks/sizing.py.

For each model, mode and device, it tries numbers of GPUs from one on, and their layouts, until one passes the checks
that a run makes. Of the layouts with the smallest number, it takes the one with the lowest estimate. Needs no torch.
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf import configuration
from rlhf.config import Config, Memory
from rlhf.errors import UserError
from rlhf.estimate import Estimate, estimate
from rlhf.ledger import Ledger
from rlhf.model.architecture import Architecture
from rlhf.phases import Phase
from rlhf.shapes import shapes
from rlhf.weights.formats import hf

ROOT = Path(__file__).parents[1]
MODELS = ("llama2-7B", "llama2-13B", "llama2-70B", "llama3.1-8B", "llama3.1-70B")
MODELS += ("qwen2.5-7B", "qwen2.5-32B", "qwen3-8B", "qwen3-14B", "qwen3-32B")
MODES = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "rlhf": "PPO"}
DEVICES = {80: 79.0, 141: 139.8}  # GB of the data sheet -> GiB that the device reports
WORLDS = (1, 2, 4, 8, 16, 32, 64)
SPLITS = (1, 2, 4, 8)  # of tp, pp and rollout.tp; tp stays within a node
KEYS = ("data.max_tokens=2048", "rollout.max_tokens=1024", "batch.prompts=64", "rollout.group=8", "batch.tokens=8192")
# what benchmarks/step.py sets, for its models and arguments
MEASURED = (
    "data.max_tokens=512",
    "batch.prompts=64",
    "batch.tokens=16384",
    "rollout.group=8",
    "rollout.max_tokens=400",
)
MEASURED += ("rollout.memory=0.5",)
KEYS_OF = {"grpo": (), "rlhf": ("ppo.kl=0.02",)}
LLAMA = Architecture(
    family="llama", layers=0, hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000, context=4096,
    eps=1e-5, tied=False, rope_theta=1e4,
)  # fmt: skip
SHAPES = {
    "7b": LLAMA,
    "1b": replace(LLAMA, hidden=2048, ffn=8192, kv_heads=8, head_dim=64, vocab=128256, tied=True),
}
PHASES = (Phase.ROLLOUT, Phase.SCORE, Phase.LEARN, Phase.PUBLISH)
TEXT = """# How many GPUs a model needs

`python benchmarks/sizing.py` writes this page from the ledger and the estimate of `--dry-run`, and a test fails if it
is stale. Your own configuration gets both (the estimate only with vLLM and bfloat16) with

    GPUS_PER_NODE=2 ./launch.sh grpo policy.load=configs/models/qwen3-8B parallel.pp=2 memory.device=139.8 --dry-run

The tables have the smallest number of GPUs (a power of two) with which the checks of a run pass, and of the layouts
with this number the one with the lowest estimate. Weights are bfloat16, and the settings are

    {keys}

and else the defaults: one update per step, and a reference model except for SFT. So a step of SFT has 64 records, of
DPO 64 pairs, and of GRPO and PPO 64 x 8 responses. PPO's critic and reward model have the size of the policy. All
samples have the full length, 2,048 tokens, with responses of 1,024. More GPUs, or shorter samples, make a step faster.

* **80 GB** is an H100 SXM (79 GiB for programs), **141 GB** an H200 (139.8 GiB).
* **offloaded**: what is in host memory while no phase needs it. **host GiB** is the size of it, per GPU.
* **GiB by phase**: the predicted device memory of a rank, on the pipeline stage that needs the most.
* **step**: the estimated seconds of a step and of its phases.

## What an estimate is made of

`rlhf/estimate.py` has all constants, each with its source.

* **learn**: the FLOPs of forward and backward at the rate that was measured for `parallel.tp` (590 TFLOP/s per GPU
  alone, 557 with tp 2, 511 with 4, 462 with 8 at 70B's shapes), times the idle time of a pipeline and the second
  forward pass of `recompute=full`; and the bytes of the optimizer.
* **score**: a forward pass of each scoring role, at 3.08 times the rate per token of forward and backward.
* **rollout**: per token of a response, one step of the engine. The device reads the weights and all keys and values at
  4.15 TB/s, and multiplies at 650 TFLOP/s. The host needs 30 us per sequence. Both overlap in part: it is the root of
  the sum of their squares. If the KV cache holds fewer sequences, the rest follows in further rounds.
* **publish**: the bytes of the engine's weights, and 0.4 s in which the engine sleeps and wakes.
* Offloaded tenants move at 48 GiB/s when a phase begins. This is part of the phases.

Measured are the rates of H200s, alone and on one node. Those of 80-GB devices are scaled by published numbers of an
H100 SXM: equal peak rates of matrix products (989 TFLOP/s), NVLink and host links, and 3.35 / 4.8 of the memory
bandwidth. They were not measured. Not included: the network between nodes (layouts of more than 8 GPUs), rewards,
evaluation, saves, further rounds of a step (`rollout.rounds`), and the long tails of response lengths
(docs/rollouts.md).

## How far estimates were off

Estimate / measurement for all {count} steps in `benchmarks/results/h200.jsonl`, with the measured lengths. The whole
step: {least:.2f} to {most:.2f}. The seconds of the host per sequence, the way it overlaps, and the 0.4 s of a switch
were fitted to these steps; the other constants are from other benchmarks. No step was measured on more than two GPUs,
with a pipeline, or with `recompute=full`.

{errors}

{tables}
"""


@dataclass(frozen=True)
class Choice:
    """The smallest number of GPUs of a model, mode and device, and the best layout on it."""

    ledger: Ledger
    estimate: Estimate

    @property
    def layout(self) -> str:
        p = self.ledger.config.parallel
        parts = [f"tp {p.tp}", f"pp {p.pp}", f"dp {self.ledger.world // (p.tp * p.pp)}"]
        if self.ledger.engine:
            parts.append(f"rollout.tp {self.ledger.config.rollout.tp}, memory {self.ledger.config.rollout.memory:g}")
        return ", ".join(parts) + (", recompute full" if p.recompute == "full" else "")

    @property
    def offloaded(self) -> str:
        """The offloaded tenants, by role."""
        away = sorted(map(str, self.ledger.offload))
        roles = sorted({name.split(".")[0] for name in away})
        kinds = {role: ", ".join(name.split(".")[1] for name in away if name.split(".")[0] == role) for role in roles}
        return "; ".join(f"{role}: {kinds[role]}" for role in roles) or "-"

    @property
    def host(self) -> float:
        return max(self.ledger.host(stage) for stage in range(len(self.ledger.tenants)))

    def gib(self, phase: Phase) -> str:
        needs = [self.ledger.need(visit) for visit in self.ledger.visits if visit.phase == phase]
        return f"{max(needs):.0f}" if needs else "-"


def choose(model: str, mode: str, device: float) -> Choice:
    """Return the layout for the smallest number of GPUs that a run accepts."""
    for world in WORLDS:
        found = [Choice(ledger, known) for ledger in fitting(model, mode, device, world) if (known := estimate(ledger))]
        if found:
            return min(found, key=lambda choice: choice.estimate.step)
    raise AssertionError(f"{model} {mode}: no layout on {WORLDS[-1]} GPUs")


def fitting(model: str, mode: str, device: float, world: int) -> Iterator[Ledger]:
    """Yield the ledgers of runs that fit. Each training layout recomputes activations only if it must."""
    folder = f"{ROOT}/configs/models/{model}"
    base = configuration.load(mode, [f"policy.load={folder}", *[f"reward.load={folder}"] * (mode == "rlhf"), *KEYS])
    for tp in (tp for tp in SPLITS if tp <= world):
        for pp in (pp for pp in SPLITS if tp * pp <= world):
            for recompute in ("none", "full"):
                parallel = replace(base.parallel, tp=tp, pp=pp, recompute=recompute)
                found = [*engines(replace(base, parallel=parallel), device, world)]
                yield from found
                if found:
                    break


def engines(config: Config, device: float, world: int) -> Iterator[Ledger]:
    """Yield a ledger for each rollout.tp with which the run fits, with the largest rollout.memory."""
    for rollout_tp in (tp for tp in SPLITS if tp <= world):
        config = replace(config, rollout=replace(config.rollout, tp=rollout_tp))
        try:
            arch, roles = shapes(config, world)
        except UserError:  # the layout does not divide the model
            continue
        for share in (0.85, 0.6, 0.4):
            tried = replace(config, rollout=replace(config.rollout, memory=share))
            least = Ledger(replace(tried, memory=Memory(offload="all")), arch, roles, world, device, 2)
            if any(least.need(visit) > least.room for visit in least.visits if not visit.is_engines):
                return  # the engine's keys do not change this
            if not least.fault():
                yield Ledger(tried, arch, roles, world, device, 2)
                break
        if not least.engine:
            return


def measured_steps() -> Iterator[tuple[str, dict, Estimate]]:
    """Yield case, result and estimate of each measured step, with the lengths of its samples."""
    for text in (ROOT / "benchmarks" / "results" / "h200.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["benchmark"] != "step":
            continue
        words = shlex.split(line["command"])
        mode = words[words.index("--mode") + 1] if "--mode" in words else "grpo"
        keys = [word for word in words if re.fullmatch(r"[a-z.]+=\S+", word)]
        with tempfile.TemporaryDirectory() as folder:
            arch = replace(SHAPES[line["model"]], layers=line["layers"])
            (Path(folder) / "config.json").write_text(json.dumps(hf.description(arch)))
            models = [f"policy.load={folder}", *[f"reward.load={folder}"] * (mode == "rlhf")]
            config = configuration.load(mode, [*models, *MEASURED, *KEYS_OF[mode], *keys])
            ledger = Ledger(config, *shapes(config, line["gpus"]), line["gpus"], DEVICES[141], 2)
        samples = config.batch.prompts * config.rollout.group
        tokens = round(line["tokens_per_second"] * line["time/step"] / samples)
        response = round(line["response_tokens"])
        known = estimate(ledger, tokens - response, response)
        assert known
        yield line["case"], line, known


def sizes(mode: str) -> str:
    """Return the table of a mode."""
    rows = [
        "| model | device | GPUs | layout | offloaded | GiB by phase | host GiB | step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for gb, gib in DEVICES.items():
            choice = choose(model, mode, gib)
            needs = ", ".join(f"{phase} {choice.gib(phase)}" for phase in PHASES if choice.gib(phase) != "-")
            parts = ", ".join(f"{name} {taken:.3g}" for name, taken in choice.estimate.phases.items() if taken)
            cells = (
                model,
                f"{gb} GB",
                str(choice.ledger.world),
                choice.layout,
                choice.offloaded,
                needs,
                f"{choice.host:.0f}",
                f"{choice.estimate.step:.3g} s: {parts}",
            )
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def errors() -> str:
    """Return the table that compares estimates with measured steps: estimate / measurement."""
    rows = ["| case | command | " + " | ".join([*map(str, PHASES), "whole step"]) + " |"]
    rows.append("|---|---|" + "---|" * (len(PHASES) + 1))
    for case, line, known in measured_steps():
        pairs = [(known.phases[phase], line[f"time/{phase}"]) for phase in PHASES]
        pairs.append((known.step, line["time/step"]))
        cells = [f"{guess:.2f} / {taken:.2f} s = {guess / taken:.2f}" for guess, taken in pairs]
        rows.append(f"| {case}, {line['layers']} layers | `{line['command']}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def page() -> str:
    """Return the text of docs/sizing.md."""
    ratios = [known.step / line["time/step"] for _, line, known in measured_steps()]
    tables = "\n\n".join(f"## {said}\n\n{sizes(mode)}" for mode, said in MODES.items())
    return TEXT.format(
        keys=" ".join(KEYS), tables=tables, errors=errors(), least=min(ratios), most=max(ratios), count=len(ratios)
    )


def main() -> None:
    (ROOT / "docs" / "sizing.md").write_text(page())


if __name__ == "__main__":
    main()
