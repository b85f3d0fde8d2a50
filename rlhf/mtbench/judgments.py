"""What the judge is asked, and the lines of FastChat's files of judgments."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import UserError
from rlhf.judge.rating import rating
from rlhf.mtbench.answers import Answers
from rlhf.mtbench.prompts import Prompt, Prompts
from rlhf.mtbench.questions import Question
from rlhf.mtbench.rows import Row

FAILED = -1  # the score of a judgment without a rating
ERROR, TIE = "error", "tie"  # the winner in a judgment that names none, and in one that prefers neither answer
MARKS = {"[[A]]": 0, "[[B]]": 1, "[[C]]": 2}  # the first of these that is in a reply counts
NO_REPLIES = (None, "$ERROR$")  # judgments of half a pair, and of FastChat if the judge has not answered


@dataclass(frozen=True, slots=True)
class Request:
    """A request to the judge."""

    prompt: Prompt
    user: str  # the user message
    order: tuple[str, ...]  # what the winner of a pair is called, A first; () for a single answer
    prefix: str = ""  # of its keys in the line: g1_, g2_; "" for a single answer

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.prompt.system}] if self.prompt.system else []
        return [*system, {"role": "user", "content": self.user}]

    @property
    def characters(self) -> int:
        return len(self.prompt.system) + len(self.user)

    def line(self, reply: str | None) -> Row:
        """Return the keys of the request in a line. reply: the text of the judge; None if there is none yet."""
        keys = {"user_prompt": self.user, "judgment": reply, "winner" if self.order else "score": self.result(reply)}
        return {f"{self.prefix}{key}": value for key, value in keys.items()}

    def result(self, reply: str | None) -> Any:
        """Return the score in a reply, FAILED without a rating. Of a pair: the winner, TIE, or ERROR."""
        if not self.order:
            found = rating(reply or "")
            return FAILED if found is None else found
        return next(((*self.order, TIE)[index] for mark, index in MARKS.items() if mark in (reply or "")), ERROR)


@dataclass(slots=True)
class Judgment:
    """A line of a file of judgments: on a single answer, or on two answers, which are shown in both orders."""

    question: Question
    turn: int
    models: dict[str, str]  # FastChat's keys: model, or model_1 and model_2
    judge: str
    requests: tuple[Request, ...]
    replies: dict[Request, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What distinguishes the line from all other lines that count."""
        return _key({"question_id": self.question.id, "turn": self.turn, "judge": [self.judge], **self.models})

    @property
    def left(self) -> list[Request]:
        """The requests without a reply."""
        return [request for request in self.requests if request not in self.replies]

    @property
    def result(self) -> Any:
        """The score, FAILED without a rating. Of a pair: the winner's key in `models`, TIE, or ERROR.

        Different winners in the two orders are a tie, as in FastChat. One reply that names none makes an ERROR.
        """
        results = [request.result(self.replies.get(request)) for request in self.requests]
        if ERROR in results:
            return ERROR
        return results[0] if len(set(results)) == 1 else TIE

    def line(self) -> Row:
        """Return the line. Half a pair has the winner "error", so FastChat ignores it."""
        prompt = self.requests[0].prompt
        parts: Row = {}
        for request in self.requests:
            parts |= request.line(self.replies.get(request))
        return {
            "question_id": self.question.id,
            **self.models,
            "judge": [self.judge, prompt.name],
            "system_prompt": prompt.system,
            **parts,
            "turn": self.turn,
            "tstamp": time.time(),
        }

    def accept(self, row: Row) -> bool:
        """Take the replies from a line, if they answer these requests. Return whether there are any.

        FastChat's lines have no system prompt.
        """
        found = {
            request: str(row[f"{request.prefix}judgment"])
            for request in self.requests
            if row.get(f"{request.prefix}user_prompt") == request.user
            and row.get("system_prompt", request.prompt.system) == request.prompt.system
            and row.get(f"{request.prefix}judgment") not in NO_REPLIES
        }
        self.replies = found or self.replies
        return bool(found)


def singles(prompts: Prompts, judge: str, questions: list[Question], answers: Answers) -> list[Judgment]:
    """Return the judgments on each turn of each answer."""
    return [
        Judgment(
            question, turn, {"model": model}, judge, (Request(*prompts.fill(question, turn, of[question.id]), ()),)
        )
        for model, of in answers.items()
        for question, turn in _turns(questions)
    ]


def pairs(prompts: Prompts, judge: str, questions: list[Question], answers: Answers) -> list[Judgment]:
    """Return the judgments on each turn of the answers of each two models, in both orders.

    model_1 is the first in the alphabet, so a pair in the other order has the same lines.
    """
    found = []
    for one, two in map(sorted, itertools.combinations(answers, 2)):
        for question, turn in _turns(questions):
            both = [("model_1", answers[one][question.id]), ("model_2", answers[two][question.id])]
            requests = []
            for prefix, ordered in (("g1_", both), ("g2_", both[::-1])):
                prompt, user = prompts.fill(question, turn, *(answer for _, answer in ordered))
                requests.append(Request(prompt, user, tuple(name for name, _ in ordered), prefix))
            models = {"model_1": one, "model_2": two}
            found.append(Judgment(question, turn, models, judge, tuple(requests)))
    return found


def restore(rows: list[Row], judgments: list[Judgment]) -> list[Row]:
    """Take the replies from the lines of a file. Return the lines that still count.

    A line counts if it answers the requests of a judgment, or if it is about none of them, such as one of another
    model. Of several lines that answer the same requests the last counts. Raises UserError if all replies about an
    answer are to other requests, because they would be lost.
    """
    known = {judgment.key: judgment for judgment in judgments}
    kept: dict[Any, Row] = {}
    others = []
    for number, row in enumerate(rows):
        judgment = known.get(_key(row))
        if judgment is None:
            kept[number] = row
        elif judgment.accept(row):
            kept[judgment.key] = row
        elif any(row.get(f"{request.prefix}judgment") not in NO_REPLIES for request in judgment.requests):
            others.append(judgment)
    for judgment in others:
        if not judgment.replies:
            what = f"question {judgment.question.id!r} of {' and '.join(judgment.models.values())}"
            raise UserError(
                f"{what} has judgments on another answer, or with other prompts or references: set another out, or "
                "correct mtbench.prompts and mtbench.references"
            )
    return list(kept.values())


def _turns(questions: list[Question]) -> Iterator[tuple[Question, int]]:
    return ((question, turn) for question in questions for turn in range(1, len(question.turns) + 1))


def _key(row: Row) -> str:
    judge = row.get("judge")
    names = [row.get(key) for key in ("question_id", "turn", "model", "model_1", "model_2")]
    return json.dumps([*names, judge[:1] if isinstance(judge, list) else judge])
