"""The tables of MT-Bench, as Markdown."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhf.mtbench.answers import Answers
from rlhf.mtbench.judgments import ERROR, FAILED, TIE, Judgment

DRAWS, SEED = 2_000, 0  # of the bootstrap
Part = tuple[str, list[Judgment]]  # a row of a table, and the judgments that it is about


def scores(answers: Answers, judgments: Sequence[Judgment]) -> str:
    """Return the table of single answers: a row per category, and a column per model.

    A score is the mean over the turns that have a rating, as FastChat computes it.
    """
    by_model = {model: [found for found in judgments if found.models["model"] == model] for model in answers}
    parts = [_parts(found, "mean") for found in by_model.values()]
    rows = [
        [rows[0][0], *(_mean([found.result for found in part]) for _, part in rows)]
        for rows in zip(*parts, strict=True)  # all models have the same rows
    ]
    failed = [str(sum(found.result == FAILED for found in part)) for part in by_model.values()]
    cut = [_cut(answers, model) for model in answers]
    return _table(["", *answers], [*rows, ["without rating", *failed], ["cut answers", *cut]])


def wins(answers: Answers, judgments: Sequence[Judgment]) -> str:
    """Return a table per pair of models: a row per category, with the win rate of the model that is given first.

    A win counts if it is one in both orders. A tie counts half. Judgments that name no winner are left out.
    """
    names = list(answers)
    of = _grouped(judgments, lambda judgment: tuple(sorted(judgment.models.values(), key=names.index)))
    return "\n\n".join(_pair(answers, one, two, found) for (one, two), found in of.items())


def points(judgments: Iterable[Judgment], model: str) -> list[float]:
    """Return a number per judgment that is no ERROR: 1 if the model wins, 0.5 for a tie, 0 if it loses."""
    results = ((judgment.models, judgment.result) for judgment in judgments)
    return [0.5 if result == TIE else float(of[result] == model) for of, result in results if result != ERROR]


def interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of all numbers: percentiles of a bootstrap over the groups.

    A group has the numbers of one question, because its turns are not independent.
    """
    sums = [(sum(group), len(group)) for group in groups if group]
    draw, means = random.Random(SEED), []
    for _ in range(DRAWS if sums else 0):
        drawn = draw.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    return (means[round(0.025 * (DRAWS - 1))], means[round(0.975 * (DRAWS - 1))]) if means else (0.0, 1.0)


def _pair(answers: Answers, one: str, two: str, judgments: list[Judgment]) -> str:
    rows = []
    for name, part in _parts(judgments, "all"):
        found = points(part, one)
        counts = (found.count(1), found.count(0.5), found.count(0), len(part) - len(found))
        rows.append([name, _percent(sum(found) / len(found)) if found else "-", *map(str, counts)])
    by_question = _grouped(judgments, lambda judgment: judgment.question.id).values()
    low, high = map(_percent, interval([points(part, one) for part in by_question]))
    columns = ["", "win rate", "wins", "ties", "losses", "errors"]
    return (
        f"{one} against {two}:\n\n{_table(columns, rows)}\n\n"
        f"The win rate counts a tie as half a win. Its 95 % confidence interval is {low} to {high} (bootstrap over the "
        f"questions).\nCut answers: {one} {_cut(answers, one)}, {two} {_cut(answers, two)}."
    )


def _parts(judgments: Sequence[Judgment], last: str) -> list[Part]:
    """Return the rows of a table: the categories in the order of the questions, the turns, and all judgments."""
    kinds = _grouped(judgments, lambda judgment: judgment.question.category)
    turns = sorted(_grouped(judgments, lambda judgment: judgment.turn).items())
    return [*kinds.items(), *((f"turn {turn}", part) for turn, part in turns), (last, list(judgments))]


def _grouped(judgments: Iterable[Judgment], key: Callable[[Judgment], Any]) -> dict[Any, list[Judgment]]:
    """Return the judgments with equal keys together, in the order in which the keys appear."""
    groups: dict[Any, list[Judgment]] = {}
    for judgment in judgments:
        groups.setdefault(key(judgment), []).append(judgment)
    return groups


def _mean(results: list[float]) -> str:
    rated = [result for result in results if result != FAILED]
    return f"{sum(rated) / len(rated):.2f}" if rated else "-"


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _cut(answers: Answers, model: str) -> str:
    """Return the number of turns that reached the limit of tokens; "?" if the file of answers does not tell."""
    cut = [answer.cut for answer in answers[model].values()]
    return "?" if None in cut else str(sum(map(len, cut)))  # type: ignore[arg-type]


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, with aligned columns."""
    head = [cell.replace("|", "\\|") for cell in head]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for name, *cells in (head, rule, *rows):
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(" | ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(f"| {line} |" for line in lines)
