"""Run the whole tutorial: python tools/tutorial.py [--size mini|large] [--seeds N].

It converts a Hugging Face folder to Megatron's format, trains SFT and the reward model, then RLHF, DPO, OnlineDPO and
GRPO from the same SFT model, and converts back. At the end, a new engine per model answers held-out prompts, and a
table shows the gold rewards. A second table is that of MT-Bench: each model answers questions of two turns, and a judge
rates the answers. tools/tutorial_judge.py is the judge. Set JUDGE_URL to an OpenAI-compatible endpoint to use a
language model instead, and JUDGE_MODEL, too, if the endpoint has several.

All stages run once per seed, MT-Bench for the first seed only. Independent stages run in parallel, one per core or per
GPU. tools/tutorial_task.py has the task, and configs/tutorial/ the keys of each stage.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import curves
import demo_task
import tutorial_judge
import tutorial_task

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rlhf import output, texts, variables  # noqa: E402
from rlhf.config import Judge  # noqa: E402
from rlhf.errors import UserError, told  # noqa: E402
from rlhf.judge import client  # noqa: E402

OUT = ROOT / "runs/tutorial"
MODELS = {"sft": "SFT", "rlhf": "RLHF (PPO)", "dpo": "DPO", "online-dpo": "OnlineDPO", "grpo": "GRPO"}
SIZES: dict[str, dict[str, Any]] = {  # changes to the config.json of tools/demo_task.py
    "mini": {"vocab_size": 320},
    "large": {
        "vocab_size": 448,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
}


RECORDS = {"mini": 8192, "large": 32768}  # lines of each training file
Slot = tuple[int, str]  # number of the slot, and its GPU (empty: no choice)


@dataclass
class Stage:
    """One command, and the stages that must end before it."""

    name: str  # also the name of its folder
    arguments: list[str]  # of launch.sh
    after: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def stages(out: Path, size: str, seed: int, url: str) -> list[Stage]:
    """Return the stages of one seed. url: the endpoint of the judge."""
    run, data, reward = out / f"seed{seed}", out / "data", f"reward.load={out}/seed{seed}/reward/hf"

    def train(mode: str, load: Path, after: tuple[str, ...], *more: str) -> Stage:
        files = [
            f"configs/tutorial/{name}.toml"
            for name in (mode, f"{size}/{mode}")
            if (ROOT / f"configs/tutorial/{name}.toml").exists()
        ]
        kind = {"sft": "sft", "reward": "reward", "dpo": "dpo"}.get(mode, "prompts")
        keys = [f"policy.load={load}", f"data.train={data}/train_{kind}.jsonl", f"data.eval={data}/dev_{kind}.jsonl"]
        return Stage(mode, [mode, *files, *keys, f"out={run}/{mode}", f"seed={seed}", *more], after)

    def evaluate(mode: str, folder: Path, after: str) -> Stage:
        keys = ["evaluate.prompts=0", "evaluate.temperature=1", "evaluate.function=tools/tutorial_task.py:gold"]
        keys += ["data.max_tokens=96", "rollout.max_tokens=64"]
        where = [f"policy.load={folder}", f"data.eval={data}/dev_prompts.jsonl", f"out={run}/evaluate-{mode}"]
        return Stage(f"evaluate-{mode}", ["evaluate", *keys, *where, f"seed={seed}"], (after,))

    sft = run / "sft/hf"
    aligned = [train(mode, sft, ("sft", "reward"), reward) for mode in ("rlhf", "online-dpo", "grpo")]
    aligned[0].arguments.append('checkpoint.format=["hf", "legacy"]')
    back = {
        "LOAD_PATH": f"{run}/rlhf/legacy",
        "SAVE_PATH": f"{run}/rlhf/converted",
        "TOKENIZER_MODEL": str(out / "model"),
    }
    found = [
        train("sft", out / "megatron", ()),
        train("reward", sft, ("sft",)),
        *aligned,
        train("dpo", sft, ("sft",)),
        Stage("convert", ["convert_megatron_to_hf"], ("rlhf",), back),
        evaluate("rlhf", run / "rlhf/converted", "convert"),
        *[evaluate(mode, run / mode / "hf", mode) for mode in MODELS if mode != "rlhf"],
    ]
    if seed == 1:
        found.append(benchmark(out, run, url))
    return [
        replace(stage, name=f"{run.name}/{stage.name}", after=tuple(f"{run.name}/{name}" for name in stage.after))
        for stage in found
    ]


def benchmark(out: Path, run: Path, url: str) -> Stage:
    """Return the stage of MT-Bench for the models in `run`. No proxy is used for the tutorial's own judge."""
    folders = {mode: run / mode / ("converted" if mode == "rlhf" else "hf") for mode in MODELS}
    models = ",".join(f'"{mode}={folder}"' for mode, folder in folders.items())
    keys = [f"mtbench.models=[{models}]", f"data.eval={out}/data/mtbench.jsonl", f"judge.url={url}"]
    given = os.environ.get("JUDGE_URL")
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]
    environment = {} if given else {"no_proxy": ",".join(filter(None, direct))}
    keys += [f"judge.model={os.environ.get('JUDGE_MODEL', '') if given else ''}"]
    keys += ["data.max_tokens=128", "rollout.max_tokens=64"]
    after = ("convert", *(mode for mode in MODELS if mode != "rlhf"))
    return Stage("mtbench", ["mtbench", *keys, f"out={run}/mtbench", "seed=1"], after, environment)


def judge() -> AbstractContextManager[str]:
    """Return the endpoint that JUDGE_URL names, or else the tutorial's own judge. Raises UserError if none answers."""
    url = os.environ.get("JUDGE_URL")
    if not url:
        return tutorial_judge.serve()
    client.probe(Judge(url=url, model=os.environ.get("JUDGE_MODEL", "")))
    return nullcontext(url)


def carry_out(todo: list[Stage], logs: Path, slots: list[Slot]) -> None:
    """Run the stages. A stage starts when the stages before it have ended and a slot is free."""
    done: set[str] = set()
    running: dict[Slot, tuple[Stage, subprocess.Popen, float]] = {}
    waiting = list(todo)
    while waiting or running:
        for slot in [slot for slot in slots if slot not in running]:
            ready = next((stage for stage in waiting if done.issuperset(stage.after)), None)
            if ready:
                waiting.remove(ready)
                running[slot] = (ready, start(ready, logs, slot), time.time())
        for slot, (stage, process, began) in list(running.items()):
            if process.poll() is None:
                continue
            del running[slot]
            if process.returncode:
                for _, other, _ in running.values():
                    other.terminate()
                log = logs / f"{stage.name}.log"
                sys.exit(
                    f"{log.read_text()[-3000:]}\n"
                    f"{stage.name} ended with exit code {process.returncode}; its output is in {log}"
                )
            done.add(stage.name)
            print(f"   {stage.name}: {time.time() - began:.0f} s", flush=True)
        time.sleep(0.1)


def start(stage: Stage, logs: Path, slot: Slot) -> subprocess.Popen:
    """Start the command of a stage, and print it as a user would type it."""
    shown = [f"{name}={value}" for name, value in stage.environment.items()]
    print(f"== {' '.join([*shown, shlex.join(['./launch.sh', *stage.arguments])])}", flush=True)
    environment = {
        **variables.without(os.environ),
        **stage.environment,
        "RLHF_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    if slot[1]:
        environment["CUDA_VISIBLE_DEVICES"] = slot[1]
    (logs / stage.name).parent.mkdir(parents=True, exist_ok=True)
    with (logs / f"{stage.name}.log").open("w") as log:
        return subprocess.Popen(
            [ROOT / "launch.sh", *stage.arguments], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def prepare(out: Path, size: str) -> None:
    """Create what a user provides: data, tokenizer, and a Hugging Face folder with random weights."""
    shutil.rmtree(out, ignore_errors=True)
    tutorial_task.write(out / "data", num=RECORDS[size])
    demo_task.make_model(
        out / "model", out / "data", SIZES[size], pieces=SIZES[size]["vocab_size"], template=tutorial_task.TEMPLATE
    )
    demo_task.make_weights(out / "model")
    convert = {"LOAD_PATH": f"{out}/model", "SAVE_PATH": f"{out}/megatron", "TP": "1", "PP": "1"}
    carry_out([Stage("convert", ["convert_hf_to_megatron"], (), convert)], out / "logs", [(0, "")])


def rows(path: Path, name: str = "metrics") -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]


def report(out: Path, seeds: range, seconds: float) -> str:
    """Return the tables: gold reward of each model, and its gain over SFT, over the seeds; and that of MT-Bench."""
    found = {
        mode: [rows(out / f"seed{seed}" / f"evaluate-{mode}", "evaluate")[-1]["eval_reward"] for seed in seeds]
        for mode in MODELS
    }
    lines = [
        "gold reward of sampled answers to held-out prompts",
        f"  {'model':12} {'mean':>7} {'gain':>9} {'noise':>7}   each seed",
    ]
    for mode, title in MODELS.items():
        gains = [value - base for value, base in zip(found[mode], found["sft"], strict=True)]
        noise = f"{stdev(gains):7.3f}" if len(gains) > 1 else "      -"
        each = " ".join(f"{value:.3f}" for value in found[mode])
        lines.append(f"  {title:12} {mean(found[mode]):7.3f} {mean(gains):+9.3f} {noise}   {each}")
    accuracy = [rows(out / f"seed{seed}/reward")[-1]["eval_accuracy"] for seed in seeds]
    lines.append(f"the reward model orders {mean(accuracy):.1%} of held-out pairs like the gold reward")
    (bench,) = out.glob("seed1/mtbench/model_judgment/*_single.md")
    lines.append(f"\nMT-Bench, mean ratings from 1 to 10, first seed\n\n{bench.read_text()}")
    lines.append(f"{seconds / 60:.1f} minutes in total")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = texts.Parser(prog="./launch.sh tutorial", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="mini", help="size of the model (default: mini, for a CPU)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="output folder (default: runs/tutorial, which is replaced)"
    )
    parser.add_argument(
        "--slots", type=int, default=len(os.sched_getaffinity(0)), help="parallel stages on a CPU (default: all cores)"
    )
    parser.add_argument("--gpus", default="", help="GPUs to use, such as 0,1: one stage at a time on each")
    chosen = parser.parse_args(arguments)
    began, out = time.time(), chosen.out.resolve()
    if min(chosen.seeds, chosen.slots) < 1:
        raise UserError(f"--seeds {chosen.seeds} --slots {chosen.slots}: both must be at least 1")
    if out != OUT and out.exists():
        raise UserError(f"--out {out} exists: give a new folder, or delete it")
    slots = list(enumerate(chosen.gpus.split(","))) if chosen.gpus else [(i, "") for i in range(chosen.slots)]
    seeds = range(1, chosen.seeds + 1)
    with judge() as url:
        prepare(out, chosen.size)
        todo = [stage for seed in seeds for stage in stages(out, chosen.size, seed, url)]
        carry_out(todo, out / "logs", slots)
    text = report(out, seeds, time.time() - began)
    (out / "table.txt").write_text(text)
    curves.draw(
        {title: rows(out / "seed1" / mode) for mode, title in MODELS.items() if mode not in ("sft", "dpo")},
        "eval_reward",
        out / "curves",
    )
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    output.secure()
    sys.exit(told("tutorial", lambda: main(sys.argv[1:])))
