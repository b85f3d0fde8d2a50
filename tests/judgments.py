"""Questions and answers for the tests of MT-Bench, and what is read from the files and tables of their judgments."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from endpoint import Endpoint

from rlhf.config import Config, Judge, MTBench
from rlhf.mtbench.answers import Answer, Answers
from rlhf.mtbench.questions import Question

MATH = Question(101, "math", ("What is 2+{2}?", "And 3+3?"), ("4 {a}", "6"), 0.0)
TALK = Question(81, "writing", ("Tell me of Rome.", "Shorter."), (), 0.7)
ONCE = Question("x", "facts", ("Who?",), (), 0.7)
ASKED = [TALK, MATH, ONCE]


def of(*models: str, asked: list[Question] = ASKED) -> Answers:
    """Return answers that differ by model, question and turn."""
    return {
        model: {q.id: Answer(tuple(f"{model} on {q.id}.{turn} {{}}" for turn in range(len(q.turns)))) for q in asked}
        for model in models
    }


def config(endpoint: Endpoint, out: Path, pairwise: bool = False, **keys: object) -> Config:
    judge = Judge(url=endpoint.url, model="", retries=0, timeout=10.0)
    return Config(out=str(out), judge=replace(judge, **keys), mtbench=MTBench(pairwise=pairwise))


def written(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def lines(out: Path, name: str = "judge_single") -> list[dict]:
    return [json.loads(line) for line in (out / "model_judgment" / f"{name}.jsonl").read_text().splitlines()]


def rows(table: str) -> dict[str, list[str]]:
    """Return the cells of a table, by the name of the row."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {name: values for name, *values in cells}
