"""The loop that all modes share: take samples, score, credit, learn, publish the weights, evaluate, log, save."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from rlhf import folders, progress
from rlhf.checkpoint import Checkpoints
from rlhf.config import Config, Optim
from rlhf.contracts import Algorithm, Sample, rewarded
from rlhf.data.shares import costs, redeal
from rlhf.errors import RewardError, SpoiltError
from rlhf.evaluate import Evaluation
from rlhf.interrupt import Interrupt
from rlhf.metrics import Metrics
from rlhf.parallel.mesh import Mesh
from rlhf.phases import Phase
from rlhf.report.background import Reporter
from rlhf.roles import Roles
from rlhf.rollout.source import Source
from rlhf.train.optimizer import learning_rate


@dataclass(slots=True)
class Run:
    """A training run on this rank. rlhf.assemble builds it."""

    config: Config
    mesh: Mesh
    start: int  # number of steps done by the checkpoint that the run resumes from; 0 for a new run
    algorithm: Algorithm
    source: Source
    roles: Roles
    evaluation: Evaluation | None  # None: nothing is held out
    checkpoints: Checkpoints
    export: Callable[[Path], None]  # writes the trained model to a folder; the name of the folder is the format
    interrupt: Interrupt
    metrics: Metrics
    report: Reporter
    # samples of this replica's share of the step; before a save, the outputs of all models on them must be finite
    probe: list[Sample] = field(default_factory=list)

    def train(self) -> bool:
        """Run the steps from `start` on. Return False if a signal stopped the run before its last step."""
        config, metrics, start = self.config, self.metrics, self.start
        progress.begin("before the first step")
        self.offer(start, check=True)
        if self.evaluation and start == 0:
            self.evaluation(metrics)
            metrics.write(0)
            self.report.update()
        done = start
        for step in range(start, config.steps):
            try:
                stop = self.whole_step(step)
            except FloatingPointError as error:
                self.checkpoints.settle(wait=True)
                raise SpoiltError(f"step {step + 1}: {error}; nothing of it is saved. {self._advice(step)}") from None
            except RewardError:
                self.checkpoints.settle(wait=True)
                raise
            done = step + 1
            if stop:
                break
        self.checkpoints.settle(wait=True)
        return done >= config.steps

    def whole_step(self, step: int) -> bool:
        """Run one step, counted from 0, with evaluation, metrics and checkpoint. Return whether a signal came.

        Raises FloatingPointError if values of a model are no longer finite. It is raised before anything is saved.
        """
        config, metrics, done = self.config, self.metrics, step + 1
        progress.begin(f"step {done}")
        metrics.begin()
        tokens = self.step(step, check=step == self.start)
        evaluated = due(done, config.evaluate.every, config.steps) and self.evaluation is not None
        if self.evaluation and evaluated:
            with metrics.time("evaluate"):
                self.evaluation(metrics)
        metrics.add(
            {f"memory/{place}": (gib, 1.0) for place, gib in self.roles.residence.take_peaks().items()}
        )  # mean over ranks
        metrics.add_common({"time/switch": (self.roles.residence.take_seconds(), 1.0)})  # included in the other times
        metrics.write(done, tokens)
        if evaluated and done < config.steps:
            self.report.update()
        self.checkpoints.settle()
        stop = any(self.mesh.all_gather(self.interrupt.came))  # a signal to one rank stops all after the same step
        if stop or due(done, config.checkpoint.every, config.steps):
            self.save(done)
        return stop

    def step(self, step: int, check: bool) -> int:
        """Run one step, counted from 0: rollout, score, learn, publish.

        Return the number of tokens of this replica's share of the samples.
        """
        metrics = self.metrics
        with metrics.time("rollout"):
            drawn, sums = self.source.take(step)
            metrics.add_common(sums)
        samples = rewarded(drawn)
        with metrics.time("score"):
            self.roles.score(samples, self.algorithm.streams)
            self.roles.grade(samples)
            metrics.add_share(self.source.describe(drawn))
        if any(self.mesh.all_gather(bool(samples))):
            samples, sums = self.algorithm.credit(samples, self.mesh.total)
            metrics.add_share(sums)
        metrics.keep("train", drawn)
        self.probe = drawn[:2]
        with metrics.time("learn"):
            self.learn(samples, step)
        with metrics.time("publish"):
            self.offer(step + 1, check)
        return sum(len(s.tokens) for s in drawn)

    def learn(self, samples: list[Sample], step: int) -> None:
        """Make batch.epochs passes over the samples, each with batch.minibatches updates, for one role at a time.

        `samples` is the share of this replica. Each update has its own deal of its groups to the replicas.
        """
        algorithm, known = self.algorithm, costs(self.mesh, samples, self.roles.hidden)
        parts = [part for epoch in range(self.config.batch.epochs) for part in self._minibatches(known, step, epoch)]
        batches = redeal(self.mesh, samples, known, parts)
        for role, _ in self.roles.visit(Phase.LEARN) if known else ():
            begin = algorithm.warmup.get(role, 0)  # the role's first update; its learning-rate schedule starts here
            updates = (self.config.steps - begin) * len(batches)
            for i, (part, batch) in enumerate(zip(parts, batches, strict=True)):
                if part and step >= begin:
                    lr = learning_rate(self._optim(role), (step - begin) * len(batches) + i, updates)
                    self.metrics.add(
                        self.roles.learn(role, batch, partial(algorithm.loss, role), algorithm.whole_groups, lr)
                    )
            self.roles.check(role)

    def offer(self, version: int, check: bool) -> None:
        """Give the source the weights after `version` steps. The next samples are generated with them."""
        self.source.offer(self.roles.learners[self.roles.subject].parameters(), version, check)

    def save(self, done: int) -> None:
        """Begin the checkpoint after `done` steps. checkpoints.settle() completes it.

        Raises FloatingPointError, before anything is written, if a model or the state of the mode is not finite.
        """
        self.roles.check_all(self.probe)
        if not all(map(math.isfinite, self.algorithm.state.values())):
            raise FloatingPointError(f"the state of {self.config.mode} is no longer finite: {self.algorithm.state}")
        export = self.export if self.config.checkpoint.export or done == self.config.steps else None
        self.checkpoints.save(done, self.roles.visit(Phase.SAVE), self.algorithm.state, export, self.source.state())

    def _minibatches(self, known: Collection[int], step: int, epoch: int) -> list[list[int]]:
        """Return the groups of each update of one pass. Each pass shuffles all groups, `known`, anew."""
        order = np.random.default_rng((self.config.seed, step, epoch)).permutation(sorted(known))
        return [sorted(part.tolist()) for part in np.array_split(order, self.config.batch.minibatches)]

    def _advice(self, step: int) -> str:
        """Return the advice for a step after which a model is no longer finite."""
        keys = "a lower optim.lr" + ("" if self.config.optim.eps else ", or optim.eps above 0")
        last = self.checkpoints.last
        if not last:
            return f"No checkpoint was made before: start again with {keys}"
        if step > int(last.name.removeprefix("step_")):
            return f"The last good checkpoint is {last}: start again with {keys}, and the run continues from it"
        return f"It is the first step after {last}: start again with {keys}, or go back further; {folders.remedy(last)}"

    def _optim(self, role: str) -> Optim:
        own = self.config.critic.lr if role == "critic" else 0.0
        return replace(self.config.optim, lr=own or self.config.optim.lr)


def due(done: int, every: int, steps: int) -> bool:
    """Return whether an action is due after `done` steps: every `every` steps (0: never), and after the last step."""
    return done == steps or bool(every and done % every == 0)
