"""Everything about a run that can be known before a model is loaded.

The launcher calls inputs() before it starts any rank, so that a mistake costs a moment and one line; the ranks call it again to get what
it read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf import folders, rewards, texts
from rlhf.algorithms import ALGORITHMS
from rlhf.config import Config, Parallel
from rlhf.data import columns, jsonl, templates
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.identity import Identity, compare, description, identity, weights
from rlhf.model.architecture import REMEDY, Architecture
from rlhf.weights import files

COLDEST = 0.01  # temperature of sampling: vLLM takes a lower one for this
Opened = tuple[files.Source, Architecture]  # a folder, and what it is read as


@dataclass(frozen=True, slots=True)
class Role:
    """One model of a run."""

    use: str  # "train" | "frozen"
    folder: str  # that it is loaded from
    arch: Architecture


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads."""

    arch: Architecture  # of policy.load
    roles: dict[str, Role]  # the models on the training side; mode evaluate has at most the reward model
    tokenizer: Tokenizer
    records: Records  # what the mode goes through: data.train, or data.eval in mode evaluate
    held_out: Records | None  # data.eval of a training run
    remarks: list[str]  # on the folders, and on what differs from the checkpoint that is continued from
    identity: Identity  # what makes the run this run


@texts.paths()
def inputs(config: Config, world: int) -> Inputs:
    """Check the configuration against model, data and world. Raises UserError for the first mistake."""
    arch, models = shapes(config, world)
    newest = _newest(config) if ALGORITHMS[config.mode].trains else None
    sources = _check_folders(config, models, arch)
    beside = config.policy.tokenizer
    remarks = [remark for source, held in sources.values() for remark in source.remarks(held, beside, "policy.tokenizer")]
    tokenizer = Tokenizer.load(beside or config.policy.load)
    if tokenizer.vocab > arch.vocab:
        raise UserError(f"the tokenizer has {tokenizer.vocab} tokens, {config.policy.load}/config.json a vocab_size of {arch.vocab}")
    if ALGORITHMS[config.mode].online and config.rollout.inflight > 1 and not ALGORITHMS[config.mode].weighs:
        remarks.append(f"{config.mode} learns from tokens of older weights as from its own: it has no weight for them")
    for key, function in _functions(config).items():
        rewards.check(function, config.reward.memory, key=key)
    if config.rollout.environment and ALGORITHMS[config.mode].online:
        rewards.check(config.rollout.environment, config.reward.memory, kind="environment")
        templates.reply(tokenizer, config.data.template, [tokenizer.eos], [{"role": "user", "content": "?"}])
    known = identity(config, _read(config, models, tokenizer, sources))
    if newest:
        remarks += compare(newest, folders.meta(newest), config, known)
    return Inputs(arch, models, tokenizer, *_data(config, tokenizer), remarks, known)


@texts.paths()
def shapes(config: Config, world: int) -> tuple[Architecture, dict[str, Role]]:
    """The policy's architecture and the roles, checked against the layout: whatever needs no more of a model than its config.json."""
    if not config.policy.load:
        raise UserError("policy.load is not set: give the folder of the model, Hugging Face's or Megatron's")
    arch = files.read_architecture(config.policy.load, config.policy.tokenizer)
    models = roles(config, arch)
    check_world(config.parallel, world)
    for role in models.values():
        _check_training(config, role)
    for folder, read in {config.policy.load: arch, **{role.folder: role.arch for role in models.values()}}.items():
        if config.data.max_tokens > read.context:
            raise UserError(f"data.max_tokens={config.data.max_tokens} is longer than the context of {folder}, {read.context}: lower it")
    if ALGORITHMS[config.mode].online:
        _check_sampling(config, arch, world)
    return arch, models


def _newest(config: Config) -> Path | None:
    """The checkpoint that a run continues from. Raises UserError where out is not fit for one."""
    out = Path(config.out)
    for link in (out / name for name in config.checkpoint.format):
        if link.exists() and not link.is_symlink():
            raise UserError(f"{link} is no link, which a run makes of it to name its newest export: move it away, or set another out")
    if config.resume:
        return folders.newest(out)[0]
    if (out / "latest").exists() or folders.steps(out):
        raise UserError(f"out={config.out} holds the checkpoints of another run and resume=false: choose another out, or delete it")
    return None


def _read(config: Config, models: dict[str, Role], tokenizer: Tokenizer, sources: Mapping[str, Opened]) -> dict[str, tuple[str, str]]:
    """What the run reads: key -> (path, fingerprint)."""
    found = {"policy.tokenizer": (config.policy.tokenizer or config.policy.load, columns.contents(tokenizer.files.values()))}
    if config.data.train and ALGORITHMS[config.mode].trains:
        found["data.train"] = (config.data.train, columns.contents(jsonl.files(Path(config.data.train))))
    for key, spec in (("reward.function", config.reward.function), ("rollout.environment", config.rollout.environment)):
        file, _, _ = spec.rpartition(":")
        if file.endswith(".py") and ALGORITHMS[config.mode].online:
            found[key] = file, columns.contents([Path(file)])
    held = {
        folder: weights({entry.path for shard in source.contents.shards for entry in shard.values()})
        for folder, (source, _) in sources.items()
    }
    for name, role in models.items():
        found[f"{name}.load"] = (role.folder, f"{held.get(role.folder, 'random')} {description(role.arch)}")
    return found


def _check_folders(config: Config, models: dict[str, Role], arch: Architecture) -> dict[str, Opened]:
    """What is read, opened."""
    sources = {}
    to_read = {config.policy.load: arch} | {role.folder: role.arch for role in models.values()}
    judges = {role.folder for name, role in models.items() if name == "reward" and role.use == "frozen"}  # a head of zeros is for learners
    for folder, held in to_read.items():
        if config.policy.init == "load" or folder != config.policy.load:
            sources[folder] = files.open_folder(folder, held, head=folder in judges), held
    return sources


def rule(config: Config) -> str:
    """The function that rewards samples; empty: the reward model or the environment alone does."""
    return config.reward.function or ("" if config.reward.load or config.rollout.environment else "math")


def _functions(config: Config) -> dict[str, str]:
    """The functions that sampled responses are judged by, by their keys."""
    algorithm, own = ALGORITHMS[config.mode], config.evaluate.function
    if not algorithm.online:
        return {}
    named = {"reward.function": rule(config) if algorithm.trains or not own else "", "evaluate.function": own}
    return {key: name for key, name in named.items() if name}


def _data(config: Config, tokenizer: Tokenizer) -> tuple[Records, Records | None]:
    """What the mode goes through, and what is held out."""
    algorithm = ALGORITHMS[config.mode]
    required = ("answer",) if "math" in _functions(config).values() else ()
    max_prompt = config.data.max_tokens - config.rollout.max_tokens if algorithm.online else None

    def read(path: str) -> Records:
        cache = Path(config.out) / "records"
        return Records.load(path, algorithm.form, tokenizer, config.data, max_prompt=max_prompt, required=required, cache=cache)

    source = "train" if algorithm.trains else "eval"
    path = {"train": config.data.train, "eval": config.data.eval}[source]
    if not path:
        raise UserError(f"data.{source} is not set: give a jsonl file or a folder of them")
    if source == "train" and Path(path).is_dir() and config.data.eval:
        both = {file.resolve() for file in jsonl.files(Path(path))} & {file.resolve() for file in jsonl.files(Path(config.data.eval))}
        if both:
            raise UserError(
                f"data.train={path} is a folder with {min(both).name} in it, which data.eval holds out: give the file to train on"
            )
    return read(path), read(config.data.eval) if source == "train" and config.data.eval else None


def roles(config: Config, policy: Architecture) -> dict[str, Role]:
    """The models that the mode trains or asks, with their folders and architectures; policy is that of policy.load.

    Raises UserError where one is not given or not fit.
    """
    algorithm = ALGORITHMS[config.mode](config)
    models = dict(algorithm.models)
    if algorithm.online and config.reward.load and (algorithm.trains or not config.evaluate.function):
        models["reward"] = "frozen"
    if "critic" in models and not (config.reward.load or config.critic.load):
        raise UserError("critic.load and reward.load are not set: PPO needs a model for its critic, give the reward model's folder")
    paths = {
        "policy": config.policy.load,
        "reference": config.reference.load or config.policy.load,
        "critic": config.critic.load or config.reward.load,
        "reward": config.policy.load if models.get("reward") == "train" else config.reward.load,
    }
    held = {config.policy.load: policy}  # each folder is described once: Megatron's may have to be opened for it
    for folder in {paths[name] for name in models} - held.keys():
        held[folder] = files.read_architecture(folder, config.policy.tokenizer)
    found = {
        name: Role(use, paths[name], _with_head(name, paths[name], held[paths[name]], name in algorithm.with_lm))
        for name, use in models.items()
    }
    for name, role in found.items():
        if role.arch.vocab != policy.vocab:
            raise UserError(
                f"{name}.load={role.folder} has a vocabulary of {role.arch.vocab}, policy.load={config.policy.load} has another: "
                "all models of a run read the same tokens"
            )
    return found


def _with_head(name: str, folder: str, arch: Architecture, lm: bool) -> Architecture:
    """What the folder holds, with the head that the role needs; with lm, beside a scalar one too."""
    if name in ("critic", "reward"):
        return replace(arch, scalar=True, lm=lm)
    if not arch.lm:
        raise UserError(f"{name}.load={folder} is a reward model, without an output layer: give a causal language model")
    return arch


def _check_training(config: Config, role: Role) -> None:
    """Every divisibility that a training layout needs."""
    p = config.parallel
    role.arch.check_split(p.tp, p.pp, said=(f"parallel.tp={p.tp}", f"parallel.pp={p.pp}"), where=f" of {role.folder}/config.json")
    if config.batch.minibatches > config.batch.prompts:
        raise UserError(f"batch.minibatches={config.batch.minibatches} is more than batch.prompts={config.batch.prompts}")


def _check_sampling(config: Config, arch: Architecture, world: int) -> None:
    """What the engine needs."""
    if not arch.lm:
        raise UserError(f"policy.load={config.policy.load} is a reward model, which generates nothing: give a causal language model")
    tp = config.rollout.tp
    if world % tp:
        raise UserError(f"rollout.tp={tp} does not divide the {world} ranks")
    arch.check_split(tp, said=(f"rollout.tp={tp}", ""), where=f" of {config.policy.load}/config.json")
    if config.rollout.max_tokens >= config.data.max_tokens:
        raise UserError(
            f"rollout.max_tokens={config.rollout.max_tokens} leaves no room for a prompt in data.max_tokens={config.data.max_tokens}"
        )
    if config.rollout.engine == "vllm":
        _check_vllm(config, arch)
    if not ALGORITHMS[config.mode].trains:
        return
    if config.rollout.temperature < COLDEST:
        raise UserError(
            f"rollout.temperature={config.rollout.temperature:g} samples the likeliest response again and again, which teaches nothing: "
            f"set it above 0, to {COLDEST} or more"
        )
    if config.rollout.inflight > 1 + config.rollout.max_lag:
        most = 1 + config.rollout.max_lag
        raise UserError(
            f"rollout.inflight={config.rollout.inflight:g} holds more than is learned in rollout.max_lag={config.rollout.max_lag} steps: "
            f"set it to {most} at most, or raise rollout.max_lag"
        )
    if config.rollout.rounds > 1 and not rule(config) and not config.rollout.environment:
        raise UserError("rollout.rounds > 1 keeps groups by the rule's rewards: set reward.function, or rollout.rounds=1")
    if config.rollout.rounds > 1 and config.rollout.group == 1:
        raise UserError("rollout.rounds > 1 keeps groups of unequal rewards, and rollout.group=1 makes none: set one of the two")


def _check_vllm(config: Config, arch: Architecture) -> None:
    """What vLLM asks of config.json, which it reads by itself."""
    load = f"policy.load={config.policy.load}"
    if not files.config_folder(config.policy.load, config.policy.tokenizer):
        remedy = "copy it there, or set policy.tokenizer to its folder"
        raise UserError(f"{load} has no config.json, which vLLM needs: {remedy}")
    kind = files.read_config(config.policy.load, config.policy.tokenizer).get("model_type")
    if kind != arch.family:
        needed = f"vLLM needs {arch.family!r} for its architectures"
        raise UserError(f"{load}: config.json has the model_type {kind!r:.80}, and {needed}: set it there")
    factor = arch.rope_scaling.get("factor")
    if arch.rope_kind == "linear" and isinstance(factor, int):
        needed = f"vLLM needs {factor}.0"
        raise UserError(f"{load}: config.json has the rope scaling factor {factor}, and {needed}: set it there")


def readable(folder: str) -> str:
    """The folder, if vLLM can read its config.json. Raises UserError. Not in inputs(), as transformers takes seconds to import."""
    from transformers import AutoConfig

    with texts.Blaming(f"{folder}/config.json: transformers, by which vLLM reads it, refuses it", REMEDY):
        AutoConfig.from_pretrained(folder)
    return folder


def check_world(parallel: Parallel, world: int) -> None:
    """Raise UserError unless tp x pp x cp x dp makes the world."""
    model = parallel.tp * parallel.pp * parallel.cp
    if world % model or parallel.dp not in (0, world // model):
        axes = f"parallel.tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp}" + (f" x dp={parallel.dp}" if parallel.dp else "")
        raise UserError(f"{axes} does not make {world} ranks: start a multiple of {model}, or change parallel.*")
