"""SFT and GRPO on a small task, from generated data to an aligned model.

./launch.sh demo [key=value ... for the GRPO stage]

Creates a data set, a tokenizer and a tiny model in runs/demo. Supervised fine-tuning makes a mediocre model. GRPO with
the math verifier as reward improves it. Then a new process loads the exported Hugging Face folder in vLLM and
evaluates it again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import demo_task

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rlhf import output, variables  # noqa: E402
from rlhf.errors import told  # noqa: E402

RUNS = ROOT / "runs" / "demo"
EVALUATION = ["configs/demo/grpo.toml", "evaluate.prompts=0", "parallel.tp=1"]


def main(overrides: list[str]) -> int:
    if {"-h", "--help"} & {*overrides}:
        print(__doc__)
        return 0
    began = time.time()
    shutil.rmtree(RUNS, ignore_errors=True)
    demo_task.write(RUNS / "data")
    demo_task.make_model(RUNS / "model", RUNS / "data")
    stages = [
        ("supervised fine-tuning", "sft", ["configs/demo/sft.toml"]),
        ("GRPO", "grpo", ["configs/demo/grpo.toml", "evaluate.prompts=0", *overrides]),
        (
            "a new process loads runs/demo/grpo/hf",
            "evaluate",
            [*EVALUATION, "policy.load=runs/demo/grpo/hf", "out=runs/demo/evaluate"],
        ),
    ]
    seconds = {}
    for title, mode, arguments in stages:
        print(f"\n== {title}: ./launch.sh {mode} {' '.join(arguments)}", flush=True)
        start = time.time()
        command, environment = [sys.executable, "-m", "rlhf", mode, *arguments], variables.without(os.environ)
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code:
            return code
        seconds[title] = time.time() - start
    report(seconds, time.time() - began)
    return 0


def report(seconds: dict[str, float], total: float) -> None:
    """Print the table at the end."""
    grpo, evaluated = metrics("grpo"), metrics("evaluate", "evaluate")
    accuracies = {row["step"]: row["eval_reward"] for row in grpo if "eval_reward" in row}
    rewards = [row["reward"] for row in grpo if "reward" in row]
    print("\nheld-out accuracy (greedy, prompts that no stage trained on)")
    print(f"  after supervised fine-tuning      {accuracies[min(accuracies)]:6.1%}")
    print(f"  after GRPO                        {accuracies[max(accuracies)]:6.1%}")
    print(f"  exported folder in a new vLLM     {evaluated[-1]['eval_reward']:6.1%}")
    print("\nmean reward of the samples, by step")
    for first in range(0, len(rewards), 10):
        part = rewards[first : first + 10]
        print(
            f"  {first + 1:3}-{first + len(part):3}  {sum(part) / len(part):6.1%}  "
            f"{'#' * round(40 * sum(part) / len(part))}"
        )
    phases = sorted(
        {name for row in grpo for name in row if name.startswith("time/")} - {"time/step", "time/switch", "time/reward"}
    )
    print("\nseconds of GRPO by phase")
    for name in phases:
        print(f"  {name.removeprefix('time/'):10} {sum(row.get(name, 0.0) for row in grpo):7.1f}")
    print("\nseconds by stage, including the start of the processes")
    for title, value in seconds.items():
        print(f"  {title:42} {value:7.1f}")
    print(f"  {'total':42} {total:7.1f}")


def metrics(stage: str, name: str = "metrics") -> list[dict[str, float]]:
    return [json.loads(line) for line in (RUNS / stage / f"{name}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    output.secure()
    sys.exit(told("demo", lambda: main(sys.argv[1:])))
