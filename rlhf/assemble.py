"""From a configuration to the parts of a run: which engine, which models, where samples come from. The loop itself is rlhf.loop."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from rlhf import configuration, lock
from rlhf.algorithms import ALGORITHMS
from rlhf.checkpoint import Checkpoints
from rlhf.config import Config
from rlhf.contracts import Engine, Sample
from rlhf.errors import StorageError, failure
from rlhf.evaluate import Evaluation, LossEvaluation, ResponseEvaluation, table
from rlhf.interrupt import SAVED, Interrupt
from rlhf.ledger import Ledger
from rlhf.loop import Run
from rlhf.metrics import Metrics, own_name, say
from rlhf.parallel.mesh import Mesh
from rlhf.patches import REMEDY
from rlhf.phases import POLICY, Phase
from rlhf.prepare import Inputs, inputs, readable, rule
from rlhf.residence import Residence, capacity, unused
from rlhf.rewards import Environments, Rewards
from rlhf.roles import Roles
from rlhf.rollout.judge import Rule
from rlhf.rollout.owner import EngineOwner
from rlhf.rollout.source import DataSource, EngineSource, Source
from rlhf.weights import files, names
from rlhf.weights.entries import UNSOUND
from rlhf.weights.formats import recognise
from rlhf.weights.plan import Plan
from rlhf.weights.publish import Publisher, mismatch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # mean |engine - learner| of log-probs; forgotten weights show as more


def run(config: Config) -> int:
    """One rank, from beginning to end; every rank calls it. Returns the exit code: 0, or SAVED if a signal ended a training run early."""
    mesh = Mesh(config.parallel, config.seed)
    mesh.agree(claim(config) if mesh.rank == 0 else "")
    given = mesh.first_on_node(lambda: inputs(config, mesh.world))  # one rank tokenizes, if no launcher has, on all CPUs
    mesh.agree(note(config) if mesh.rank == 0 else "")  # not before the run is known to be one that may continue what is there
    limits = (config.reward.timeout, config.reward.workers, config.reward.memory)
    with (
        Rewards(rule(config), *limits) as rewards,
        Rewards(config.evaluate.function or rule(config), *limits) as held_out_rewards,
        Environments(config.rollout.environment, *limits) as environments,
    ):
        try:
            if ALGORITHMS[config.mode].trains:
                return 0 if train(config, mesh, given, rewards, held_out_rewards, environments) else SAVED
            evaluate(config, mesh, given, held_out_rewards, environments)
            return 0
        except OSError as error:
            if not (text := failure(error, config.out)):
                raise
            raise StorageError(f"{text}; put that right and start again: a run continues from its last checkpoint") from None


def claim(config: Config) -> str:
    """Make config.out and hold it until this process ends. Empty, or why that cannot be."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        other = lock.hold(out / f"{own_name(config) or 'run'}.lock")
    except OSError as error:
        return f"out={out} cannot be written: {failure(error, out) or error}; set out to a folder with room"
    return other and f"out={out} is in use by {other}: wait until it ends, or set another out"


def note(config: Config) -> str:
    """Write what is run. Empty, or why that cannot be."""
    file = Path(config.out) / f"{own_name(config) or 'config'}.toml"
    try:
        file.write_text(f"# ./launch.sh {config.mode} {file}\n{configuration.to_toml(config)}", encoding="utf-8")
    except OSError as error:
        return f"out={config.out} cannot be written: {failure(error, file) or error}; set out to a folder with room"
    return ""


def train(config: Config, mesh: Mesh, given: Inputs, rewards: Rewards, held_out_rewards: Rewards, environments: Environments) -> bool:
    """A training run. False: a signal came before the last step was done."""
    interrupt = Interrupt(told=mesh.rank == 0)  # before anything that takes long
    ledger = checked_ledger(config, mesh, given)
    training = build(config, mesh, given, ledger, rewards, held_out_rewards, interrupt, environments)
    announce(training, given, ledger)
    finished = training.train()
    training.metrics.close()
    if finished and mesh.rank == 0 and training.roles.residence.peaks:
        say(ledger.table(training.roles.residence.peaks, mesh.pp_rank))  # what was predicted, and what was measured
    return finished


def evaluate(config: Config, mesh: Mesh, given: Inputs, rewards: Rewards, environments: Environments) -> None:
    """Mode evaluate: the engine loads the folder by itself, and nothing is trained."""
    dtype = dtype_of(config, mesh)
    residence = Residence(checked_ledger(config, mesh, given).offload, mesh.device)
    engine = build_engine(config, mesh, given, dtype, load=True)
    owner = EngineOwner(engine, residence, fill=None if engine_loads(config) else partial(fill_engine, config, mesh, given))
    mesh.agree("" if owner.sound() else f"policy.load={config.policy.load}: {UNSOUND}")
    source = EngineSource(config, mesh, owner, given.tokenizer, given.records, Rule(rewards, mesh), environments=environments)

    def model(samples: list[Sample]) -> None:
        residence.enter(Phase.SCORE, "reward")  # the engine leaves the device before the reward model is built
        Roles(config, mesh, given.roles, dtype, 1.0, residence).judge(samples)

    metrics = Metrics(config, mesh, start=-1)
    if mesh.rank == 0:
        say(f"{given.records.counts} of {config.data.eval}")
    ResponseEvaluation(config, source, given.records, source.judge, model)(metrics)
    values = metrics.write(step=0)
    metrics.close()
    if mesh.rank == 0:
        say(table(config, values))


def build(
    config: Config,
    mesh: Mesh,
    given: Inputs,
    ledger: Ledger,
    rewards: Rewards,
    held_out_rewards: Rewards,
    interrupt: Interrupt,
    environments: Environments | None = None,
) -> Run:
    """The parts of a training run, in the order in which they take the device's memory.

    rewards says what samples are worth, held_out_rewards what responses to held-out prompts are, environments answer both.
    """
    algorithm, dtype, held_out = ALGORITHMS[config.mode](config), dtype_of(config, mesh), given.held_out
    residence = Residence(ledger.offload, mesh.device)
    if algorithm.online:  # the engine first: it sizes its memory by what is free
        engine = build_engine(config, mesh, given, dtype)
        owner = EngineOwner(engine, residence, publisher=build_publisher(config, mesh, given, dtype), verify=config.rollout.check)
    roles = Roles(config, mesh, given.roles, dtype, config.rollout.temperature if algorithm.online else 1.0, residence)
    source: Source = DataSource(config, given.records)
    evaluation: Evaluation | None = LossEvaluation(config, roles, algorithm, held_out) if held_out else None
    if algorithm.online:
        score = partial(roles.read, POLICY)
        judge = Rule(rewards, mesh)
        source = EngineSource(config, mesh, owner, given.tokenizer, given.records, judge, score, TOLERANCE[dtype], environments)
        evaluation = ResponseEvaluation(config, source, held_out, Rule(held_out_rewards, mesh), roles.judge) if held_out else None
    checkpoints = Checkpoints(config, mesh, dtype, given.identity)
    start = checkpoints.resume(roles.visit(Phase.LEARN), algorithm.state) if config.resume else 0
    if start:
        source.resume(start, checkpoints.flight())

    def export(folder: Path) -> None:
        roles.export(roles.subject, folder, folder.name)
        if mesh.rank == 0:
            given.tokenizer.save(folder)

    return Run(
        config, mesh, start, algorithm, source, roles, evaluation, checkpoints, export, interrupt, metrics=Metrics(config, mesh, start)
    )


def dtype_of(config: Config, mesh: Mesh) -> torch.dtype:
    """Of weights and activations."""
    if config.dtype == "auto":
        return torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]


def checked_ledger(config: Config, mesh: Mesh, given: Inputs) -> Ledger:
    """The memory ledger of this run on these devices. Raises UserError where it does not fit."""
    size = dtype_of(config, mesh).itemsize
    ledger = Ledger(config, given.arch, given.roles, mesh.world, config.memory.device or capacity(mesh.device), size)
    ledger.check(unused(mesh.device))
    return ledger


def build_engine(config: Config, mesh: Mesh, given: Inputs, dtype: torch.dtype, load: bool = False) -> Engine:
    """The engine of this rank. With load, vLLM reads the weights of a Hugging Face folder by itself; other weights come later.

    Raises UserError on all ranks unless its parameters are exactly those that a publish writes.
    """
    engine, tp = _engine(config, mesh, given, dtype, load), config.rollout.tp
    tiling = names.tiles(given.arch, "vllm", (mesh.rank % tp, tp), pad=True)
    problem = mismatch(engine.parameters(), tiling, dtype)
    why = f"rollout.engine={config.rollout.engine} is of a version whose parameters are others"
    mesh.agree(problem and f"{why} ({problem}): {REMEDY}")
    return engine


def _engine(config: Config, mesh: Mesh, given: Inputs, dtype: torch.dtype, load: bool) -> Engine:
    tp = config.rollout.tp
    if config.rollout.engine == "kvcache":
        from rlhf.rollout.kvcache import KVCache

        return KVCache(
            given.arch,
            tp=tp,
            tp_rank=mesh.rank % tp,
            group=mesh.subgroup(tp),
            dtype=dtype,
            device=mesh.device,
            max_len=config.data.max_tokens,
        )
    from rlhf.rollout.vllm import VLLM

    return VLLM(
        readable(str(files.config_folder(config.policy.load, config.policy.tokenizer))),
        tp=tp,
        dtype=str(dtype).removeprefix("torch."),
        seed=config.seed,
        max_len=config.data.max_tokens,
        memory=config.rollout.memory,
        cache=config.rollout.cache,
        load=load and engine_loads(config),
    )


def engine_loads(config: Config) -> bool:
    """Whether the engine can read policy.load: vLLM reads Hugging Face folders."""
    return config.rollout.engine == "vllm" and recognise(config.policy.load).name == "hf"


def fill_engine(config: Config, mesh: Mesh, given: Inputs, parameters: dict[str, Tensor]) -> None:
    """Read this rank's shard of policy.load into the engine's parameters."""
    tp = config.rollout.tp
    files.read(config.policy.load, given.arch, names.tiles(given.arch, "vllm", (mesh.rank % tp, tp)), parameters)


def build_publisher(config: Config, mesh: Mesh, given: Inputs, dtype: torch.dtype) -> Publisher:
    """What carries the policy's shards to the engines' shards."""
    training = names.tilings(given.arch, "megatron", mesh.world, config.parallel.tp, config.parallel.pp)
    engines = names.tilings(given.arch, "vllm", mesh.world, config.rollout.tp)
    return Publisher(Plan(training, engines, mesh.nodes()), mesh.rank, dtype, config.rollout.bucket << 20)


def announce(run: Run, given: Inputs, ledger: Ledger) -> None:
    """Say what is about to run, on the first rank."""
    mesh, config, layout = run.mesh, run.config, run.mesh.layout
    if mesh.rank:
        return
    axes = f"tp {layout.tp} pp {layout.pp} cp {layout.cp} dp {layout.dp}"
    say(f"{config.mode}: {mesh.world} ranks on {mesh.device.type} in {str(dtype_of(config, mesh)).removeprefix('torch.')}: {axes}")
    for name, role in given.roles.items():
        say(f"  {name}: {role.arch.family} of {role.arch.num_parameters() / 1e6:.1f}M parameters from {role.folder}, {role.use}")
    for remark in given.remarks:
        say(f"  {remark}")
    say(f"{given.records.counts} of {config.data.train}; out: {config.out}")
    if given.held_out:
        say(f"{given.held_out.counts} of {config.data.eval} are held out")
    for remark in run.source.remarks():
        say(remark)
    if run.start:
        say(f"resumed after step {run.start}" + (f", and steps={config.steps} are done" if run.start >= config.steps else ""))
    if mesh.device.type == "cuda":
        say(ledger.table())
    waiting, host = ledger.host(mesh.pp_rank) * mesh.ranks_per_node, psutil.virtual_memory().total / 2**30
    if waiting > host:
        say(f"warning: what this node's ranks offload takes {waiting:.0f} GiB of host memory, and it has {host:.0f}")
