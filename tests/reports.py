"""Writes the files of runs without training, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf import configuration
from rlhf.report import page

needs_library = pytest.mark.skipif(page.plotting() is None, reason="the package bokeh is not installed")


def sample(step: int, group: int, response: str, reward: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """Return a line of a sample file, as rlhf.recorder writes it."""
    line = {
        "step": step,
        "use": "train",
        "row": group,
        "group": group,
        "prompt": f"prompt {group}",
        "response": response,
    }
    line |= {"turns": [{"role": "assistant", "content": response}], "reward": reward, "rule": reward, "score": 0.0}
    line |= {"parts": {"style": 0.5}, "failed": reward is None, "advantage": 0.1, "finish": "stop", "versions": [step]}
    return line | {"prompt_tokens": [1] * 5, "response_tokens": [1] * 15} | more


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(out: Path, steps: int = 12, mode: str = "grpo", *overrides: str) -> Path:
    """Write the files of a run of some steps, with an evaluation every 5 steps, without training."""
    names = ("reward", "loss", "kl", "entropy", "response_tokens", "mismatch", "grad_norm", "odd/metric")
    rows: list[dict[str, Any]] = [{"step": 0, "eval_reward": 0.1, "time/step": 0.5}]
    for step in range(1, steps + 1):
        row = {name: math.sin(step / 50 + i) + random.random() / 5 for i, name in enumerate(names)}
        row |= {
            "time/rollout": 1.0,
            "time/learn": 2.0,
            "time/step": 3.5,
            "memory/rollout": 10 + step / steps,
            "memory/host": 90.0,
        }
        row |= {f"extra_{i}": random.random() for i in range(20)} | ({"eval_math_reward": 0.2} if step % 5 == 0 else {})
        rows.append({"step": step, **row})
    write_lines(out / "metrics.jsonl", rows)
    toml = configuration.to_toml(configuration.load(mode, [f"out={out}", f"steps={steps}", *overrides]))
    (out / "config.toml").write_text(f"# ./launch.sh {mode} {out}/config.toml\n{toml}")
    (out / "ledger.json").write_text(
        '{"rollout": {"context": 2.5, "engine cache": 8.0}, "learn/policy": {"work": 3.0}}'
    )
    return out


def damage(out: Path) -> None:
    """Write a run whose files are damaged. It was killed after step 6, and went on after step 4."""
    write_run(out)
    rows = [json.dumps({"step": step, "loss": float(step)}) for step in (1, 2, 3, 4, 5, 6, 5, 7)]
    odd = [
        "\0\0\0\0",
        rows[0],
        "[1]",
        rows[1],
        "{" * 2000,
        *rows[2:],
        '{"step": 8, "loss": NaN, "kl": 1e999, "x": true}',
    ]
    (out / "metrics.jsonl").write_text(
        "\n".join(odd[:7] + odd[7:10] + ['{"step": "x"}'] + odd[10:]) + '\n{"step": 9, "lo'
    )
    (out / "config.toml").write_text("# ./launch.sh grpo x\n[cut")
    write_lines(out / "samples" / "step_000002.jsonl", [sample(2, 1, "kept"), {"step": [], "turns": 3, "prompt": 7}])
    with (out / "samples" / "step_000002.jsonl").open("a") as file:
        file.write('{"step": 2, "prom')
