"""Reads the inputs of a run and checks its configuration against them, before any model is loaded.

The launcher calls inputs() before it starts the ranks, so that mistakes are found early. The ranks call it again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from rlhf import folders, rewards, texts, trackers
from rlhf.algorithms import ALGORITHMS
from rlhf.config import JUDGE, Config
from rlhf.data import chat, columns, lines, sets, templates
from rlhf.data.forms import ANSWER, Need
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.identity import Identity, compare, description, identity, rescheduled, weights
from rlhf.judge.client import longest, probe
from rlhf.judge.rubric import Rubric
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
    records: Records  # data.train, or the first set of data.eval in modes without training
    steps: int  # total number of steps
    held_out: Mapping[str, Records]  # data.eval by name (rlhf.data.sets), in every mode
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
def inputs(config: Config, world: int, asks: bool = True) -> Inputs:
    """Check the configuration against models, data and number of ranks. Raises UserError at the first mistake.

    asks: send a request to the judge that gives rewards. One process per node is enough.
    """
    algorithm = ALGORITHMS[config.mode]
    trackers.check(config)
    arch, models = shapes(config, world)
    newest = _newest(config) if algorithm.trains else None
    opened = _check_folders(config, models, arch)
    beside = config.policy.tokenizer
    remarks = [
        remark for source, held in opened.values() for remark in source.remarks(held, beside, "policy.tokenizer")
    ]
    tokenizer = read_tokenizer(config, arch.vocab)
    if "reward" in models and (pad := models["reward"].arch.pad) in tokenizer.stop_ids:
        what = f"{models['reward'].folder}/config.json has the end-of-text token as pad_token_id={pad}"
        remarks.append(f"{what}: the score is read at the token before it, as in transformers")
    if algorithm.online and config.rollout.inflight > 1 and not algorithm.weighs:
        remarks.append(f"{config.mode} does not correct for tokens that older weights have sampled")
    graded = algorithm.online and not algorithm.judged  # responses get rewards in the run
    if graded:
        check_rewards(config)
        remarks += _check_functions(config, asks)
    loaded = {"policy": Role("frozen", config.policy.load, arch), **models}
    known = identity(config, _read(config, loaded, tokenizer, opened))
    if newest:
        remarks += compare(newest, folders.meta(newest), config, known)
    records, held_out = _data(config, tokenizer)
    if config.rollout.environment and graded:
        for template in {template for each in (records, *held_out.values()) for template in each.templates}:
            templates.reply(tokenizer, template, [tokenizer.eos], [{"role": "user", "content": "?"}])
    config = replace(config, steps=steps(config, records.epoch[1]), epochs=0.0)
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


def steps(config: Config, draws: Fraction) -> int:
    """Return the total number of steps: the key `steps`, or enough for `epochs` epochs. draws: records of an epoch."""
    return math.ceil(Fraction(str(config.epochs)) * draws / config.batch.prompts) if config.epochs else config.steps


def passes(config: Config, records: Records) -> str:
    """Return how many epochs the steps are. Further rounds of a step (rollout.rounds) take more records."""
    longest, draws = records.epoch
    count = float(config.steps * config.batch.prompts / draws)
    said = (
        f"{config.steps:,} steps of {config.batch.prompts:,} of {len(records):,} records: {_least(config)}{count:.4g}"
    )
    return f"{said} epochs" + (f" (one pass over {longest} each)" if len(records.sets) > 1 else "")


def described(config: Config, records: Records) -> list[str]:
    """Return a line for each data set to train on, and for several a line with their shares and numbers of passes."""
    each = [f"{entry}: {counts}" for entry, counts in zip(config.data.train, records.sets.values(), strict=True)]
    if len(each) == 1:
        return each
    known = zip(
        sets.percentages(records.weights), records.passes(config.steps * config.batch.prompts).items(), strict=True
    )
    read = [f"{name} {share} (read {_least(config)}{count:.4g} times)" for share, (name, count) in known]
    return [*each, f"of each step: {', '.join(read)}"]


def _least(config: Config) -> str:
    return "at least " if ALGORITHMS[config.mode].online and config.rollout.rounds > 1 else ""


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
    config: Config, models: dict[str, Role], tokenizer: Tokenizer, opened: Mapping[str, Opened]
) -> dict[str, tuple[str, str]]:
    """Return the files that the run reads: key -> (path, fingerprint)."""
    folder = config.policy.tokenizer or config.policy.load
    found = {
        "policy.tokenizer": (folder, columns.contents(tokenizer.files.values())),
        "policy.tokenizer/config.json": (folder, f"{tokenizer.kind} {tokenizer.stop_ids}"),
    }
    if config.data.train and ALGORITHMS[config.mode].trains:
        found |= _trained(config)
    code = {"reward.function": config.reward.function, "rollout.environment": (config.rollout.environment,)}
    own = {
        key: [file for spec in specs if (file := spec.rpartition(":")[0]).endswith(".py")]
        for key, specs in code.items()
    }
    own["judge.rubric"] = [config.judge.rubric] if JUDGE in config.reward.function else []
    for key, places in own.items():
        if places and ALGORITHMS[config.mode].online:
            found[key] = ", ".join(places), columns.contents(map(Path, places))
    held = {
        folder: weights({entry.path for shard in source.contents.shards for entry in shard.values()})
        for folder, (source, _) in opened.items()
    }
    for name, role in models.items():
        found[f"{name}.load"] = (role.folder, f"{held.get(role.folder, 'random')} {description(role.arch)}")
    return found


def _trained(config: Config) -> dict[str, tuple[str, str]]:
    """Return _read() for data.train and data.weights. Names do not count, and of the weights only their ratios."""
    paths = records_paths(config)
    prints = " ".join(columns.contents(lines.files(Path(path))) for path in paths.values())
    found = {"data.train": (", ".join(config.data.train), prints)}
    if len(paths) > 1:
        held = sets.weights(list(paths), config.data.weights)
        said = ", ".join(f"{name} {float(weight):g}" for name, weight in zip(paths, held, strict=True))
        found["data.weights"] = said, " ".join(str(weight / sum(held)) for weight in held)
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


def check_rewards(config: Config) -> None:
    """Raise UserError if keys of the rewards of sampled responses do not fit together. This reads no files."""
    functions, seconds, samples = _functions(config), config.watchdog.timeout, config.evaluate.samples
    if 0 < seconds <= config.reward.timeout:
        times = f"watchdog.timeout={seconds:g} is not above reward.timeout={config.reward.timeout:g}"
        raise UserError(f"{times}: a slow reward would end the run; raise it, or set it to 0")
    if samples > 1 and not config.evaluate.temperature:
        why = f"evaluate.samples={samples} at evaluate.temperature=0 gives equal responses (greedy)"
        raise UserError(f"{why}: set evaluate.temperature=1, or remove evaluate.samples")
    if config.reward.weights and not functions:
        raise UserError("reward.weights is for the parts of reward functions, but there are none: set reward.function")
    if _is_judged(config) and 0 < seconds <= longest(config.judge):
        times = f"watchdog.timeout={seconds:g} is not above {longest(config.judge):g} s, which a judge may take"
        raise UserError(f"{times} with all tries: raise it, or lower judge.timeout or judge.retries")


def _check_functions(config: Config, asks: bool) -> list[str]:
    """Return remarks on the code and the judge that give rewards. Raises UserError if a run cannot use them."""
    rubric = _rubric(config)
    for key, names in _functions(config).items():
        rewards.check(*names, memory=config.reward.memory, key=key)
    if config.rollout.environment:
        rewards.check(config.rollout.environment, memory=config.reward.memory, kind="environment")
    if not (rubric and asks):
        return []
    return [f"the judge {probe(config.judge) or config.judge.url} rates responses with {rubric.path}"]


def _functions(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the reward functions of sampled responses, by key."""
    algorithm, own = ALGORITHMS[config.mode], config.evaluate.function
    if not algorithm.online or algorithm.judged:
        return {}
    named = {"reward.function": rule(config) if algorithm.trains or not own else (), "evaluate.function": own}
    return {key: names for key, names in named.items() if names}


def _is_judged(config: Config) -> bool:
    """Return whether a judge is one of the reward functions."""
    return any(JUDGE in names for names in _functions(config).values())


def _rubric(config: Config) -> Rubric | None:
    """Return the rubric if a judge is one of the reward functions."""
    return Rubric(config.judge) if _is_judged(config) else None


def _needs(config: Config, held_out: bool) -> tuple[Need, ...]:
    """Return what the reward functions of a data set need of each line."""
    own = config.evaluate.function if held_out else ()
    key, given = ("evaluate.function", own) if own else ("reward.function", config.reward.function)
    names, rubric = _functions(config).get(key, ()), _rubric(config)
    remedy = f"set another {key}" if given else "set reward.function or reward.load"
    needs = [ANSWER._replace(remedy=remedy)] if "math" in names else []
    if rubric and JUDGE in names:
        needs += [Need(keys, "change judge.rubric") for keys in rubric.needs]
    return tuple(needs)


def _data(config: Config, tokenizer: Tokenizer) -> tuple[Records, dict[str, Records]]:
    """Return the records of the mode (Inputs.records) and the held-out records by name."""
    trains, paths = ALGORITHMS[config.mode].trains, records_paths(config)
    if not paths:
        key = "train" if trains else "eval"
        raise UserError(f"data.{key} is not set: set it to a jsonl, JSON or parquet file, or to a folder of them")
    held_out = sets.named(config.data.eval, "data.eval")
    if trains:
        _check_apart(paths, held_out)
        sets.weights(list(paths), config.data.weights)  # before the data is tokenized, because this may take long
        parts = [read_records(config, tokenizer, path, name, held_out=False) for name, path in paths.items()]
    evaluated = {name: read_records(config, tokenizer, path, name, held_out=True) for name, path in held_out.items()}
    return Records.joined(parts, config.data.weights) if trains else next(iter(evaluated.values())), evaluated


def _check_apart(paths: Mapping[str, str], held_out: Mapping[str, str]) -> None:
    """Raise UserError if two data sets have a file in common: two to train on, or a folder and a held-out one."""
    for (name, path), (other, other_path) in itertools.combinations(paths.items(), 2):
        if both := _common(path, other_path):
            shared = f"{name}={path} and {other}={other_path} both contain {min(both).name}"
            raise UserError(f"data.train: {shared}: remove one of them, and set data.weights to read it more often")
    for path, eval_path in itertools.product(paths.values(), held_out.values()):
        if not Path(path).is_file() and (both := _common(path, eval_path)):
            shared = f"contains {min(both).name}, which data.eval={eval_path} holds out"
            raise UserError(f"data.train={path} {shared}: set data.train to the file to train on")


def _common(path: str, other: str) -> set[Path]:
    """Return the files that two data sets have in common."""
    one, two = ({file.resolve() for file in lines.files(Path(each))} for each in (path, other))
    return one & two


def records_paths(config: Config) -> dict[str, str]:
    """Return name -> path of the mode's data sets: data.train, or data.eval in mode evaluate."""
    key = "train" if ALGORITHMS[config.mode].trains else "eval"
    return sets.named(getattr(config.data, key), f"data.{key}")


def read_records(
    config: Config, tokenizer: Tokenizer, path: str, name: str, *, held_out: bool, first: bool = False
) -> Records:
    """Return the records of a data set. first: only some at its beginning, which are not kept for the next run.

    held_out: it is one of data.eval, so evaluate.function gives its rewards, if that is set.
    """
    algorithm = ALGORITHMS[config.mode]
    return Records.load(
        path,
        algorithm.form,
        tokenizer,
        config.data,
        name=name,
        max_prompt=config.data.max_tokens - config.rollout.max_tokens if algorithm.online else None,
        required=_needs(config, held_out),
        cache=None if first else Path(config.out) / "records",
        first=first,
    )
