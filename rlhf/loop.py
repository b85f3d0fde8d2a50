"""THE loop, shared by all modes: draw, score, credit, learn, publish, evaluate, log, save."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.checkpoint import Checkpoints
from rlhf.config import Config, Optim
from rlhf.contracts import Engine, Sample
from rlhf.data.records import Records
from rlhf.interrupt import SAVED, Interrupt
from rlhf.ledger import Ledger
from rlhf.metrics import Metrics, say
from rlhf.parallel.mesh import Mesh
from rlhf.prepare import Inputs, inputs, rule
from rlhf.rewards import Rewards
from rlhf.roles import Roles
from rlhf.rollout.sampler import Sampler, summary
from rlhf.train.optimizer import learning_rate
from rlhf.train.parking import Parking, capacity, unused
from rlhf.weights import files, names
from rlhf.weights.publish import Publisher
from rlhf.weights.tiles import plan

SPEAKERS = {"old_logp": "policy", "ref_logp": "reference", "values": "critic"}  # stream -> the role that scores it
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # mean |engine - learner| of log-probs; forgotten weights show as more


def run(config: Config) -> int:
    """One rank's whole life. Every rank calls it alike. Returns the exit code: 0, or SAVED where a signal ended a training run early."""
    mesh = Mesh(config.parallel, config.seed)
    given = mesh.first_on_node(lambda: inputs(config, mesh.world))  # one rank tokenizes, if no launcher has, on all CPUs
    if mesh.rank == 0:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        (Path(config.out) / "config.toml").write_text(
            f"# ./launch.sh {config.mode} {config.out}/config.toml\n{configuration.to_toml(config)}"
        )
    limits = (config.reward.timeout, config.reward.workers)
    with Rewards(rule(config), *limits) as rewards, Rewards(config.evaluate.function or rule(config), *limits) as judge:
        if config.mode == "evaluate":
            evaluate_folder(config, mesh, given, judge)
            return 0
        return 0 if Run(config, mesh, given, rewards, judge).train() else SAVED


class Run:
    """A training run on this rank."""

    def __init__(self, config: Config, mesh: Mesh, given: Inputs, rewards: Rewards, judge: Rewards):
        """rewards says what samples are worth, judge what held-out responses are."""
        self.config, self.mesh, self.given, self.judge = config, mesh, given, judge
        self.interrupt = Interrupt()
        self.dtype = dtype_of(config, mesh)
        self.algorithm = ALGORITHMS[config.mode](config)
        self.ledger = checked_ledger(config, mesh, given, self.dtype)
        self.sampler: Sampler | None = None
        if self.algorithm.online:  # the engine first: it sizes its memory by what is free
            engine = build_engine(config, mesh, given, self.dtype)
            engine.sleep()
            training = names.tilings(given.arch, "mcore", mesh.world, config.parallel.tp, config.parallel.pp)
            engines = names.tilings(given.arch, "vllm", mesh.world, config.rollout.tp)
            publisher = Publisher(plan(training, engines, mesh.nodes()), mesh.rank, self.dtype, config.rollout.bucket << 20)
            self.sampler = Sampler(config, mesh, engine, publisher, given.tokenizer, partial(reward, rewards, mesh), given.records)
        temperature = config.rollout.temperature if self.algorithm.online else 1.0
        self.roles = Roles(config, mesh, given.roles, self.dtype, temperature, Parking(self.ledger.offload, mesh.device))
        self.subject = self.roles.trained[0]  # what the run is for
        self._switch = self.roles.parking.switch
        self.checkpoints = Checkpoints(config, mesh, self.dtype)

    def train(self) -> bool:
        """All steps from the newest checkpoint on, or from the first. False: a signal came before the last one was done."""
        config, held_out = self.config, self.given.held_out
        start = self.checkpoints.resume(self.roles.visit("learn"), self.algorithm.state) if config.resume else 0
        self.metrics = metrics = Metrics(config, self.mesh, start)
        self._announce(start)
        self.publish(check=True)
        if start == 0 and held_out:
            self.evaluate(held_out)
            metrics.write(0)
        for step in range(start, config.steps):
            metrics.begin()
            with metrics.time("rollout"):
                samples = self.draw(step)
            with metrics.time("score"):
                self.score(samples)
            tokens = sum(len(s.tokens) for s in samples)
            samples, sums = self.algorithm.credit(samples)
            metrics.add_common(sums)
            with metrics.time("learn"):
                self.learn(samples, step)
            with metrics.time("publish"):
                self.publish(check=config.rollout.check or step == start)
            done = step + 1
            if held_out and due(done, config.evaluate.every, config.steps):
                with metrics.time("evaluate"):
                    self.evaluate(held_out)
            metrics.add({f"memory/{place}": (gib, 1.0) for place, gib in self.roles.parking.taken().items()})  # mean over ranks
            metrics.add_common({"time/switch": (self.roles.parking.spent(), 1.0)})  # within the other times
            metrics.write(done, tokens)
            stop = any(self.mesh.all_gather(self.interrupt.came))  # a signal to any rank stops all of them after the same step
            saves = stop or due(done, config.checkpoint.every, config.steps)
            if saves:
                self.save(done)
            if stop and done < config.steps:
                return False
            if saves and done < config.steps:
                self.publish(check=False)
        self._settle_up()
        return True

    def draw(self, step: int) -> list[Sample]:
        """The step's samples, alike on every rank: from the engine, or straight from the data."""
        if not self.sampler:
            return self.given.records.draw(step, self.config.batch.prompts, self.config.seed)
        samples, sums = self.sampler.draw(step)
        self._switch(self.sampler.engine.sleep)
        self.metrics.add_common(sums)
        return samples

    def score(self, samples: list[Sample]) -> None:
        """Let the models say what the algorithm asks for, into all samples, on every rank."""
        for stream in self.algorithm.streams:
            for sample, values in zip(samples, self.roles.read(SPEAKERS[stream], samples), strict=True):
                setattr(sample, stream, values)
        if not self.sampler:
            return
        if "reward" in self.roles:
            self.roles.judge(samples)
        self.metrics.add_common(summary(samples))
        if "old_logp" in self.algorithm.streams:
            gaps = np.concatenate([np.abs(s.old_logp - s.sampler_logp)[s.mask] for s in samples])
            self.metrics.add_common({"mismatch": (float(gaps.sum()), float(len(gaps)))})

    def learn(self, samples: list[Sample], step: int) -> None:
        """batch.epochs passes over the samples, batch.minibatches updates each; one role after the other."""
        b, algorithm = self.config.batch, self.algorithm
        batches = [batch for epoch in range(b.epochs) for batch in self._minibatches(samples, step, epoch)]
        for role, _ in self.roles.visit("learn") if samples else ():
            begin = algorithm.warmup.get(role, 0)  # the step of its first update, from which its schedule counts
            for turn, batch in enumerate(batches):
                if batch and step >= begin:
                    lr = learning_rate(self._optim(role), (step - begin) * len(batches) + turn, (self.config.steps - begin) * len(batches))
                    self.metrics.add(self.roles.learn(role, batch, partial(algorithm.loss, role), algorithm.whole_groups, lr))

    def _minibatches(self, samples: list[Sample], step: int, epoch: int) -> list[list[Sample]]:
        """The samples of each update of one pass. Groups stay whole, and meet in a new order each pass."""
        order = np.random.default_rng((self.config.seed, step, epoch)).permutation(sorted({s.group for s in samples}))
        parts = [set(part.tolist()) for part in np.array_split(order, self.config.batch.minibatches)]
        return [[s for s in samples if s.group in part] for part in parts]

    def publish(self, check: bool) -> None:
        """Give the engine the policy's weights; with check, prove that it has them."""
        if not self.sampler:
            return
        self.roles.parking.enter("publish")
        self._switch(self.sampler.engine.wake_weights)
        self.sampler.publish(self.roles.learners["policy"].parameters())
        self.roles.parking.enter("rollout")  # first the weights go, then the cache comes
        self._switch(self.sampler.engine.wake)
        self.roles.parking.measure()
        if check:
            self._compare(self.sampler)
            self.publish(check=False)

    def evaluate(self, held_out: Records) -> None:
        """Held-out reward of fresh responses, or held-out loss where nothing is generated."""
        samples = held_out.head(self.config.evaluate.prompts)
        if self.sampler:
            samples = self.sampler.answer(samples, partial(reward, self.judge, self.mesh))
            if "reward" in self.roles and not self.config.evaluate.function:
                self._switch(self.sampler.engine.sleep)
                self.roles.judge(samples)
                self.publish(check=False)
            report(self.config, self.mesh, samples)
            self.metrics.add_common({f"eval_{name}": pair for name, pair in summary(samples).items()})
        else:
            self.score(samples)
            samples, _ = self.algorithm.credit(samples)
            sums = self.roles.evaluate(self.subject, samples, partial(self.algorithm.loss, self.subject), self.algorithm.whole_groups)
            self.metrics.add({f"eval_{name}": pair for name, pair in sums.items()})

    def save(self, done: int) -> None:
        """A checkpoint after so many steps. The engine sleeps meanwhile: what is saved may need its share of the device."""
        if self.sampler:
            self._switch(self.sampler.engine.sleep)
        export = self.export if self.config.checkpoint.export or done == self.config.steps else None
        self.checkpoints.save(done, self.roles.visit("save"), self.algorithm.state, export)

    def export(self, folder: Path) -> None:
        """Write what the run is for as a folder in the format that it is named after. Every rank calls it."""
        self.roles.export(self.subject, folder, folder.name)
        if self.mesh.rank == 0:
            self.given.tokenizer.save(folder)

    def _optim(self, role: str) -> Optim:
        own = self.config.critic.lr if role == "critic" else 0.0
        return replace(self.config.optim, lr=own or self.config.optim.lr)

    def _compare(self, sampler: Sampler) -> None:
        """Sample a little and let the policy score it: engine and learner must give the same log-probs. The engine is asleep afterwards."""
        samples = sampler.probe(self.given.records.head(2 * self.mesh.world))
        self._switch(sampler.engine.sleep)
        gaps = np.concatenate(
            [np.abs(a - s.sampler_logp)[s.mask] for s, a in zip(samples, self.roles.read("policy", samples), strict=True)]
        )
        if not gaps.mean() < AGREEMENT[self.dtype]:
            raise RuntimeError(
                f"after publishing, the engine's log-probs differ from the policy's by {gaps.mean():.3g} on average"
                f" ({gaps.max():.3g} at most): it does not generate with the weights that were trained"
            )

    def _announce(self, start: int) -> None:
        if self.mesh.rank:
            return
        layout, config = self.mesh.layout, self.config
        axes = f"tp {layout.tp} pp {layout.pp} cp {layout.cp} dp {layout.dp}"
        say(f"{config.mode}: {self.mesh.world} ranks on {self.mesh.device.type} in {str(self.dtype).removeprefix('torch.')}: {axes}")
        for name, role in self.given.roles.items():
            say(f"  {name}: {role.arch.family} of {role.arch.num_parameters() / 1e6:.1f}M parameters from {role.folder}, {role.use}")
        for remark in self.given.remarks:
            say(f"  {remark}")
        say(f"{self.given.records.counts} of {config.data.train}; out: {config.out}")
        if self.given.held_out:
            say(f"{self.given.held_out.counts} of {config.data.eval} are held out")
        if self.sampler and self.sampler.publisher:
            stay, cross = (count * self.dtype.itemsize / 1e9 for count in self.sampler.publisher.plan.volume())
            say(f"publish: {stay:.3g} GB of weights stay on their ranks, {cross:.3g} GB cross")
        if start:
            say(f"resumed after step {start}" + (f", and steps={config.steps} are done" if start >= config.steps else ""))
        if self.mesh.device.type == "cuda":
            say(self.ledger.table())
        waiting, host = self.ledger.host(self.mesh.pp_rank) * self.mesh.ranks_per_node, psutil.virtual_memory().total / 2**30
        if waiting > host:
            say(f"warning: what this node's ranks offload takes {waiting:.0f} GiB of host memory, and it has {host:.0f}")

    def _settle_up(self) -> None:
        """Show what the phases took of the first rank's device beside what was predicted."""
        self.roles.parking.measure()
        if self.mesh.rank == 0 and self.roles.parking.peaks:
            say(self.ledger.table(self.roles.parking.peaks, self.mesh.pp_rank))


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and after the last, happens now."""
    return done == steps or bool(every and done % every == 0)


def dtype_of(config: Config, mesh: Mesh) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]


def checked_ledger(config: Config, mesh: Mesh, given: Inputs, dtype: torch.dtype) -> Ledger:
    """The memory ledger of this run on these devices. Raises UserError where it does not fit."""
    ledger = Ledger(config, given.arch, given.roles, mesh.world, config.memory.device or capacity(mesh.device), dtype.itemsize)
    ledger.check(unused(mesh.device))
    return ledger


def build_engine(config: Config, mesh: Mesh, given: Inputs, dtype: torch.dtype, load: bool = False) -> Engine:
    """The engine of this rank; with load it reads the policy's folder, otherwise its weights come by publish()."""
    tp, engine = config.rollout.tp, config.rollout.engine
    built: Engine
    if engine == "kvcache":
        from rlhf.rollout.kvcache import KVCache

        built = KVCache(
            given.arch,
            tp=tp,
            tp_rank=mesh.rank % tp,
            group=mesh.subgroup(tp),
            dtype=dtype,
            device=mesh.device,
            max_len=config.data.max_tokens,
        )
    else:
        from rlhf.rollout.vllm import VLLM

        built = VLLM(
            str(files.described(config.policy.load, config.policy.tokenizer)),
            given.arch,
            tp=tp,
            dtype=str(dtype).removeprefix("torch."),
            seed=config.seed,
            max_len=config.data.max_tokens,
            memory=config.rollout.memory,
            cache=config.rollout.cache,
            load=load and not files.is_checkpoint(config.policy.load),
        )
    if load and (engine == "kvcache" or files.is_checkpoint(config.policy.load)):  # vLLM reads a Hugging Face folder by itself
        files.read(config.policy.load, given.arch, names.tiles(given.arch, "vllm", (mesh.rank % tp, tp)), built.parameters())
    return built


def evaluate_folder(config: Config, mesh: Mesh, given: Inputs, judge: Rewards) -> None:
    """Mode evaluate: the engine loads the folder by itself, and nothing is trained."""
    dtype = dtype_of(config, mesh)
    ledger = checked_ledger(config, mesh, given, dtype)
    engine = build_engine(config, mesh, given, dtype, load=True)
    sampler = Sampler(config, mesh, engine, None, given.tokenizer, partial(reward, judge, mesh), given.records)
    metrics = Metrics(config, mesh, start=-1)
    if mesh.rank == 0:
        say(f"{given.records.counts} of {config.data.eval}")
    samples = sampler.answer(given.records.head(config.evaluate.prompts), sampler.reward)
    engine.sleep()
    if given.roles:
        Roles(config, mesh, given.roles, dtype, 1.0, Parking(ledger.offload, mesh.device)).judge(samples)
    report(config, mesh, samples)
    metrics.add_common({f"eval_{name}": pair for name, pair in summary(samples).items()})
    metrics.write(config.steps)


def reward(rewards: Rewards, mesh: Mesh, samples: list[Sample]) -> None:
    """Score sampled responses in place. The first failure on each node is shown; all are counted."""
    if not rewards.spec:  # the reward model alone will say
        for sample in samples:
            sample.meta["failed"] = False
        return
    silent = not rewards.failure and mesh.is_first_on_node
    scores = rewards.score([(s.meta["prompt"], s.meta["response"], s.meta["record"]) for s in samples])
    for sample, score in zip(samples, scores, strict=True):
        sample.reward, sample.meta["failed"] = score.value, score.failed
    if silent and rewards.failure:
        say(f"a reward failed and counts as 0 (see reward_failed in metrics.jsonl):\n{textwrap.indent(rewards.failure, '    ')}")


def report(config: Config, mesh: Mesh, samples: list[Sample]) -> None:
    """A few rollouts to read."""
    if mesh.rank:
        return
    for sample in samples[: config.evaluate.show]:
        text = f"{sample.meta['prompt']} => {sample.meta['response']}" + (" [cut]" if sample.truncated else "")
        say(textwrap.indent(f"reward {sample.reward:g} | {text}", "    "))
