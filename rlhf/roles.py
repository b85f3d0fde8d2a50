"""Builds, runs, trains and exports the models of a run on this rank, by role (policy, reference, reward, critic)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf import progress
from rlhf.config import Config
from rlhf.contracts import SCORED_BY, Batch, Loss, Output, Sample, Sums, scored
from rlhf.data.packing import microbatches, shares
from rlhf.model.architecture import Architecture
from rlhf.parallel.mesh import Mesh
from rlhf.phases import Phase
from rlhf.residence import Residence
from rlhf.shapes import Role
from rlhf.train.learner import Learner
from rlhf.weights import export, files, initial, names
from rlhf.weights.entries import UNSOUND

LossFunction = Callable[[Batch, Output], Loss]


class Roles:
    """The learners of all roles, which use the device one after the other.

    Every rank calls the methods, with its replica's share of the samples. All ranks of a replica have the same share.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        roles: dict[str, Role],
        dtype: torch.dtype,
        temperature: float,
        residence: Residence,
    ):
        self.config, self.mesh, self.roles, self.dtype, self.temperature = config, mesh, roles, dtype, temperature
        self.residence = residence
        self.learners: dict[str, Learner] = {}
        for name, role in roles.items():
            progress.enter(f"loading the {name}")
            self.learners[name] = self._learner(role)
            # checked here, because add() may offload the weights at once
            mesh.agree("" if self.learners[name].sound() else f"{role.folder}: {UNSOUND}")
            residence.add(name, self.learners[name])
        self.trained = [name for name, role in roles.items() if role.use == "train"]

    @property
    def subject(self) -> str:
        """The role that the run trains and exports: the first trained one."""
        return self.trained[0]

    @property
    def hidden(self) -> int:
        """The width of the subject, by which the samples are dealt to the replicas."""
        return self.roles[self.subject].arch.hidden

    def share(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return this replica's share of samples that all ranks have."""
        return shares(samples, self.mesh.layout.dp, self.hidden)[self.mesh.dp_rank]

    def tilings(self, arch: Architecture) -> list[list]:
        """Return the tiles of every rank's training shard."""
        return names.tilings(arch, "megatron", self.mesh.world, self.config.parallel.tp, self.config.parallel.pp)

    def visit(self, phase: Phase) -> Iterator[tuple[str, Learner]]:
        """Yield the trained roles one after the other, each moved to the device as the phase needs it."""
        for name in self.trained:
            self.residence.enter(phase, name)
            yield name, self.learners[name]

    def read(self, name: str, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Return a role's stream [L] (log-probs, or values) of every sample of the share, in order.

        The last value of a reward model's stream is the score.
        """
        self.residence.enter(Phase.SCORE, name)
        samples = self._shown(name, samples)
        cut = self._cut(samples, whole_groups=False)
        streams = {
            id(sample): stream
            for sample, stream in zip((s for b in cut for s in b), self.learners[name].score(cut), strict=True)
        }
        return [streams[id(sample)] for sample in samples]

    def score(self, samples: Sequence[Sample], streams: Sequence[str]) -> None:
        """Compute these streams and write them into the samples."""
        for stream in streams:
            for sample, values in zip(samples, self.read(SCORED_BY[stream], samples), strict=True):
                setattr(sample, stream, values)

    def grade(self, samples: Sequence[Sample]) -> None:
        """Add the reward model's score of each sample to its reward and verdict. Without a reward model, do nothing."""
        if "reward" not in self.learners or "reward" in self.trained:
            return
        for sample, stream in zip(samples, self.read("reward", samples), strict=True):
            sample.verdict = replace(sample.verdict, score=float(stream[-1]))
            sample.reward += float(stream[-1])

    def learn(self, name: str, samples: Sequence[Sample], loss: LossFunction, whole_groups: bool, lr: float) -> Sums:
        """Make one optimizer update of the visited role. Return this rank's part of the metrics."""
        sums = self.learners[name].learn(self._cut(self._shown(name, samples), whole_groups), loss, lr)
        return sums if name == self.subject else {f"{name}_{metric}": pair for metric, pair in sums.items()}

    def check(self, name: str) -> None:
        """Raise FloatingPointError on all ranks if weights of the visited role are not finite or too large."""
        if not all(self.mesh.all_gather(self.learners[name].sound())):
            raise FloatingPointError(f"the {name}'s weights are no longer finite, or are too large")

    def check_all(self, samples: Sequence[Sample]) -> None:
        """Raise FloatingPointError on all ranks if anything that a checkpoint saves is not finite or too large.

        The outputs of the trained roles for `samples` must be finite, too.
        """
        for name, learner in self.visit(Phase.SAVE):
            if not all(self.mesh.all_gather(learner.sound(optimizer=True))):
                raise FloatingPointError(f"the {name}'s weights or its optimizer's state are no longer finite")
            finite = all(bool(np.isfinite(stream).all()) for stream in self.read(name, samples))
            if not all(self.mesh.all_gather(finite)):
                raise FloatingPointError(f"the {name}'s outputs for this step's samples are no longer finite")

    def evaluate(self, name: str, samples: Sequence[Sample], loss: LossFunction, whole_groups: bool) -> Sums:
        """Return this rank's part of the metrics of a loss, without an update."""
        self.residence.enter(Phase.SCORE, name)
        return self.learners[name].evaluate(self._cut(self._shown(name, samples), whole_groups), loss)

    def export(self, name: str, folder: Path, format: str) -> None:
        """Write a role's model to a folder in one of weights.formats.FORMATS. Every rank calls it.

        It is written as a causal language model, or as a classifier with one label if it has a scalar head.
        """
        role, layout = self.roles[name], self.mesh.layout
        self.residence.enter(Phase.SCORE, name)
        export.write(
            folder,
            replace(role.arch, lm=not role.arch.scalar),  # drops the output layer that was trained beside a scalar head
            describe(files.read_config(role.folder, self.config.policy.tokenizer), role.arch),
            self.tilings(role.arch),
            self.learners[name].parameters(),
            rank=self.mesh.rank,
            nodes=self.mesh.nodes(),
            dtype=self.dtype,
            format=format,
            tp=layout.tp,
            pp=layout.pp,
        )

    def _learner(self, role: Role) -> Learner:
        tiles = self.tilings(role.arch)[self.mesh.rank]
        return Learner(
            role.arch,
            self.config,
            self.mesh,
            self.dtype,
            fill=partial(self._fill, role, tiles),
            temperature=self.temperature,
            train=role.use == "train",
        )

    def _fill(self, role: Role, tiles: Sequence, parameters: dict[str, Tensor]) -> None:
        if self.config.policy.init == "random" and role.folder == self.config.policy.load:
            initial.fill(role.arch, tiles, parameters, self.config.seed)
        else:
            files.read(role.folder, role.arch, tiles, parameters)

    def _shown(self, name: str, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Return the samples as a role's model gets them: a reward model gets texts that end where it scores them."""
        return [scored(s, self.roles[name].arch.pad) for s in samples] if name == "reward" else samples

    def _cut(self, samples: Sequence[Sample], whole_groups: bool) -> list[list[Sample]]:
        """Return the micro-batches of this replica. All replicas get the same number."""
        return microbatches(samples, self.config.batch.tokens, whole_groups, self.mesh.largest)


def describe(config: dict, arch: Architecture) -> dict:
    """Return the config.json of a model of this architecture. `config` is that of the folder it was loaded from."""
    if not arch.scalar:
        return config
    name = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    return {**config, "architectures": [name], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
