"""The models of a run by role (policy, reference, reward, critic) on this rank: built, asked, trained and exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf.config import Config
from rlhf.contracts import Batch, Loss, Output, Sample, Sums, scored
from rlhf.data.packing import plan
from rlhf.model.architecture import Architecture
from rlhf.parallel.mesh import Mesh, portion
from rlhf.phases import Phase
from rlhf.prepare import Role
from rlhf.residence import Residence
from rlhf.train.learner import Learner
from rlhf.weights import export, files, initial, names
from rlhf.weights.entries import UNSOUND

LossFunction = Callable[[Batch, Output], Loss]
SCORED_BY = {"old_logp": "policy", "ref_logp": "reference", "values": "critic"}  # stream -> role


class Roles:
    """Every role's learner, taking turns on the device. Samples go in whole and alike on every rank; replicas share the work."""

    def __init__(self, config: Config, mesh: Mesh, roles: dict[str, Role], dtype: torch.dtype, temperature: float, residence: Residence):
        self.config, self.mesh, self.roles, self.dtype, self.temperature = config, mesh, roles, dtype, temperature
        self.residence = residence
        self.learners: dict[str, Learner] = {}
        for name, role in roles.items():
            self.learners[name] = self._learner(role)
            mesh.agree("" if self.learners[name].sound() else f"{role.folder}: {UNSOUND}")  # now: what is offloaded leaves at once
            residence.add(name, self.learners[name])
        self.trained = [name for name, role in roles.items() if role.use == "train"]
        self._plan = lru_cache(maxsize=16)(plan)  # a step asks for the same cut for each stream, role and pass; the next one does not

    @property
    def subject(self) -> str:
        """The role that the run is for."""
        return self.trained[0]

    def tilings(self, arch: Architecture) -> list[list]:
        """The tiles of every rank's training shard."""
        return names.tilings(arch, "megatron", self.mesh.world, self.config.parallel.tp, self.config.parallel.pp)

    def visit(self, phase: Phase) -> Iterator[tuple[str, Learner]]:
        """The trained roles, one after another, each made resident for the phase."""
        for name in self.trained:
            self.residence.enter(phase, name)
            yield name, self.learners[name]

    def read(self, name: str, samples: Sequence[Sample]) -> list[np.ndarray]:
        """A role's stream [L] (log-probs, or values) of every sample, in order, on every rank."""
        self.residence.enter(Phase.SCORE, name)
        indexed = {id(sample): i for i, sample in enumerate(samples)}
        cut = self._cut(name, samples, whole_groups=False)
        mine = portion(self.learners[name].score(cut[self.mesh.dp_rank]), *self.mesh.place_in_replica)
        spoken: list[list[np.ndarray]] = [[] for _ in cut]
        for replica, part in self.mesh.all_gather((self.mesh.dp_rank, mine)):
            spoken[replica] += part
        streams: list[np.ndarray] = [np.empty(0)] * len(samples)
        for bins, said in zip(cut, spoken, strict=True):
            for sample, stream in zip((s for b in bins for s in b), said, strict=True):
                streams[indexed[id(sample)]] = stream
        return streams

    def score(self, samples: Sequence[Sample], streams: Sequence[str]) -> None:
        """Write these streams of every sample, each by the role that it comes from."""
        for stream in streams:
            for sample, values in zip(samples, self.read(SCORED_BY[stream], samples), strict=True):
                setattr(sample, stream, values)

    def judge(self, samples: Sequence[Sample]) -> None:
        """Add the reward model's score of each whole text to its reward, where the run has such a model; the verdict keeps it apart."""
        if "reward" not in self.learners or "reward" in self.trained:
            return
        for sample, stream in zip(samples, self.read("reward", [scored(s) for s in samples]), strict=True):
            sample.verdict = replace(sample.verdict, score=float(stream[-1]))
            sample.reward += float(stream[-1])

    def learn(self, name: str, samples: Sequence[Sample], loss: LossFunction, whole_groups: bool, lr: float) -> Sums:
        """One optimizer update of a role that is being visited; this rank's part of the metrics."""
        sums = self.learners[name].learn(self._cut(name, samples, whole_groups)[self.mesh.dp_rank], loss, lr)
        return sums if name == self.subject else {f"{name}_{metric}": pair for metric, pair in sums.items()}

    def check(self, name: str) -> None:
        """Raises FloatingPointError, on all ranks, where updates of a role that is being visited have ruined its weights."""
        if not all(self.mesh.all_gather(self.learners[name].sound())):
            raise FloatingPointError(f"the {name}'s weights are no longer finite, or beyond all bounds")

    def check_all(self, samples: Sequence[Sample]) -> None:
        """As check(), of all that a checkpoint keeps, and of what the trained roles say of samples."""
        for name, learner in self.visit(Phase.SAVE):
            if not all(self.mesh.all_gather(learner.sound(optimizer=True))):
                raise FloatingPointError(f"the {name}'s weights or its optimizer's state are no longer finite")
            if not all(np.isfinite(stream).all() for stream in (self.read(name, samples) if samples else ())):
                raise FloatingPointError(f"what the {name} says of this step's samples is no longer finite")

    def evaluate(self, name: str, samples: Sequence[Sample], loss: LossFunction, whole_groups: bool) -> Sums:
        """The metrics of a loss, without learning; this rank's part."""
        self.residence.enter(Phase.SCORE, name)
        return self.learners[name].evaluate(self._cut(name, samples, whole_groups)[self.mesh.dp_rank], loss)

    def export(self, name: str, folder: Path, format: str) -> None:
        """Write a role's model as a folder in one of rlhf.weights.formats.FORMATS: a causal language model, or a classifier of one label.

        Every rank calls it.
        """
        role, layout = self.roles[name], self.mesh.layout
        self.residence.enter(Phase.SCORE, name)
        export.write(
            folder,
            replace(role.arch, lm=not role.arch.scalar),  # the output layer that trained beside a scalar head stays behind
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

    def _cut(self, name: str, samples: Sequence[Sample], whole_groups: bool) -> list[list[list[Sample]]]:
        """Everybody's micro-batches, by data-parallel rank."""
        lengths, group = tuple(len(s.mask) for s in samples), tuple(s.group for s in samples)
        hidden = self.roles[name].arch.hidden
        cut = self._plan(lengths, group, self.mesh.layout.dp, hidden, self.config.batch.tokens, whole_groups)
        return [[[samples[i] for i in items] for items in bins] for bins in cut]


def describe(config: dict, arch: Architecture) -> dict:
    """config.json of a model of this architecture, from that of the folder it was loaded from."""
    if not arch.scalar:
        return config
    name = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    return {**config, "architectures": [name], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
