"""Measure a whole step of GRPO or PPO by phase, from the metrics of a run.

    python benchmarks/step.py OUT                           GRPO, 16 layers of Llama-2-7B's shapes, 64 x 8 responses
    python benchmarks/step.py OUT --mode rlhf --model 1b    PPO with four models of Llama-3.2-1B's dimensions
    python benchmarks/step.py OUT --model toy --layers 2 --steps 2 batch.prompts=4 rollout.group=2 rollout.max_tokens=8
                                                            on a CPU

Weights and rewards are random, and the prompts are word problems: the computation is that of a real run. The run is
python -m rlhf with one rank per GPU and the given key=value. It is killed after its last counted step, so it writes no
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import record
import torch
from publish import MODELS

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task

from rlhf import configuration
from rlhf.ledger import Ledger
from rlhf.model.architecture import Architecture
from rlhf.residence import capacity
from rlhf.shapes import shapes
from rlhf.weights.formats import hf

ROOT = Path(__file__).parents[1]
LLAMA1B = Architecture(
    family="llama",
    layers=16,
    hidden=2048,
    ffn=8192,
    heads=32,
    kv_heads=8,
    head_dim=64,
    vocab=128256,
    context=4096,
    eps=1e-5,
    tied=True,
    rope_theta=5e5,
)
SIZES = {**MODELS, "1b": LLAMA1B}
KEYS = [
    "data.max_tokens=512",
    "batch.prompts=64",
    "batch.tokens=16384",
    "rollout.group=8",
    "rollout.max_tokens=400",
    "optim.lr=1e-6",
]
KEYS += ["rollout.memory=0.5", "checkpoint.every=0", "evaluate.every=0", "reward.function=tools/demo_task.py:noise"]
WITHIN = ("time/step", "time/switch", "time/reward")  # not phases: the whole step, and parts of phases
MODES = {"grpo": [], "rlhf": ["ppo.kl=0.02"]}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--mode", choices=MODES, default="grpo")
    p.add_argument("--model", choices=SIZES, default="7b")
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--steps", type=int, default=2, help="number of counted steps")
    p.add_argument(
        "--warm", type=int, default=1, help="uncounted steps before, which choose kernels and allocate memory"
    )
    p.add_argument("--limit", type=int, default=540, help="time limit in seconds")
    p.add_argument("keys", nargs="*", help="key=value for the run")
    return p.parse_intermixed_args()


def run(a: argparse.Namespace, arch: Architecture) -> None:
    """Run the steps. Their metrics are in a.out."""
    shutil.rmtree(a.out, ignore_errors=True)
    demo_task.write(a.out / "data")
    demo_task.make_model(a.out / "model", a.out / "data", hf.description(arch))
    model = a.out / "model"
    roles = [f"policy.load={model}", "policy.init=random", *([f"reward.load={model}"] if a.mode == "rlhf" else [])]
    keys = [
        *KEYS,
        *MODES[a.mode],
        *roles,
        f"data.train={a.out}/data/train_rl.jsonl",
        f"out={a.out}/run",
        f"steps={a.warm + a.steps + 1}",
    ]
    command = [sys.executable, "-m", "rlhf", a.mode, *keys, *a.keys]
    env = {name: value for name, value in os.environ.items() if name not in record.WORLD}  # set by the launcher
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    metrics, end = a.out / "run" / "metrics.jsonl", time.monotonic() + a.limit
    while process.poll() is None and time.monotonic() < end and lines(metrics) < a.warm + a.steps:
        time.sleep(0.1)
    early = process.poll()
    if early is None:
        ranks = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while any(map(running, ranks)):  # the ranks end after their launcher; then the device is free
            time.sleep(0.1)
    assert lines(metrics) >= a.warm + a.steps, f"{lines(metrics)} steps in {a.limit} s; exit code {early}"


def running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def counted(a: argparse.Namespace) -> list[dict]:
    """Return the metrics of the counted steps of the run in a.out."""
    rows = [json.loads(line) for line in (a.out / "run" / "metrics.jsonl").read_text().splitlines()]
    return rows[a.warm : a.warm + a.steps]


def memory(config: Path, mode: str, rows: list[dict]) -> dict[str, float]:
    """Return the predicted GiB by phase, the largest error, and the growth of each peak over the counted steps."""
    places = sorted({name for row in rows for name in row if name.startswith("memory/")})
    found = {name.replace("memory", "rise", 1): rows[-1].get(name, 0.0) - rows[0].get(name, 0.0) for name in places}
    if torch.cuda.is_available():
        chosen, world = configuration.load(mode, [str(config)]), torch.cuda.device_count()
        ledger = Ledger(chosen, *shapes(chosen, world), world, capacity(torch.device("cuda")), 2)
        measured = {visit: max(row.get(f"memory/{visit}", 0.0) for row in rows) for visit in ledger.visits}
        found |= {f"predicted/{visit}": ledger.need(visit) for visit in measured}
        found["ledger_error"] = max((ledger.need(visit) / gib - 1 for visit, gib in measured.items() if gib), key=abs)
    return found


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def main() -> None:
    a = options()
    a.out = a.out.resolve()
    arch = replace(SIZES[a.model], layers=a.layers)
    run(a, arch)
    rows = counted(a)
    means = {
        name: sum(row.get(name, 0.0) for row in rows) / len(rows)
        for name in sorted({name for row in rows for name in row})
    }
    kept = {
        name: value
        for name, value in means.items()
        if name.startswith(("time/", "memory/")) or name in ("tokens_per_second", "mismatch")
    }
    kept |= {name: means[name] for name in ("response_tokens", "truncated") if name in means}
    kept |= memory(a.out / "run" / "config.toml", a.mode, rows)
    phases = sum(value for name, value in kept.items() if name.startswith("time/") and name not in WITHIN)
    gpus = torch.cuda.device_count()
    about = {
        "model": a.model,
        "layers": a.layers,
        "parameters": arch.num_parameters(),
        "steps": len(rows),
        "gpus": gpus,
    }
    record.say(
        "step",
        f"{a.mode} {a.model}" + f", {gpus} GPUs" * (gpus > 1),
        {
            **about,
            **kept,
            "time/between": kept["time/step"] - phases,
            "switching": kept["time/switch"] / kept["time/step"],
        },
    )


if __name__ == "__main__":
    main()
