"""MT-Bench (2306.05685) without a model: its questions, answers, judgments and tables, in the files of FastChat.

Needs no torch.
"""

from __future__ import annotations

from pathlib import Path

from rlhf import errors, interrupt
from rlhf.config import Config
from rlhf.errors import JudgingError, StorageError, UserError, failure
from rlhf.judge.client import Client, JudgeError
from rlhf.mtbench import judgments, tables
from rlhf.mtbench.answers import Answers, stem
from rlhf.mtbench.grading import grade
from rlhf.mtbench.judgments import Judgment
from rlhf.mtbench.prompts import OWN, Prompts
from rlhf.mtbench.questions import Question
from rlhf.output import say


def prepare(config: Config, questions: list[Question], models: int) -> Prompts:
    """Return the judge's prompts.

    models: their number. Raises UserError for prompts of another form, a missing reference answer, and a comparison of
    less than two models. It sends nothing, so it can be called before the models answer.
    """
    if config.mtbench.pairwise and models < 2:
        raise UserError("mtbench.pairwise=true compares models: give at least two in mtbench.models")
    prompts = Prompts.read(config.mtbench.prompts or OWN, "pairwise" if config.mtbench.pairwise else "single")
    prompts.check(questions)
    return prompts


def judged(config: Config, questions: list[Question], answers: Answers) -> str:
    """Return the table of the models, in Markdown. The judge grades what is not judged yet.

    Writes config.out/model_judgment/JUDGE_single.jsonl, or _pair.jsonl, and the table beside it.
    answers: of each model to each question. Raises UserError, JudgingError if requests to the judge have failed, and
    StorageError.
    """
    prompts = prepare(config, questions, len(answers))
    try:
        file, judge, found = interrupt.run(_grade(config, prompts, questions, answers))
        table = (tables.wins if config.mtbench.pairwise else tables.scores)(answers, found)
        source = config.mtbench.prompts or "those of this package, so published scores are no comparison"
        text = f"{table}\n\nJudge: {judge}. Prompts: {source}.\n"
        page = file.with_suffix(".md")
        with errors.naming(page):
            page.write_text(text, encoding="utf-8")
    except OSError as error:
        if not (fault := failure(error, config.out)):
            raise
        raise StorageError(f"{fault}; fix this and start again: only what has no reply yet is sent") from None
    say(f"judgments: {file}; table: {page}")
    return text


async def _grade(
    config: Config, prompts: Prompts, questions: list[Question], answers: Answers
) -> tuple[Path, str, list[Judgment]]:
    """Return the file of judgments, the name of the judge, and all judgments with their replies."""
    build, end = (judgments.pairs, "pair") if config.mtbench.pairwise else (judgments.singles, "single")
    client = Client(config.judge)
    try:
        judge = await client.choose()
        found = build(prompts, judge, questions, answers)
        file = Path(config.out) / "model_judgment" / f"{stem(judge)}_{end}.jsonl"
        await grade(file, client, found)
    except JudgeError as error:
        raise JudgingError(str(error)) from None
    finally:
        await client.close()
    return file, judge, found
