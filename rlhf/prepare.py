"""Everything about a run that can be known before a model is loaded, without torch.

The launcher calls inputs() before it starts any rank, so that a mistake costs a moment and one line; the ranks call it again to get what
it read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf import rewards
from rlhf.config import Config, Parallel
from rlhf.contracts import UserError
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.model import architecture
from rlhf.model.architecture import Architecture
from rlhf.weights import files


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads."""

    arch: Architecture
    tokenizer: Tokenizer
    records: Records  # what the mode goes through: data.train, or data.eval in mode evaluate
    held_out: Records | None  # data.eval of a training run


def inputs(config: Config, world: int) -> Inputs:
    """Check the configuration against model, data and world. Raises UserError for the first mistake."""
    if not config.policy.load:
        raise UserError("policy.load is not set: give the Hugging Face folder of the model")
    if config.mode != "evaluate" and not config.resume and (Path(config.out) / "latest").exists():
        raise UserError(f"out={config.out} holds the checkpoints of another run and resume=false: choose another out, or delete it")
    arch = architecture.read(config.policy.load)
    generates = config.mode != "sft"
    _check_layout(config, arch, world, generates)
    if config.data.max_tokens > arch.context:
        raise UserError(f"data.max_tokens={config.data.max_tokens} is longer than the model's context of {arch.context}: lower it")
    max_prompt = config.data.max_tokens - config.rollout.max_tokens if generates else None
    if max_prompt is not None and max_prompt < 1:
        raise UserError(
            f"rollout.max_tokens={config.rollout.max_tokens} leaves no room for a prompt in data.max_tokens={config.data.max_tokens}"
        )
    if config.policy.init == "load":
        files.check(config.policy.load, arch)
    if config.reference.load and config.mode == "grpo":
        if architecture.read(config.reference.load) != arch:
            raise UserError(f"reference.load={config.reference.load} and policy.load={config.policy.load} must have the same architecture")
        files.check(config.reference.load, arch)
    tokenizer = Tokenizer.load(config.policy.tokenizer or config.policy.load)
    if tokenizer.vocab > arch.vocab:
        raise UserError(f"the tokenizer has {tokenizer.vocab} tokens, {config.policy.load}/config.json a vocab_size of {arch.vocab}")
    if generates:
        rewards.check(config.reward.function or "math")
    required = ("answer",) if generates and (config.reward.function or "math") == "math" else ()

    def read(path: str) -> Records:
        return Records.load(path, config.mode, tokenizer, config.data, max_prompt=max_prompt, required=required)

    source = "eval" if config.mode == "evaluate" else "train"
    path = {"train": config.data.train, "eval": config.data.eval}[source]
    if not path:
        raise UserError(f"data.{source} is not set: give a jsonl file or a folder of them")
    held_out = read(config.data.eval) if source == "train" and config.data.eval else None
    return Inputs(arch, tokenizer, read(path), held_out)


def _check_layout(config: Config, arch: Architecture, world: int, generates: bool) -> None:
    """Every divisibility that a layout needs."""
    p, name = config.parallel, f"{config.policy.load}/config.json"
    check_world(p, world)
    for size, what in ((arch.heads, "attention heads"), (arch.ffn, "intermediate size")):
        if size % p.tp:
            raise UserError(f"parallel.tp={p.tp} does not divide the {what} {size} of {name}")
    if arch.kv_heads % p.tp and p.tp % arch.kv_heads:
        raise UserError(f"parallel.tp={p.tp} and the {arch.kv_heads} key/value heads of {name} do not divide one another")
    if arch.layers % p.pp:
        raise UserError(f"parallel.pp={p.pp} does not divide the {arch.layers} layers of {name}")
    if generates:
        tp = config.rollout.tp
        if world % tp:
            raise UserError(f"rollout.tp={tp} does not divide the {world} ranks")
        if arch.heads % tp or (arch.kv_heads % tp and tp % arch.kv_heads):
            raise UserError(f"rollout.tp={tp} does not divide the {arch.heads} heads and {arch.kv_heads} key/value heads of {name}")
    if config.batch.minibatches > config.batch.prompts:
        raise UserError(f"batch.minibatches={config.batch.minibatches} is more than batch.prompts={config.batch.prompts}")


def check_world(parallel: Parallel, world: int) -> None:
    """Raise UserError unless tp x pp x cp x dp makes the world."""
    model = parallel.tp * parallel.pp * parallel.cp
    if world % model or parallel.dp not in (0, world // model):
        axes = f"parallel.tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp}" + (f" x dp={parallel.dp}" if parallel.dp else "")
        raise UserError(f"{axes} does not make {world} ranks: start a multiple of {model}, or change parallel.*")
