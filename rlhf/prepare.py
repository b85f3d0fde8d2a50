"""Reads the inputs of a run and checks its configuration against them, before any model is loaded.

The launcher calls inputs() before it starts the ranks, so that mistakes are found early. The ranks call it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

from rlhf import folders, rewards, texts, trackers
from rlhf.algorithms import ALGORITHMS
from rlhf.config import Config
from rlhf.data import chat, columns, lines, templates
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.identity import Identity, compare, description, identity, rescheduled, weights
from rlhf.model.architecture import Architecture
from rlhf.rewards import rule
from rlhf.shapes import Role, shapes
from rlhf.weights import files

Opened = tuple[files.Source, Architecture]  # an opened folder, and the architecture that it is read as


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a run."""

    arch: Architecture  # of policy.load
    roles: dict[str, Role]  # the models without the engine's; mode evaluate has at most the reward model
    tokenizer: Tokenizer
    records: Records  # data.train, or data.eval in mode evaluate
    steps: int  # total number of steps
    held_out: Records | None  # data.eval of a training run
    remarks: list[str]  # on the folders, and on differences from the checkpoint that the run resumes from
    identity: Identity  # identity of the run (rlhf.identity)


@texts.paths()
def located(config: Config) -> Config:
    """Return the configuration with the newest export of a run in place of the folder of the run.

    This applies to all keys that take the folder of a model.
    """
    find = files.locate
    return replace(
        config,
        policy=replace(config.policy, load=find(config.policy.load), tokenizer=find(config.policy.tokenizer)),
        reference=replace(config.reference, load=find(config.reference.load)),
        critic=replace(config.critic, load=find(config.critic.load)),
        reward=replace(config.reward, load=find(config.reward.load)),
    )


@texts.paths()
def inputs(config: Config, world: int) -> Inputs:
    """Check the configuration against models, data and number of ranks. Raises UserError at the first mistake."""
    algorithm = ALGORITHMS[config.mode]
    trackers.check(config)
    arch, models = shapes(config, world)
    newest = _newest(config) if algorithm.trains else None
    sources = _check_folders(config, models, arch)
    beside = config.policy.tokenizer
    remarks = [
        remark for source, held in sources.values() for remark in source.remarks(held, beside, "policy.tokenizer")
    ]
    tokenizer = read_tokenizer(config, arch.vocab)
    if "reward" in models and (pad := models["reward"].arch.pad) in tokenizer.stop_ids:
        what = f"{models['reward'].folder}/config.json has the end-of-text token as pad_token_id={pad}"
        remarks.append(f"{what}: the score is read at the token before it, as in transformers")
    if algorithm.online and config.rollout.inflight > 1 and not algorithm.weighs:
        remarks.append(f"{config.mode} does not correct for tokens that older weights have sampled")
    if algorithm.online and 0 < config.watchdog.timeout <= config.reward.timeout:
        times = f"watchdog.timeout={config.watchdog.timeout:g} is not above reward.timeout={config.reward.timeout:g}"
        raise UserError(f"{times}: a slow reward would end the run; raise it, or set it to 0")
    if config.reward.weights and algorithm.online and not _functions(config):
        raise UserError("reward.weights is for the parts of reward functions, but there are none: set reward.function")
    for key, functions in _functions(config).items():
        rewards.check(*functions, memory=config.reward.memory, key=key)
    if config.rollout.environment and algorithm.online:
        rewards.check(config.rollout.environment, memory=config.reward.memory, kind="environment")
    known = identity(config, _read(config, models, tokenizer, sources))
    if newest:
        remarks += compare(newest, folders.meta(newest), config, known)
    records, held_out = _data(config, tokenizer)
    if config.rollout.environment and algorithm.online:
        for template in records.templates | (held_out.templates if held_out else set()):
            templates.reply(tokenizer, template, [tokenizer.eos], [{"role": "user", "content": "?"}])
    config = replace(config, steps=steps(config, len(records)), epochs=0.0)
    algorithm(config)  # checks the keys that depend on the number of steps
    if newest:
        remarks += rescheduled(folders.meta(newest), config)
    return Inputs(arch, models, tokenizer, records, config.steps, held_out, remarks, known)


def read_tokenizer(config: Config, rows: int) -> Tokenizer:
    """Return the tokenizer of a run, with data.template_variables. rows: number of rows of the policy's embedding.

    Raises MissingError if there is no tokenizer, and UserError if it does not fit the model or the variables.
    """
    variables, template = chat.variables(config.data.template_variables), config.data.template
    key = "data.template_variables"
    if variables and template not in ("auto", "tokenizer"):
        raise UserError(f"{key} has no effect with data.template={template}: remove it, or set data.template=tokenizer")
    tokenizer = Tokenizer.load(config.policy.tokenizer or config.policy.load, config.policy.load, rows, variables)
    if not variables:
        return tokenizer
    if not tokenizer.chats:
        raise UserError(f"{key} has no effect, because the tokenizer has no chat template: remove it")
    if unread := variables.keys() - tokenizer.chats.reads:
        raise UserError(f"{key} sets {min(unread)}, which the tokenizer's chat template does not read: remove it")
    return tokenizer


def steps(config: Config, records: int) -> int:
    """Return the total number of steps: the key `steps`, or enough for `epochs` passes over the records."""
    return math.ceil(Fraction(str(config.epochs)) * records / config.batch.prompts) if config.epochs else config.steps


def passes(config: Config, records: int) -> str:
    """Return how many epochs the steps are. Further rounds of a step (rollout.rounds) take more records."""
    count = config.steps * config.batch.prompts / records
    more = "at least " if ALGORITHMS[config.mode].online and config.rollout.rounds > 1 else ""
    return f"{config.steps:,} steps of {config.batch.prompts:,} of {records:,} records: {more}{count:.4g} epochs"


def _newest(config: Config) -> Path | None:
    """Return the checkpoint that the run resumes from, or None. Raises UserError if the run cannot use `out`."""
    out = Path(config.out)
    for link in (out / name for name in config.checkpoint.format):
        if link.exists() and not link.is_symlink():
            raise UserError(
                f"{link} is not a link, but a run links its newest export there: move it away, or set another out"
            )
    if config.resume:
        return folders.newest(out)[0]
    if (out / "latest").exists() or folders.steps(out):
        raise UserError(f"out={config.out} has checkpoints of a run, but resume=false: set another out, or delete it")
    return None


def _read(
    config: Config, models: dict[str, Role], tokenizer: Tokenizer, sources: Mapping[str, Opened]
) -> dict[str, tuple[str, str]]:
    """Return the files that the run reads: key -> (path, fingerprint)."""
    folder = config.policy.tokenizer or config.policy.load
    found = {
        "policy.tokenizer": (folder, columns.contents(tokenizer.files.values())),
        "policy.tokenizer/config.json": (folder, f"{tokenizer.kind} {tokenizer.stop_ids}"),
    }
    if config.data.train and ALGORITHMS[config.mode].trains:
        found["data.train"] = (config.data.train, columns.contents(lines.files(Path(config.data.train))))
    code = {"reward.function": config.reward.function, "rollout.environment": (config.rollout.environment,)}
    for key, specs in code.items():
        places = [file for spec in specs if (file := spec.rpartition(":")[0]).endswith(".py")]
        if places and ALGORITHMS[config.mode].online:
            found[key] = ", ".join(places), columns.contents(map(Path, places))
    held = {
        folder: weights({entry.path for shard in source.contents.shards for entry in shard.values()})
        for folder, (source, _) in sources.items()
    }
    for name, role in models.items():
        found[f"{name}.load"] = (role.folder, f"{held.get(role.folder, 'random')} {description(role.arch)}")
    return found


def _check_folders(config: Config, models: dict[str, Role], arch: Architecture) -> dict[str, Opened]:
    """Open the folders that weights are read from. Return them by path."""
    sources = {}
    to_read = {config.policy.load: arch} | {role.folder: role.arch for role in models.values()}
    # Only these folders must have a scalar head. The head of a model that is trained may be missing and starts at zero.
    judges = {role.folder for name, role in models.items() if name == "reward" and role.use == "frozen"}
    for folder, held in to_read.items():
        if config.policy.init == "load" or folder != config.policy.load:
            sources[folder] = files.open_folder(folder, held, head=folder in judges), held
    return sources


def _functions(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the reward functions of sampled responses, by key."""
    algorithm, own = ALGORITHMS[config.mode], config.evaluate.function
    if not algorithm.online:
        return {}
    named = {"reward.function": rule(config) if algorithm.trains or not own else (), "evaluate.function": own}
    return {key: names for key, names in named.items() if names}


def _data(config: Config, tokenizer: Tokenizer) -> tuple[Records, Records | None]:
    """Return the records of the mode (Inputs.records) and the held-out records."""
    trains, read = ALGORITHMS[config.mode].trains, partial(read_records, config, tokenizer)
    source, path = records_path(config)
    if not path:
        raise UserError(f"data.{source} is not set: set it to a jsonl, JSON or parquet file, or to a folder of them")
    if trains and not Path(path).is_file() and config.data.eval:
        both = {file.resolve() for file in lines.files(Path(path))} & {
            file.resolve() for file in lines.files(Path(config.data.eval))
        }
        if both:
            shared = f"contains {min(both).name}, which data.eval={config.data.eval} holds out"
            raise UserError(f"data.train={path} {shared}: set data.train to the file to train on")
    return read(path), read(config.data.eval) if trains and config.data.eval else None


def records_path(config: Config) -> tuple[str, str]:
    """Return the name of the mode's data set, train or eval, and its path."""
    return ("train", config.data.train) if ALGORITHMS[config.mode].trains else ("eval", config.data.eval)


def read_records(config: Config, tokenizer: Tokenizer, path: str, first: bool = False) -> Records:
    """Return the records of a data set. first: only some at its beginning, which are not kept for the next run."""
    algorithm = ALGORITHMS[config.mode]
    return Records.load(
        path,
        algorithm.form,
        tokenizer,
        config.data,
        max_prompt=config.data.max_tokens - config.rollout.max_tokens if algorithm.online else None,
        required=("answer",) if any("math" in names for names in _functions(config).values()) else (),
        cache=None if first else Path(config.out) / "records",
        first=first,
    )
