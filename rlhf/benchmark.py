"""The command of mode mtbench: it starts ranks for the models without answers, and lets a judge grade all answers.

The ranks only answer the questions (rlhf.answering). Needs no torch for folders in Hugging Face format.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rlhf import configuration, folders, lock, mtbench
from rlhf.config import Config
from rlhf.contracts import Text
from rlhf.data import forms, sets, templates
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.interrupt import SIGNALS
from rlhf.judge import client
from rlhf.mtbench import answers, questions
from rlhf.mtbench.questions import Question
from rlhf.output import say
from rlhf.prepare import Inputs, inputs
from rlhf.weights import files
from rlhf.weights.formats import FORMATS

NO_JUDGE = "none"  # judge.model: only write answers
SETTINGS = "rlhf"  # key of a line of answers: the model and the settings that made them


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the call. is_file: `path` is a file of answers, and not a folder."""

    name: str
    path: str

    @property
    def is_file(self) -> bool:
        return Path(self.path).is_file() and Path(self.path).suffix == ".jsonl"

    def answers(self, out: str) -> Path:
        """Return the file of its answers."""
        return Path(self.path) if self.is_file else answers.file(Path(out), self.name)


@dataclass(slots=True)
class Talk:
    """The dialogue about a question."""

    question: Question
    text: Text  # of the first turn, as a prompt of the data set
    turns: list[str] = field(default_factory=list)  # the answers so far
    cut: list[int] = field(default_factory=list)  # numbers of the turns, from 1, whose answers the limit has cut

    def prompt(self, tokenizer: Tokenizer) -> list[int]:
        """Return the tokens of the dialogue up to the next question."""
        messages = [{"role": "user", "content": self.question.turns[0]}]
        for said, asked in zip(self.turns, self.question.turns[1:], strict=False):
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": asked}]
        record = dict(self.text.record)
        tools = templates.read_tools(record.get("tools"))
        return templates.encode(tokenizer, self.text.template, forms.under_system(record, messages), tools=tools)[0]

    def hear(self, text: str, cut: bool) -> None:
        """Add the answer to the next question."""
        self.turns.append(text)
        if cut:
            self.cut.append(len(self.turns))


def models(config: Config) -> list[Model]:
    """Return the models of the call, in order. Raises UserError if there is none, or two have the same name."""
    given = config.mtbench.models or ((config.policy.load,) if config.policy.load else ())
    if not given:
        raise UserError("policy.load is not set: set it to the folder of a model, or mtbench.models to several")
    found: dict[str, Model] = {}
    for text in given:
        model = _model(text)
        if other := found.get(stem := answers.stem(model.name)):
            both = f"{other.path} and {model.path} have the same name {model.name}"
            raise UserError(f"{both}: give one another name, as in mtbench.models=['{model.name}-2={model.path}']")
        found[stem] = model
    return list(found.values())


def _model(text: str) -> Model:
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        name, path = _name(text).replace("=", "-"), text
    if not name or not path:
        raise UserError(f"mtbench.models has {text!r:.80}; give FOLDER or NAME=FOLDER")
    return Model(name, path)


def _name(path: str) -> str:
    """Return the name of a model: runs/sft, runs/sft/hf and runs/sft/step_000100/hf are sft."""
    place = Path(os.path.abspath(path))
    if place.suffix == ".jsonl":
        return place.stem
    while place.name in FORMATS or folders.NAME.fullmatch(place.name):
        place = place.parent
    return place.name


def own(config: Config, model: Model) -> Config:
    """Return the configuration of the run that writes a model's answers."""
    policy = replace(config.policy, load=files.locate(model.path))
    return replace(config, policy=policy, mtbench=replace(config.mtbench, models=(f"{model.name}={model.path}",)))


def talks(config: Config, given: Inputs) -> list[Talk]:
    """Return the questions as dialogues without answers. Raises UserError if one of them cannot be asked."""
    kept = {sample.text.record["question_id"]: sample.text for sample in given.records.head(0)}
    path = questions_path(config)
    asked = questions.read(path)
    if left := [question.id for question in asked if question.id not in kept]:
        what = f"{path}: question {left[0]!r} is left out, but a score needs all of them"
        raise UserError(f"{what}; raise data.max_tokens, or set data.overlong=truncate")
    if any(len(question.turns) > 1 for question in asked):
        roles = [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]
        try:
            templates.choose(given.tokenizer, config.data.template, roles, is_text=False)
        except UserError as error:
            raise UserError(f"{path} has questions of two turns: {error}") from None
    return [Talk(question, kept[question.id]) for question in asked]


def settings(config: Config, given: Inputs) -> dict[str, Any]:
    """Return what determines the answers: fingerprints of the model and its tokenizer, and the values of keys."""
    read = given.identity["read"]
    data, rollout = config.data, config.rollout
    return {
        "model": read["policy.load"][1],
        "tokenizer": " ".join(read[key][1] for key in ("policy.tokenizer", "policy.tokenizer/config.json")),
        "seed": config.seed,
        "dtype": config.dtype,
        "data.template": data.template,
        "data.template_variables": list(data.template_variables),
        "data.overlong": data.overlong,
        "data.max_tokens": data.max_tokens,
        "rollout.max_tokens": rollout.max_tokens,
        "rollout.stop": list(rollout.stop),
        "rollout.engine": rollout.engine,
    }


def identity(config: Config, given: Inputs, talk: Talk) -> dict[str, Any]:
    """Return the keys that a line of answers has beside FastChat's."""
    return {SETTINGS: {**settings(config, given), "question": _digest(talk)}}


def _digest(talk: Talk) -> str:
    """Return a fingerprint of what the model is asked. The prompt has the system message and the tools, too."""
    asked = (talk.text.prompt, talk.question.turns, talk.question.temperature)
    return blake2b(repr(asked).encode(), digest_size=8).hexdigest()


def reusable(config: Config, given: Inputs, asked: list[Talk]) -> bool:
    """Return whether `out` already has the answers to all questions.

    Raises UserError if `out` has answers of another model, or with other settings, under the same name.
    """
    (model,) = models(config)
    path = model.answers(config.out)
    if not path.exists():
        return False
    found, now = answers.load(path), settings(config, given)
    digests = {talk.question.id: _digest(talk) for talk in asked}
    for number, answer in found.items():  # also those to other questions, because a file is of one model
        _compare(path, answer.extra.get(SETTINGS), {**now, "question": digests.get(number)})
    return found.keys() >= digests.keys()


def _compare(path: Path, then: object, now: Mapping[str, Any]) -> None:
    """Raise UserError unless the settings of an answer are those of this run. Its question may be None: any."""
    remedy = "set another out, or give the model another name, as in mtbench.models=['NAME=FOLDER']"
    if not isinstance(then, dict):
        raise UserError(f"{path} has answers that another program wrote: {remedy}")
    different = [key for key in now if now[key] != then.get(key) and (key, now[key]) != ("question", None)]
    if not different:
        return
    key = different[0]
    if key in ("model", "tokenizer", "question"):
        raise UserError(f"{path} has answers with another {key}: {remedy}")
    raise UserError(f"{path} has answers with {key}={then.get(key)}, this run has {now[key]}: {remedy}")


def run(config: Config, start: Callable[[Config, list[str]], int], world: int | None, first: bool) -> int:
    """Write the answers that are missing, let the judge grade all answers, and print a table. Return the exit code.

    start: runs ranks with a configuration and further arguments, and returns their exit code. world: how many; None:
    this process is one of them, so it can answer for one model only. first: this process calls the judge.
    """
    called = models(config)
    asked = check(config, called)
    due = missing(config, called)
    if world is None and len(due) > 1:
        raise UserError(
            "ranks that torchrun or srun has started answer for one model in a call: start with ./launch.sh, "
            "or set mtbench.models to one folder, and to files of answers"
        )
    if world is not None:
        due = [model for model in due if is_due(config, model, world)]
    if (first or (due and world is not None)) and is_judged(config):  # each launcher, so that none starts ranks in vain
        client.probe(config.judge)
    for model in called if first else ():
        if model not in due:
            say(f"{model.answers(config.out)}: the answers of {model.name} are there")
    for model in due:
        if code := start(own(config, model), overrides(model)):
            return code
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the launcher and the watcher of a rank have blocked them
    if first:
        finish(config, called, asked)
    return 0


def is_judged(config: Config) -> bool:
    """Return whether a judge grades the answers, or they are only written."""
    return config.judge.model != NO_JUDGE


def finish(config: Config, called: list[Model], asked: list[Question]) -> None:
    """Let the judge grade the answers of the models, and print the table. Raises UserError."""
    if problem := lock.claim(config.out, config.mode) or configuration.save(config, config.mode):
        raise UserError(problem)
    given = {model.name: answers.read(model.answers(config.out), asked) for model in called}
    if is_judged(config):
        say(mtbench.judged(config, asked, given))


def questions_path(config: Config) -> str:
    """Return the file of questions. Raises UserError unless data.eval is one file."""
    paths = sets.named(config.data.eval, "data.eval")
    if len(paths) != 1:
        wrong = f"data.eval has {len(paths)} files" if paths else "data.eval is not set"
        raise UserError(f"{wrong}: set it to one file of questions, such as mt_bench_question.jsonl")
    return next(iter(paths.values()))


def check(config: Config, called: list[Model]) -> list[Question]:
    """Return the questions. Raises UserError if files of the judge or keys are wrong, before any model answers."""
    if config.mtbench.pairwise and not is_judged(config):
        raise UserError(f"mtbench.pairwise needs a judge, but judge.model={NO_JUDGE}: set mtbench.pairwise=false")
    asked = questions.read(questions_path(config), config.mtbench.references)
    if is_judged(config) and not config.judge.url:
        remedy = f"set it to that of a judge, as http://host:8000/v1, or judge.model={NO_JUDGE} to only write answers"
        raise UserError(f"judge.url is not set: {remedy}")
    if is_judged(config):
        mtbench.prepare(config, asked, len(called))
    due = missing(config, called)
    for model in called:
        if model not in due:
            answers.read(model.answers(config.out), asked)
    return asked


def missing(config: Config, called: list[Model]) -> list[Model]:
    """Return the models that may have to answer. Of a folder that does not exist, the answers in `out` are enough."""
    return [
        model
        for model in called
        if not model.is_file and (Path(model.path).exists() or not model.answers(config.out).exists())
    ]


def is_due(config: Config, model: Model, world: int) -> bool:
    """Return whether the model must answer the questions. Raises UserError if it cannot. world: number of ranks."""
    alone = own(config, model)
    given = inputs(alone, world)
    return not reusable(alone, given, talks(alone, given))


def overrides(model: Model) -> list[str]:
    """Return the arguments of the ranks that answer for a model, beside those of the command."""
    return [f"mtbench.models={model.name}={model.path}", "mtbench.pairwise=false", f"judge.model={NO_JUDGE}"]


def plan(config: Config) -> str:
    """Return what a call does, in lines."""
    called = models(config)
    asked = check(config, called)
    turns = sum(len(question.turns) for question in asked)
    due = [model.name for model in missing(config, called)]
    lines = [f"{questions_path(config)}: {len(asked)} questions with {turns} turns"]
    lines += [f"models: {', '.join(model.name for model in called)}"]
    lines += [f"answers: {turns} of {', '.join(due) or 'no model'}, unless {config.out}/model_answer has them"]
    if is_judged(config):
        each = len(called) - 1 if config.mtbench.pairwise else 1
        lines += [f"judge: {turns * len(called) * each} requests, without those that were judged before"]
    return "\n".join(lines)
