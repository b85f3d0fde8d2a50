"""The questions of MT-Bench, and of other files of the same form, such as vicuna_bench."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rlhf.errors import UserError
from rlhf.mtbench import answers, rows
from rlhf.mtbench.rows import Id, Row

TURNS = 2  # the judge's prompts show at most two turns
TEMPERATURES = {  # sampling temperature by category
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
TEMPERATURE = 0.7  # of other categories


@dataclass(frozen=True, slots=True)
class Question:
    """A question of one or two turns."""

    id: Id
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...]  # a right answer to each turn, for the judge; () if there is none
    temperature: float  # for sampling the answers


def read(path: str | Path, references: str | Path = "") -> list[Question]:
    """Return the questions of a file, in its order.

    A line has the keys question_id, category, turns, and optionally reference and required_temperature.
    references: a file of answers, whose texts replace the references in the questions.
    Raises UserError for lines of another form, ids that are there twice, and a file without questions.
    """
    found: dict[Id, Question] = {}
    for where, row in rows.read(path):
        with rows.at(where):
            question = _question(row)
            if question.id in found:
                raise UserError(f"a question before it has the same id {question.id!r}; give each its own")
            found[question.id] = question
    if not found:
        raise UserError(f"{path}: it has no questions; give a file of MT-Bench's form")
    if references:
        for number, answer in answers.load(references).items():
            if number in found:
                found[number] = replace(found[number], reference=answer.turns)
    return list(found.values())


def _question(row: Row) -> Question:
    turns, category = rows.texts(row, "turns"), rows.text(row, "category")
    if len(turns) > TURNS:
        raise UserError(f"'turns' has {len(turns)} texts; the judge's prompts are for one or two turns")
    given = row.get("required_temperature", TEMPERATURES.get(category, TEMPERATURE))
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 100:
        raise UserError(f"'required_temperature' is {given!r:.80}; give a number from 0 to 100")
    reference = rows.texts(row, "reference", blank=True) if row.get("reference") else ()
    return Question(rows.question_id(row), category, turns, reference, float(given))
