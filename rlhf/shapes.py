"""The models of a run and their shapes, checked against the layout. It reads only the config.json of each model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf import texts
from rlhf.algorithms import ALGORITHMS
from rlhf.config import Config, Parallel
from rlhf.errors import UserError
from rlhf.model.architecture import CONTEXTS, REMEDY, Architecture
from rlhf.rewards import rule
from rlhf.weights import files

COLDEST = 0.01  # lowest sampling temperature for training; vLLM raises a lower one to this


@dataclass(frozen=True, slots=True)
class Role:
    """One model of a run."""

    use: str  # "train" | "frozen"
    folder: str  # the folder that it is loaded from
    arch: Architecture


@texts.paths()
def shapes(config: Config, world: int) -> tuple[Architecture, dict[str, Role]]:
    """Return the policy's architecture and the roles, checked against the layout.

    This reads nothing of a model except its config.json. Raises UserError at the first mistake.
    """
    if not config.policy.load:
        raise UserError("policy.load is not set: set it to the folder of a model in Hugging Face or Megatron format")
    if config.epochs and config.steps != (default := Config().steps):
        both = f"steps={config.steps} and epochs={config.epochs:g} are both set"
        raise UserError(f"{both}: set epochs=0 to use steps, or steps={default}, its default, to use epochs")
    arch = files.read_architecture(config.policy.load, config.policy.tokenizer)
    models = roles(config, arch)
    check_world(config.parallel, world)
    for role in models.values():
        _check_training(config, role)
    for folder, read in {config.policy.load: arch, **{role.folder: role.arch for role in models.values()}}.items():
        if config.data.max_tokens > read.context:
            held = files.read_config(folder, config.policy.tokenizer)
            windowed = held.get("sliding_window") == read.context and read.context not in map(held.get, CONTEXTS)
            limit = "sliding_window of some layers, which is" if windowed else "context length"
            what = f"is larger than the {limit} {read.context} of {folder}"
            raise UserError(f"data.max_tokens={config.data.max_tokens} {what}: lower it")
    if ALGORITHMS[config.mode].online:
        _check_sampling(config, arch, world)
    return arch, models


def roles(config: Config, policy: Architecture) -> dict[str, Role]:
    """Return the models that the mode needs, with their folders and architectures. policy: architecture of policy.load.

    Raises UserError if a model is not set or does not fit.
    """
    algorithm = ALGORITHMS[config.mode](config)
    models = dict(algorithm.models)
    if (
        algorithm.online
        and not algorithm.judged
        and config.reward.load
        and (algorithm.trains or not config.evaluate.function)
    ):
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
    if name == "reward":
        return replace(arch, scalar=True, lm=lm)
    arch = replace(arch, pad=None)  # only scores depend on it
    if name == "critic":
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
