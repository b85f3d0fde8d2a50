"""Builds the parts of a run from a configuration: engine, models, source of samples. The loop is in rlhf.loop."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from rlhf import answering, configuration, lock, progress, texts
from rlhf.algorithms import ALGORITHMS
from rlhf.checkpoint import Checkpoints
from rlhf.config import Config
from rlhf.contracts import Engine, Sample
from rlhf.errors import StorageError, failure
from rlhf.evaluate import Evaluation, LossEvaluation, ResponseEvaluation, prefixes, table
from rlhf.folders import newest_export
from rlhf.interrupt import SAVED, Interrupt
from rlhf.launcher import GRACE
from rlhf.ledger import Ledger
from rlhf.loop import Run
from rlhf.metrics import Metrics, own_name
from rlhf.output import say
from rlhf.parallel.layout import Place, spread
from rlhf.parallel.mesh import PATIENCE, Mesh
from rlhf.patches import REMEDY
from rlhf.phases import POLICY, Phase
from rlhf.prepare import Inputs, described, inputs, passes
from rlhf.report.background import Reporter
from rlhf.residence import Residence, capacity, unused
from rlhf.rewards import Environments, Rewards, rule
from rlhf.roles import Roles
from rlhf.rollout.grader import Rule
from rlhf.rollout.owner import EngineOwner
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.source import DataSource, EngineSource, Source
from rlhf.shapes import readable
from rlhf.weights import files, names
from rlhf.weights.entries import UNSOUND
from rlhf.weights.plan import Plan
from rlhf.weights.publish import Publisher, mismatch

REPORTING = 60.0  # seconds that the end of a run waits for its report
# largest allowed mean |engine - learner| of log-probs; weights that were not published give a larger difference
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def run(config: Config) -> int:
    """Run one rank from beginning to end. Every rank calls it.

    Return the exit code: 0, or SAVED if a signal ended a training run early.
    """
    # The watchdog ends a run earlier, with a report. A collective that waits in vain is only the last resort.
    mesh = Mesh(config.parallel, config.seed, max(PATIENCE, 2 * config.watchdog.timeout, 2 * config.watchdog.start))
    config = mesh.all_gather(config)[0]  # ranks may have located different exports of a run that still trains
    mesh.agree(lock.claim(config.out, own_name(config) or "run") if mesh.rank == 0 else "")
    progress.enter("reading the data")
    # If the launcher has not tokenized the data, one rank per node does it, with all CPUs of the node.
    given = mesh.first_on_node(lambda: inputs(config, mesh.world, asks=mesh.is_first_on_node))
    # inputs() has checked that this run may resume the checkpoint in config.out, so its configuration may be replaced.
    writes = mesh.rank == 0 and not ALGORITHMS[config.mode].judged  # with a judge, these ranks do a part of the command
    mesh.agree(configuration.save(config, own_name(config) or "config") if writes else "")
    config = replace(config, steps=given.steps, epochs=0.0)
    try:
        return carry_out(config, mesh, given)
    except OSError as error:
        if not (text := failure(error, config.out)):
            raise
        resumes = ": the run resumes from its last checkpoint" if ALGORITHMS[config.mode].trains else ""
        raise StorageError(f"{text}; fix this and start again{resumes}") from None


def carry_out(config: Config, mesh: Mesh, given: Inputs) -> int:
    """Do the work of the mode, and return the exit code."""
    if ALGORITHMS[config.mode].judged:
        answering.answer(config, mesh, given, partial(build_sampler, config, mesh, given))
        return 0
    with (
        Rewards(rule(config), config.reward, config.judge) as rewards,
        Rewards(config.evaluate.function or rule(config), config.reward, config.judge) as held_out_rewards,
        Environments(config.rollout.environment, config.reward) as environments,
    ):
        if ALGORITHMS[config.mode].trains:
            return 0 if train(config, mesh, given, rewards, held_out_rewards, environments) else SAVED
        evaluate(config, mesh, given, held_out_rewards, environments)
        return 0


def train(
    config: Config, mesh: Mesh, given: Inputs, rewards: Rewards, held_out_rewards: Rewards, environments: Environments
) -> bool:
    """Run the training. Return False if a signal stopped it before the last step."""
    interrupt = Interrupt(told=mesh.rank == 0)  # first, because the following calls take long
    ledger = checked_ledger(config, mesh, given)
    training = build(config, mesh, given, ledger, rewards, held_out_rewards, interrupt, environments)
    if mesh.rank == 0:  # the report compares it with the metrics memory/, which are means over all ranks
        texts.save(Path(config.out) / "ledger.json", {str(visit): ledger.mean(visit) for visit in ledger.visits})
    with training.metrics:
        announce(training, given, ledger)
        finished = training.train()
    training.metrics.close("finished" if finished else "stopped")
    # After a signal the launcher gives the last rank GRACE seconds, and the report is only written if it is quick.
    training.report.finish(REPORTING if finished else GRACE / 4)
    if finished and mesh.rank == 0:
        if training.roles.residence.peaks:
            say(ledger.table(training.roles.residence.peaks, mesh.pp_rank))  # predicted and measured memory
        if export := newest_export(Path(config.out), config.checkpoint.format):
            say(f"the trained model: {export}")
    return finished


def evaluate(config: Config, mesh: Mesh, given: Inputs, rewards: Rewards, environments: Environments) -> None:
    """Run mode evaluate. The engine gets its weights directly from the folder policy.load. Nothing is trained."""
    residence = Residence(checked_ledger(config, mesh, given).offload, mesh.device)
    source = EngineSource(
        config,
        mesh,
        load_engine(config, mesh, given, residence),
        given.tokenizer,
        given.records,
        Rule(rewards, mesh),
        given.arch.hidden,
        environments=environments,
    )

    def model(samples: list[Sample]) -> None:
        residence.enter(Phase.SCORE, "reward")  # free the engine's memory before the reward model is built
        Roles(config, mesh, given.roles, dtype_of(config, mesh), 1.0, residence).grade(samples)

    with Metrics(config, mesh, start=-1, prefixes=prefixes(config)) as metrics:
        if mesh.rank == 0:
            for remark in given.remarks:
                say(f"  {remark}")
            for entry, records in zip(config.data.eval, given.held_out.values(), strict=True):
                say(f"{entry}: {records.counts}")
                say(records.first())
        progress.begin("evaluation")
        found = ResponseEvaluation(config, source, given.held_out, source.grader, model).measure(metrics)
        metrics.write(step=0)
    metrics.close()
    reporter(config, mesh).finish(REPORTING)
    if mesh.rank == 0:
        say(table(config, found))


def build_sampler(config: Config, mesh: Mesh, given: Inputs) -> Sampler:
    """Return a sampler with the model in policy.load, for mode mtbench."""
    residence = Residence(checked_ledger(config, mesh, given).offload, mesh.device)
    return Sampler(config, mesh, load_engine(config, mesh, given, residence), given.tokenizer)


def load_engine(config: Config, mesh: Mesh, given: Inputs, residence: Residence) -> EngineOwner:
    """Return an engine with the weights of policy.load. Raises UserError on all ranks if they are damaged."""
    alone = engine_loads(config, given)
    engine = build_engine(config, mesh, given, dtype_of(config, mesh), load=alone)
    owner = EngineOwner(engine, residence, fill=None if alone else partial(fill_engine, config, mesh, given))
    mesh.agree("" if owner.sound() else f"policy.load={config.policy.load}: {UNSOUND}")
    return owner


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
    """Build a training run.

    rewards: reward function for training samples. held_out_rewards: reward function for responses to held-out prompts.
    environments: environments for both.
    """
    algorithm, dtype, held_out = ALGORITHMS[config.mode](config), dtype_of(config, mesh), given.held_out
    residence = Residence(ledger.offload, mesh.device)
    if algorithm.online:  # the engine is built first, because it sizes its cache by the free device memory
        engine = build_engine(config, mesh, given, dtype)
        owner = EngineOwner(
            engine, residence, publisher=build_publisher(config, mesh, given, dtype), verify=config.rollout.check
        )
    roles = Roles(config, mesh, given.roles, dtype, config.rollout.temperature if algorithm.online else 1.0, residence)
    source: Source = DataSource(config, given.records, roles.share)
    evaluation: Evaluation | None = LossEvaluation(config, roles, algorithm, held_out) if held_out else None
    if algorithm.online:
        score, hidden = partial(roles.read, POLICY), given.arch.hidden
        grader = Rule(rewards, mesh)
        source = EngineSource(
            config, mesh, owner, given.tokenizer, given.records, grader, hidden, score, TOLERANCE[dtype], environments
        )
        if held_out:
            evaluation = ResponseEvaluation(config, source, held_out, Rule(held_out_rewards, mesh), roles.grade)
    checkpoints = Checkpoints(config, mesh, dtype, given.identity)
    start = checkpoints.resume(roles.visit(Phase.LEARN), algorithm.state) if config.resume else 0
    if start:
        source.resume(start, checkpoints.flight())

    def export(folder: Path) -> None:
        roles.export(roles.subject, folder, folder.name)
        if mesh.rank == 0:
            given.tokenizer.save(folder)

    return Run(
        config,
        mesh,
        start,
        algorithm,
        source,
        roles,
        evaluation,
        checkpoints,
        export,
        interrupt,
        metrics=Metrics(config, mesh, start, prefixes(config)),
        report=reporter(config, mesh),
    )


def reporter(config: Config, mesh: Mesh) -> Reporter:
    """Return the reporter of this run. Only that of rank 0 writes."""
    return Reporter(Path(config.out), wanted=config.log.report and mesh.rank == 0)


def dtype_of(config: Config, mesh: Mesh) -> torch.dtype:
    """Return the dtype of weights and activations."""
    if config.dtype == "auto":
        return torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]


def checked_ledger(config: Config, mesh: Mesh, given: Inputs) -> Ledger:
    """Return the memory ledger of this run. Raises UserError if the run does not fit into the memory of its devices."""
    size = dtype_of(config, mesh).itemsize
    ledger = Ledger(config, given.arch, given.roles, mesh.world, config.memory.device or capacity(mesh.device), size)
    ledger.check(unused(mesh.device))
    return ledger


def build_engine(config: Config, mesh: Mesh, given: Inputs, dtype: torch.dtype, load: bool = False) -> Engine:
    """Return the engine of this rank. With load, vLLM reads its weights from policy.load (see engine_loads).

    Otherwise the weights are undefined until they are published or filled in. Raises UserError on all ranks if
    the engine's parameters are not exactly those that a publish writes.
    """
    progress.enter("starting the engine")
    engine = _engine(config, mesh, given, dtype, load)
    tiling = names.tiles(given.arch, "vllm", engine_place(config, mesh), pad=True)
    problem = mismatch(engine.parameters(), tiling, dtype)
    why = f"rollout.engine={config.rollout.engine}: the installed version has other parameters than expected"
    mesh.agree(problem and f"{why} ({problem}): {REMEDY}")
    return engine


def _engine(config: Config, mesh: Mesh, given: Inputs, dtype: torch.dtype, load: bool) -> Engine:
    tp = config.rollout.tp
    if config.rollout.engine == "kvcache":
        from rlhf.rollout.kvcache import KVCache

        return KVCache(
            given.arch,
            tp=tp,
            tp_rank=engine_place(config, mesh).tp[0],
            group=mesh.subgroup(tp),
            dtype=dtype,
            device=mesh.device,
            max_len=config.data.max_tokens,
        )
    from rlhf.rollout.vllm import VLLM

    window = files.read_config(config.policy.load, config.policy.tokenizer).get("sliding_window")
    return VLLM(
        readable(str(files.config_folder(config.policy.load, config.policy.tokenizer))),
        tp=tp,
        dtype=str(dtype).removeprefix("torch."),
        seed=config.seed,
        max_len=config.data.max_tokens,
        memory=config.rollout.memory,
        cache=config.rollout.cache,
        load=load,
        windowless=given.arch.layers if window and not given.arch.window else 0,
    )


def engine_place(config: Config, mesh: Mesh) -> Place:
    """Return this rank's place in its engine."""
    return spread(mesh.world, config.rollout.tp).place(mesh.rank)


def engine_loads(config: Config, given: Inputs) -> bool:
    """Return whether the engine can read policy.load by itself. Only vLLM can, and only plain Hugging Face folders."""
    return config.rollout.engine == "vllm" and files.open_folder(config.policy.load, given.arch).plain


def fill_engine(config: Config, mesh: Mesh, given: Inputs, parameters: dict[str, Tensor]) -> None:
    """Read this rank's shard of policy.load into the engine's parameters."""
    tiling = names.tiles(given.arch, "vllm", engine_place(config, mesh))
    files.read(config.policy.load, given.arch, tiling, parameters)


def build_publisher(config: Config, mesh: Mesh, given: Inputs, dtype: torch.dtype) -> Publisher:
    """Return the publisher that copies the policy's shards to the engines' shards."""
    training = names.tilings(given.arch, "megatron", mesh.world, config.parallel.tp, config.parallel.pp)
    engines = names.tilings(given.arch, "vllm", mesh.world, config.rollout.tp)
    return Publisher(Plan(training, engines, mesh.nodes()), mesh.rank, dtype, config.rollout.bucket << 20)


def announce(run: Run, given: Inputs, ledger: Ledger) -> None:
    """Print a description of the run. Only rank 0 prints."""
    mesh, config, layout = run.mesh, run.config, run.mesh.layout
    if mesh.rank:
        return
    axes = f"tp {layout.tp} pp {layout.pp} cp {layout.cp} dp {layout.dp}"
    dtype = str(dtype_of(config, mesh)).removeprefix("torch.")
    say(f"{config.mode}: {mesh.world} ranks on {mesh.device.type} in {dtype}: {axes}")
    for name, role in given.roles.items():
        size = f"{role.arch.num_parameters() / 1e6:.1f}M parameters"
        say(f"  {name}: {role.arch.family} of {size} from {role.folder}, {role.use}")
    for remark in given.remarks:
        say(f"  {remark}")
    for line in described(config, given.records):
        say(line)
    say(f"{passes(config, given.records)}; out: {config.out}")
    say(given.records.first())
    for entry, held_out in zip(config.data.eval, given.held_out.values(), strict=True):
        say(f"{entry}, held out: {held_out.counts}")
        say(held_out.first())
    for remark in run.source.remarks():
        say(remark)
    if run.start:
        say(
            f"resumed after step {run.start}"
            + (f", and steps={config.steps} are done" if run.start >= config.steps else "")
        )
    if mesh.device.type == "cuda":
        say(ledger.table())
    waiting, host = ledger.host(mesh.pp_rank) * mesh.ranks_per_node, psutil.virtual_memory().total / 2**30
    if waiting > host:
        say(f"warning: this node's ranks offload {waiting:.0f} GiB to host memory, but the node has {host:.0f} GiB")
