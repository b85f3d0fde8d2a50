"""--dry-run: print what a run would do. Needs config.json of the models, but no weights, no data and no GPU.

If the tokenizer is there, it is checked. If the data is there too, the first records are printed as in a run. Only with
`epochs`, the lines of data.train are counted.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from rlhf import configuration, texts
from rlhf.algorithms import ALGORITHMS
from rlhf.config import Config
from rlhf.data import lines, sets
from rlhf.data.forms import COMPARED
from rlhf.data.records import Records
from rlhf.errors import MissingError, UserError
from rlhf.estimate import estimate
from rlhf.ledger import Ledger
from rlhf.prepare import check_rewards, read_records, read_tokenizer, records_paths, steps
from rlhf.shapes import shapes

DEVICE = 80.0  # GiB, if memory.device is not set


def show(config: Config, world: int) -> None:
    """Print the configuration, the batch sizes, the memory ledger and an estimate of a step's time.

    Raises UserError if the run would be refused."""
    print(f"# {config.mode}\n{configuration.to_toml(config)}")
    algorithm = ALGORITHMS[config.mode]
    graded = algorithm.online and not algorithm.judged
    if graded:
        check_rewards(config)
    if graded and not algorithm.rule and not (config.reward.load or config.reward.function or config.critic.load):
        print("reward.load is not set: the ledger assumes a reward model of the policy's size\n")
        config = replace(config, reward=replace(config.reward, load=config.policy.load))
    arch, roles = shapes(config, world)
    for name, role in roles.items():
        print(f"{name}: {role.arch.family} of {role.arch.num_parameters() / 1e9:.2f}B parameters, {role.use}")
    print(f"\n{batch(config, world)}\n")
    ledger = Ledger(config, arch, roles, world, config.memory.device or DEVICE, 4 if config.dtype == "float32" else 2)
    print(ledger.table())
    if ledger.engine and config.rollout.engine == "vllm":
        r, holds = config.rollout, int(ledger.sequences())
        flying = math.ceil(round(r.inflight * config.batch.prompts) / (world // r.tp)) * r.group
        waiting = "; the others wait" if flying > holds else ""
        more = f" In flight: {flying}{waiting}." if algorithm.trains else ""
        print(f"The KV cache of an engine holds {holds} sequences of {config.data.max_tokens} tokens.{more}")
    if known := estimate(ledger):
        print(known)
    if record := first_record(config, arch.vocab):
        print(f"\n{record}")
    ledger.check()


@texts.paths()
def first_record(config: Config, rows: int) -> str:
    """Return the first record of each data set as a run prints it, or why it is not shown; "" if there is no data.

    rows: number of rows of the policy's embedding. Raises UserError for mistakes in the tokenizer or the data. Only
    what does not exist is no mistake.
    """
    held = {name: path for name, path in records_paths(config).items() if lines.exists(Path(path))}
    try:
        tokenizer = read_tokenizer(config, rows)
    except MissingError as error:
        return f"The first record is not shown: {error}" if held else ""
    held_out = not ALGORITHMS[config.mode].trains
    parts = [read_records(config, tokenizer, path, name, held_out=held_out, first=True) for name, path in held.items()]
    return Records.joined(parts, {}).first() if parts else ""


def batch(config: Config, world: int) -> str:
    """Return a description of a step in lines: ranks, samples, updates and micro-batches."""
    p, b, longest = config.parallel, config.batch, config.data.max_tokens
    dp = world // (p.tp * p.pp * p.cp)
    algorithm = ALGORITHMS[config.mode]
    updates = b.epochs * b.minibatches
    group = config.rollout.group if algorithm.online else 2 if algorithm.form in COMPARED else 1
    samples = b.prompts * group
    share = samples / b.minibatches / dp
    responses = f"{group} response{'s' * (group > 1)}{' or more' * (algorithm.form == 'scored')}"
    said = [f"{world} ranks: tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {dp}"]
    if algorithm.online:
        said[0] += f"; {world // config.rollout.tp} engines of {config.rollout.tp}"
    if not algorithm.trains:
        return said[0]
    said.append(
        f"step: {b.prompts} prompts x {responses} = {samples} samples, "
        f"at most {longest} tokens each, {samples * longest:,} in all"
    )
    said += _sets(config)
    many = f"{updates} a step, {_total(config, updates)}"
    said.append(f"updates: {b.epochs} epoch{'s' * (b.epochs > 1)} x {b.minibatches} mini-batches = {many}")
    most = -(-int(share * longest) // b.tokens)
    said.append(
        f"each update: {share:g} samples per data-parallel rank, "
        f"in at most about {most} micro-batches of {b.tokens} tokens"
    )
    return "\n".join(said)


def _total(config: Config, updates: int) -> str:
    """Return the number of updates and steps of the run. With epochs, they are counted before lines are dropped."""
    if not config.epochs:
        return f"{updates * config.steps} in {config.steps} steps"
    try:
        counts = _counts(records_paths(config))
    except UserError as error:
        return f"the number of steps of epochs={config.epochs:g} is unknown ({error})"
    longest, draws = sets.epoch(sets.weights(list(counts), config.data.weights), list(counts.values()))
    total = steps(config, draws)
    of = [f"{count:,} lines{f' of {name}' * (len(counts) > 1)}" for name, count in counts.items()][longest]
    return f"{updates * total} in {total} steps, which are {config.epochs:g} epochs of {of}"


@texts.paths()
def _sets(config: Config) -> list[str]:
    """Return a line with the shares of several data sets to train on. Raises UserError for wrong names."""
    sets.named(config.data.eval, "data.eval")
    if not (names := list(records_paths(config))):
        return []
    shares = zip(names, sets.percentages(sets.weights(names, config.data.weights)), strict=True)
    told = ", ".join(f"{name} {share}" for name, share in shares)
    return [f"of each step: {told}"] if len(names) > 1 else []


@texts.paths()
def _counts(paths: dict[str, str]) -> dict[str, int]:
    """Return the number of lines of each data set. Raises UserError if one cannot be read."""
    if not paths:
        raise UserError("data.train is not set")
    return {name: sum(1 for _ in lines.read(Path(path))) for name, path in paths.items()}
