"""An example of a tool: products that a small model cannot compute, and a calculator. A seed decides all data.

    python tools/calculator_task.py                  create data and a tiny model in runs/calculator
    ./launch.sh sft configs/calculator/sft.toml      demonstrate both ways to answer; the model mostly guesses
    ./launch.sh grpo configs/calculator/grpo.toml    the model learns to use the calculator
    ./launch.sh grpo configs/calculator/grpo.toml \\
        rollout.environment=tools/calculator_task.py:Noise out=runs/calculator/noise     a calculator with wrong results
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import demo_task

FORMS = (
    "What is {a} times {b}?",
    "{name} buys {a} bags of {b} nuts. How many nuts?",
    "{name} earns {a} a day. How much in {b} days?",
)
ASKING = 0.4  # share of the demonstrations that use the calculator; the others guess
CALL, ANSWER = re.compile(r"calc (\d{1,4}) \* (\d{1,4})"), re.compile(r"#### ?(\d+)")


class Calculator:
    """Answers calls such as `calc 12 * 34`. A turn without a call is the final answer: 1 if it is right, else 0."""

    def reset(self, record: dict) -> None:
        self.answer = record["answer"]

    def step(self, text: str) -> tuple[list[dict[str, str]] | None, float]:
        call, said = CALL.search(text), ANSWER.search(text)
        if call:
            return [{"role": "user", "content": self.product(int(call[1]), int(call[2]))}], 0.0
        return None, float(said is not None and said[1] == self.answer)

    def product(self, a: int, b: int) -> str:
        return str(a * b)


class Noise(Calculator):
    """Returns a wrong number, the same one for the same call. Using it must not help."""

    def product(self, a: int, b: int) -> str:
        return str(random.Random(f"{a} {b}").randrange(100, 10_000))


def question(a: int, b: int, draw: random.Random) -> str:
    return draw.choice(FORMS).format(name=draw.choice(demo_task.NAMES), a=a, b=b)


def dialogue(a: int, b: int, draw: random.Random) -> list[dict[str, str]]:
    """Return a conversation that uses the calculator, or guesses."""
    said = [question(a, b, draw), f"{a} * {b} #### {draw.randrange(10, 100)}"]
    if draw.random() < ASKING:
        said[1:] = [f"calc {a} * {b}", str(a * b), f"#### {a * b}"]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def write(folder: Path, seed: int = 0, num_sft: int = 8192, num_rl: int = 2048, num_heldout: int = 200) -> None:
    """Write three jsonl files. Pairs of numbers in the held-out file are not in the other files, in either order."""
    draw = random.Random(seed)
    pairs = [(a, b) for a in range(11, 100) for b in range(11, 100) if a <= b]
    draw.shuffle(pairs)
    heldout, train = pairs[:num_heldout], pairs[num_heldout:]

    def pick(pool: list[tuple[int, int]]) -> tuple[int, int]:
        a, b = draw.choice(pool)
        return (a, b) if draw.random() < 0.5 else (b, a)

    def problem(a: int, b: int) -> dict[str, str]:
        return {"prompt": question(a, b, draw), "answer": str(a * b)}

    files: dict[str, Sequence[dict]] = {
        "train_sft": [{"messages": dialogue(*pick(train), draw)} for _ in range(num_sft)],
        "train_rl": [problem(*pick(train)) for _ in range(num_rl)],
        "heldout": [problem(*pick([pair])) for pair in heldout],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    runs = Path(__file__).parents[1] / "runs" / "calculator"
    shutil.rmtree(runs, ignore_errors=True)  # old runs would continue with other data
    write(runs / "data")
    demo_task.make_model(runs / "model", runs / "data", marks=("[INST]", "[/INST]"))  # of data.template=llama2
