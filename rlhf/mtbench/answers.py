"""The answers of a model, in FastChat's file model_answer/MODEL.jsonl."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.mtbench import rows
from rlhf.mtbench.rows import Id, Row

if TYPE_CHECKING:
    from rlhf.mtbench.questions import Question

KEYS = {"question_id", "answer_id", "model_id", "choices", "tstamp"}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question."""

    turns: tuple[str, ...]  # a text per turn of the question; it may be empty
    cut: tuple[int, ...] | None = None  # the turns, from 1, that reached the limit of tokens; None: not known
    extra: Mapping[str, Any] = field(default_factory=dict)  # further keys of the line, which FastChat ignores


Answers = Mapping[str, Mapping[Id, Answer]]  # model -> question -> answer


def file(out: Path, model: str) -> Path:
    """Return the file with the answers of a model."""
    return out / "model_answer" / f"{stem(model)}.jsonl"


def stem(name: str) -> str:
    """Return the name of a model or judge as the beginning of a file name: meta/llama is meta--llama."""
    return name.replace("/", "--").replace("\0", "")


def write(path: Path, model: str, answers: Mapping[Id, Answer]) -> None:
    """Write a file of answers atomically, in the order of the ids. model: the name of the model in each line."""
    rows.write(path, [_line(model, number, answers[number]) for number in sorted(answers, key=rows.order)])


def read(path: str | Path, questions: Iterable[Question]) -> dict[Id, Answer]:
    """Return the answers to the questions, in their order. Raises UserError if some are missing."""
    found = load(path)
    missing = []
    for question in questions:
        if question.id not in found or len(found[question.id].turns) < len(question.turns):
            missing.append(question)
    if missing:
        names = ", ".join(repr(question.id) for question in missing[:10]) + (", ..." if len(missing) > 10 else "")
        count = f"{path}: {len(missing)} questions have no answer, or not one to each turn: {names}"
        raise UserError(f"{count}; add them, or give data.eval only questions that have answers")
    return {question.id: found[question.id] for question in questions}


def load(path: str | Path) -> dict[Id, Answer]:
    """Return all answers in a file. Of several choices it is the first. Raises UserError with file:line."""
    found: dict[Id, Answer] = {}
    for where, row in rows.read(path):
        with rows.at(where):
            found[rows.question_id(row)] = _answer(row)  # FastChat also uses the last of several lines
    return found


def _line(model: str, number: Id, answer: Answer) -> Row:
    cut = {} if answer.cut is None else {"cut": list(answer.cut)}
    return {
        "question_id": number,
        "answer_id": uuid.uuid4().hex,
        "model_id": model,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": time.time(),
        **cut,
        **answer.extra,
    }


def _answer(row: Row) -> Answer:
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UserError(f"'choices' is {choices!r:.80}; give FastChat's form, [{{'index': 0, 'turns': [...]}}]")
    cut = row.get("cut")
    if cut is not None and not (isinstance(cut, list) and all(type(turn) is int for turn in cut)):
        raise UserError(f"'cut' is {cut!r:.80}; give a list of turns, such as [2]")
    extra = {key: value for key, value in row.items() if key not in KEYS | {"cut"}}
    return Answer(rows.texts(choices[0], "turns", blank=True), None if cut is None else tuple(cut), extra)
