"""The judge's prompts, in the form of FastChat's judge_prompts.jsonl, and how questions and answers fill them."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import UserError
from rlhf.mtbench import rows
from rlhf.mtbench.answers import Answer
from rlhf.mtbench.questions import Question
from rlhf.mtbench.rows import Row

OWN = Path(__file__).with_name("judge_prompts.jsonl")
REFERENCED = ("math", "reasoning", "coding", "arena-hard-200")  # categories whose judge sees reference answers
NAMES = {"single": ("single-v1", "single-math-v1"), "pairwise": ("pair-v2", "pair-math-v1")}  # without, with references
LATER = "-multi-turn"  # ends the names of the prompts for the second turn
FORMATS = {"single": "[[rating]]", "pairwise": "[[A]]"}
SIDES = {"single": ("",), "pairwise": ("_a", "_b")}  # what distinguishes the fields of the two answers
FORM = "give FastChat's form, as in judge_prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of the judge."""

    name: str
    system: str  # the system message; "": none
    template: str  # of the user message, for str.format


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a file for single answers, or for pairs."""

    kind: str  # single or pairwise
    named: Mapping[str, Prompt]

    @classmethod
    def read(cls, path: str | Path, kind: str) -> Prompts:
        """Return the prompts of a file. Raises UserError if one is missing or has another form."""
        found: dict[str, Prompt] = {}
        wanted = {name + later: (known, later) for known, name in enumerate(NAMES[kind]) for later in ("", LATER)}
        for where, row in rows.read(path):
            if (name := row.get("name")) in wanted:
                known, later = wanted[name]
                with rows.at(where):
                    found[name] = _prompt(row, kind, _fields(kind, 2 if later else 1, bool(known)))
        if missing := [name for name in wanted if name not in found]:
            raise UserError(f"{path}: it has no prompt {missing[0]!r}; {FORM}")
        return cls(kind, found)

    def check(self, questions: list[Question]) -> None:
        """Raise UserError if a question has no reference answers and its category needs them."""
        lacking = [q for q in questions if q.category in REFERENCED and len(q.reference) < len(q.turns)]
        if lacking:
            which = f"{lacking[0].id!r} ({lacking[0].category})"
            more = f" and {len(lacking) - 1} others" if len(lacking) > 1 else ""
            remedy = "add them to the file mtbench.references, or to the questions"
            raise UserError(f"question {which}{more}: no reference answer to each turn; {remedy}")

    def fill(self, question: Question, turn: int, *answers: Answer) -> tuple[Prompt, str]:
        """Return the prompt for a turn of a question, and the text of its user message.

        The second turn shows both turns. answers: one per side.
        """
        known = question.category in REFERENCED
        prompt = self.named[NAMES[self.kind][known] + (LATER if turn == 2 else "")]
        texts = [question.turns, *(answer.turns for answer in answers), *([question.reference] if known else [])]
        values = (text for part in texts for text in part[:turn])
        return prompt, prompt.template.format(**dict(zip(_fields(self.kind, turn, known), values, strict=True)))


def _fields(kind: str, turn: int, known: bool) -> list[str]:
    """Return the names of a template's fields: of question, answers and references, each with its turns.

    known: whether there are reference answers.
    """
    names = ["question", *(f"answer{side}" for side in SIDES[kind])]
    fields = [f"{name}_{number}" for name in names for number in (1, 2)] if turn == 2 else names
    return fields + [f"ref_answer_{number}" for number in range(1, turn + 1) if known]


def _prompt(row: Row, kind: str, fields: list[str]) -> Prompt:
    if row.get("type") != kind or row.get("output_format") != FORMATS[kind]:
        given = f"'type' is {row.get('type')!r:.80} and 'output_format' is {row.get('output_format')!r:.80}"
        raise UserError(f"{given}; they must be {kind!r} and {FORMATS[kind]!r}")
    prompt = Prompt(row["name"], rows.text(row, "system_prompt"), rows.text(row, "prompt_template"))
    try:
        used = [part[1:] for part in string.Formatter().parse(prompt.template) if part[1] is not None]
    except ValueError as error:
        raise UserError(f"'prompt_template' is no template ({error}); write {{{{ and }}}} for braces") from None
    for name, specification, conversion in used:
        if name not in fields or specification or conversion:
            raise UserError(f"'prompt_template' has the field {{{name}}}; it may have {', '.join(fields)}")
    graded = {name for name in fields if name.startswith("answer") and not name.endswith("_1")}
    if unused := graded - {name for name, _, _ in used}:
        raise UserError(f"'prompt_template' has no {{{min(unused)}}}: add it, because the judge grades this answer")
    return prompt
