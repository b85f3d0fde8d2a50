"""Checks a configuration and reads the inputs of a run, before any model is loaded.

The launcher calls inputs() before it starts the ranks, so that mistakes are found early. The ranks call it again.
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

COLDEST = 0.01  # lowest sampling temperature for training; vLLM raises a lower one to this
Opened = tuple[files.Source, Architecture]  # an opened folder, and the architecture that it is read as


@dataclass(frozen=True, slots=True)
class Role:
    """One model of a run."""

    use: str  # "train" | "frozen"
    folder: str  # the folder that it is loaded from
    arch: Architecture


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a run."""

    arch: Architecture  # of policy.load
    roles: dict[str, Role]  # the models without the engine's; mode evaluate has at most the reward model
    tokenizer: Tokenizer
    records: Records  # data.train, or data.eval in mode evaluate
    held_out: Records | None  # data.eval of a training run
    remarks: list[str]  # on the folders, and on differences from the checkpoint that the run resumes from
    identity: Identity  # identity of the run (rlhf.identity)


@texts.paths()
def inputs(config: Config, world: int) -> Inputs:
    """Check the configuration against models, data and number of ranks. Raises UserError at the first mistake."""
    arch, models = shapes(config, world)
    newest = _newest(config) if ALGORITHMS[config.mode].trains else None
    sources = _check_folders(config, models, arch)
    beside = config.policy.tokenizer
    remarks = [
        remark for source, held in sources.values() for remark in source.remarks(held, beside, "policy.tokenizer")
    ]
    tokenizer = Tokenizer.load(beside or config.policy.load)
    if tokenizer.vocab > arch.vocab:
        model = f"{config.policy.load}/config.json has vocab_size={arch.vocab}"
        raise UserError(f"the tokenizer has {tokenizer.vocab} tokens, but {model}: set another policy.tokenizer")
    if ALGORITHMS[config.mode].online and config.rollout.inflight > 1 and not ALGORITHMS[config.mode].weighs:
        remarks.append(f"{config.mode} does not correct for tokens that older weights have sampled")
    if ALGORITHMS[config.mode].online and 0 < config.watchdog.timeout <= config.reward.timeout:
        times = f"watchdog.timeout={config.watchdog.timeout:g} is not above reward.timeout={config.reward.timeout:g}"
        raise UserError(f"{times}: a slow reward would end the run; raise it, or set it to 0")
    if config.reward.weights and ALGORITHMS[config.mode].online and not _functions(config):
        raise UserError("reward.weights is for the parts of reward functions, but there are none: set reward.function")
    for key, functions in _functions(config).items():
        rewards.check(*functions, memory=config.reward.memory, key=key)
    if config.rollout.environment and ALGORITHMS[config.mode].online:
        rewards.check(config.rollout.environment, memory=config.reward.memory, kind="environment")
        templates.reply(tokenizer, config.data.template, [tokenizer.eos], [{"role": "user", "content": "?"}])
    known = identity(config, _read(config, models, tokenizer, sources))
    if newest:
        remarks += compare(newest, folders.meta(newest), config, known)
    return Inputs(arch, models, tokenizer, *_data(config, tokenizer), remarks, known)


@texts.paths()
def shapes(config: Config, world: int) -> tuple[Architecture, dict[str, Role]]:
    """Return the policy's architecture and the roles, checked against the layout.

    This reads nothing of a model except its config.json. Raises UserError at the first mistake.
    """
    if not config.policy.load:
        raise UserError("policy.load is not set: set it to the folder of a model in Hugging Face or Megatron format")
    arch = files.read_architecture(config.policy.load, config.policy.tokenizer)
    models = roles(config, arch)
    check_world(config.parallel, world)
    for role in models.values():
        _check_training(config, role)
    for folder, read in {config.policy.load: arch, **{role.folder: role.arch for role in models.values()}}.items():
        if config.data.max_tokens > read.context:
            limit = f"the context length {read.context} of {folder}"
            raise UserError(f"data.max_tokens={config.data.max_tokens} is larger than {limit}: lower it")
    if ALGORITHMS[config.mode].online:
        _check_sampling(config, arch, world)
    return arch, models


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
    found = {
        "policy.tokenizer": (config.policy.tokenizer or config.policy.load, columns.contents(tokenizer.files.values()))
    }
    if config.data.train and ALGORITHMS[config.mode].trains:
        found["data.train"] = (config.data.train, columns.contents(jsonl.files(Path(config.data.train))))
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


def rule(config: Config) -> tuple[str, ...]:
    """Return the reward functions of samples. There are none if only a reward model or an environment gives rewards."""
    return config.reward.function or (() if config.reward.load or config.rollout.environment else ("math",))


def _functions(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the reward functions of sampled responses, by key."""
    algorithm, own = ALGORITHMS[config.mode], config.evaluate.function
    if not algorithm.online:
        return {}
    named = {"reward.function": rule(config) if algorithm.trains or not own else (), "evaluate.function": own}
    return {key: names for key, names in named.items() if names}


def _data(config: Config, tokenizer: Tokenizer) -> tuple[Records, Records | None]:
    """Return the records of the mode (Inputs.records) and the held-out records."""
    algorithm = ALGORITHMS[config.mode]
    required = ("answer",) if any("math" in names for names in _functions(config).values()) else ()
    max_prompt = config.data.max_tokens - config.rollout.max_tokens if algorithm.online else None

    def read(path: str) -> Records:
        cache = Path(config.out) / "records"
        return Records.load(
            path, algorithm.form, tokenizer, config.data, max_prompt=max_prompt, required=required, cache=cache
        )

    source = "train" if algorithm.trains else "eval"
    path = {"train": config.data.train, "eval": config.data.eval}[source]
    if not path:
        raise UserError(f"data.{source} is not set: set it to a jsonl file or a folder of them")
    if source == "train" and Path(path).is_dir() and config.data.eval:
        both = {file.resolve() for file in jsonl.files(Path(path))} & {
            file.resolve() for file in jsonl.files(Path(config.data.eval))
        }
        if both:
            shared = f"contains {min(both).name}, which data.eval={config.data.eval} holds out"
            raise UserError(f"data.train={path} {shared}: set data.train to the file to train on")
    return read(path), read(config.data.eval) if source == "train" and config.data.eval else None


def roles(config: Config, policy: Architecture) -> dict[str, Role]:
    """Return the models that the mode needs, with their folders and architectures. policy: architecture of policy.load.

    Raises UserError if a model is not set or does not fit.
    """
    algorithm = ALGORITHMS[config.mode](config)
    models = dict(algorithm.models)
    if algorithm.online and config.reward.load and (algorithm.trains or not config.evaluate.function):
        models["reward"] = "frozen"
    if "critic" in models and not (config.reward.load or config.critic.load):
        raise UserError("critic.load and reward.load are not set: set one to a reward model to start the critic from")
    paths = {
        "policy": config.policy.load,
        "reference": config.reference.load or config.policy.load,
        "critic": config.critic.load or config.reward.load,
        "reward": config.policy.load if models.get("reward") == "train" else config.reward.load,
    }
    held = {config.policy.load: policy}  # each folder is examined once, because a Megatron folder may have to be opened
    for folder in {paths[name] for name in models} - held.keys():
        held[folder] = files.read_architecture(folder, config.policy.tokenizer)
    found = {
        name: Role(use, paths[name], _with_head(name, paths[name], held[paths[name]], name in algorithm.with_lm))
        for name, use in models.items()
    }
    for name, role in found.items():
        if role.arch.vocab != policy.vocab:
            raise UserError(
                f"{name}.load={role.folder} has a vocabulary of {role.arch.vocab}, policy.load={config.policy.load} "
                f"has {policy.vocab}: use models with the same tokenizer"
            )
    return found


def _with_head(name: str, folder: str, arch: Architecture, lm: bool) -> Architecture:
    """Return a folder's architecture with the head of the role. lm: keep the output layer beside a scalar head."""
    if name in ("critic", "reward"):
        return replace(arch, scalar=True, lm=lm)
    if not arch.lm:
        raise UserError(f"{name}.load={folder} is a reward model without an output layer: give a causal language model")
    return arch


def _check_training(config: Config, role: Role) -> None:
    """Raise UserError if the training layout or the mini-batches do not divide the model or the batch."""
    p = config.parallel
    role.arch.check_split(
        p.tp, p.pp, said=(f"parallel.tp={p.tp}", f"parallel.pp={p.pp}"), where=f" of {role.folder}/config.json"
    )
    if config.batch.minibatches > config.batch.prompts:
        b = config.batch
        raise UserError(f"batch.minibatches={b.minibatches} is more than batch.prompts={b.prompts}: lower it")


def _check_sampling(config: Config, arch: Architecture, world: int) -> None:
    """Raise UserError if the engine cannot generate with this configuration."""
    if not arch.lm:
        raise UserError(f"policy.load={config.policy.load} is a reward model: give a causal language model")
    tp = config.rollout.tp
    if world % tp:
        raise UserError(f"rollout.tp={tp} does not divide the {world} ranks: set it to a divisor")
    arch.check_split(tp, said=(f"rollout.tp={tp}", ""), where=f" of {config.policy.load}/config.json")
    if config.rollout.max_tokens >= config.data.max_tokens:
        given = f"rollout.max_tokens={config.rollout.max_tokens}"
        raise UserError(f"{given} leaves no room for a prompt in data.max_tokens={config.data.max_tokens}: lower it")
    if config.rollout.engine == "vllm":
        _check_vllm(config, arch)
    if not ALGORITHMS[config.mode].trains:
        return
    if config.rollout.temperature < COLDEST:
        raise UserError(
            f"rollout.temperature={config.rollout.temperature:g} samples the same response every time, so there is "
            f"nothing to learn: set it to {COLDEST} or more"
        )
    if config.rollout.inflight > 1 + config.rollout.max_lag:
        r = config.rollout
        raise UserError(
            f"rollout.inflight={r.inflight:g} begins more groups than rollout.max_lag={r.max_lag} steps can use: "
            f"set it to {1 + r.max_lag} at most, or raise rollout.max_lag"
        )
    if config.rollout.rounds > 1 and not rule(config) and not config.rollout.environment:
        raise UserError("rollout.rounds > 1 needs the rewards of a function: set reward.function, or rollout.rounds=1")
    if config.rollout.rounds > 1 and config.rollout.group == 1:
        unequal = "rollout.rounds > 1 keeps groups of unequal rewards"
        raise UserError(f"{unequal}, but rollout.group=1 makes none: raise rollout.group, or set rollout.rounds=1")


def _check_vllm(config: Config, arch: Architecture) -> None:
    """Raise UserError if config.json is missing, or has values that vLLM would refuse. vLLM reads this file itself."""
    load = f"policy.load={config.policy.load}"
    if not files.config_folder(config.policy.load, config.policy.tokenizer):
        remedy = "copy it there, or set policy.tokenizer to its folder"
        raise UserError(f"{load} has no config.json, which vLLM needs: {remedy}")
    kind = files.read_config(config.policy.load, config.policy.tokenizer).get("model_type")
    if kind != arch.family:
        needed = f"vLLM needs {arch.family!r} for its architectures"
        raise UserError(f"{load}: config.json has model_type {kind!r:.80}, but {needed}: change it there")
    factor = arch.rope_scaling.get("factor")
    if arch.rope_kind == "linear" and isinstance(factor, int):
        needed = f"vLLM needs {factor}.0"
        raise UserError(f"{load}: config.json has the rope scaling factor {factor}, but {needed}: change it there")


def readable(folder: str) -> str:
    """Return the folder. Raises UserError if transformers, with which vLLM reads config.json, refuses that file.

    inputs() does not call this, because the import of transformers takes seconds.
    """
    from transformers import AutoConfig

    with texts.Blaming(f"{folder}/config.json: transformers, which vLLM reads it with, refuses it", REMEDY):
        AutoConfig.from_pretrained(folder)
    return folder


def check_world(parallel: Parallel, world: int) -> None:
    """Raise UserError unless tp x pp x cp x dp is the number of ranks."""
    model = parallel.tp * parallel.pp * parallel.cp
    if world % model or parallel.dp not in (0, world // model):
        axes = f"parallel.tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp}" + (
            f" x dp={parallel.dp}" if parallel.dp else ""
        )
        raise UserError(f"{axes} does not fit {world} ranks: start a multiple of {model} ranks, or change parallel.*")
