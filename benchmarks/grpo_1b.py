"""SFT and GRPO at Llama-3.2-1B's dimensions on one GPU: python benchmarks/grpo_1b.py OUT [key=value ...].

Weights and rewards are random, and the prompts are the demo's word problems: the computation is that of a real run.
It shows that rollout, publish, learn, checkpoint, SIGKILL, resume and export work at this size. It prints one JSON line
with the mean seconds of each phase.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import demo_task  # noqa: E402

DIMENSIONS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
COMMON = ["data.max_tokens=640", "batch.prompts=64", "batch.tokens=16384", "checkpoint.keep=1", "evaluate.every=0"]
GRPO = [
    "steps=8",
    "rollout.group=8",
    "rollout.max_tokens=512",
    "evaluate.prompts=64",
    "checkpoint.every=4",
    "optim.lr=1e-5",
]
GRPO += ["rollout.check=true", "reward.function=tools/demo_task.py:noise"]  # random weights solve no problem
WARM_UP = 2  # uncounted first steps, which choose kernels and allocate memory


def main(out: Path, overrides: list[str]) -> None:
    shutil.rmtree(out, ignore_errors=True)
    demo_task.write(out / "data")
    demo_task.make_model(out / "model", out / "data", DIMENSIONS)
    data = [f"data.train={out}/data/train_sft.jsonl"]
    run(
        "sft",
        [
            f"out={out}/sft",
            f"policy.load={out}/model",
            "policy.init=random",
            "steps=5",
            "optim.lr=1e-5",
            *data,
            *COMMON,
        ],
    )
    data = [f"data.train={out}/data/train_rl.jsonl", f"data.eval={out}/data/heldout.jsonl"]
    grpo = [f"out={out}/grpo", f"policy.load={out}/sft/hf", *data, *COMMON, *GRPO, *overrides]
    run("grpo", grpo, kill_after=6)
    run("grpo", grpo)
    run("evaluate", [*grpo, f"out={out}/evaluate", f"policy.load={out}/grpo/hf"])
    print(json.dumps(summary(out)))


def run(mode: str, arguments: list[str], kill_after: int = 0) -> None:
    """Run one command. With kill_after, send SIGKILL to its processes when its metrics have that many steps."""
    print(f"== {mode} {' '.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "rlhf", mode, *arguments], cwd=ROOT, start_new_session=True)
    metrics = Path(arguments[0].removeprefix("out=")) / "metrics.jsonl"
    while kill_after and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) > kill_after:
            os.killpg(process.pid, signal.SIGKILL)
            print("== killed", flush=True)
            process.wait()
            return
        time.sleep(0.05)
    assert process.wait() == 0, f"{mode} ended with exit code {process.returncode}"


def summary(out: Path) -> dict:
    """Return the means over the counted steps."""
    import torch

    rows = [json.loads(line) for line in (out / "grpo" / "metrics.jsonl").read_text().splitlines()][1 + WARM_UP :]
    assert [row["step"] for row in rows] == list(range(1 + WARM_UP, 9)), (
        "the resumed run did not complete the killed one"
    )
    names = sorted({name for row in rows for name in row})
    means = {
        name: round(sum(row.get(name, 0.0) for row in rows) / len(rows), 5)
        for name in names
        if name not in ("step", "lr")
    }
    versions = {name: version(name) for name in ("torch", "vllm", "megatron-core")}
    command = "python benchmarks/grpo_1b.py OUT"
    return {
        "benchmark": "grpo_1b",
        "device": torch.cuda.get_device_name(),
        "command": command,
        **versions,
        "steps": len(rows),
        **means,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
