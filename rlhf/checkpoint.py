"""Writes and loads checkpoints. A run resumes from one at any parallel layout.

At the layout of the checkpoint, the results are bitwise equal. At another layout, weights and optimizer state are
bitwise equal as whole tensors, and the next steps are equal up to rounding.

    out/step_000100/meta.json           step, layout, seed, dtype, algorithm's state; size and checksum of every file
                    ROLE_rank*.safetensors  weights and optimizer state of a trained role on one rank (weights.shards)
                    random_rank*.pt     the random state of one rank
                    flight.pt           the groups in flight of all engines (rollout.inflight > 1)
                    hf/, mcore/, ...    exports of the policy (or reward model) (checkpoint.export, checkpoint.format)
    out/latest                          name of the newest complete folder
    out/hf, out/mcore, ...              links to the newest exports

A folder is written under a temporary name, on a thread of each rank (rlhf.writer), while the run goes on. At the end of
a later step, when all ranks have written their files, it is renamed and `latest` is replaced. rlhf.folders chooses the
folder to resume from and the folders to delete.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf import folders
from rlhf.config import Config
from rlhf.errors import UserError, failure
from rlhf.identity import OTHER_RUN
from rlhf.output import say
from rlhf.parallel.layout import Layout, Place
from rlhf.parallel.mesh import Mesh
from rlhf.train.learner import Learner
from rlhf.writer import Files, Writer

FLIGHT = "flight.pt"
REMARK = "so the next steps are equal up to rounding, and random states begin again from the seed"


@dataclass(frozen=True, slots=True)
class Saving:
    """A save in flight."""

    step: int
    state: dict[str, float]  # of the algorithm
    formats: Sequence[str]  # exports
    exported: Files  # files of the exports, of which this rank has computed the checksums


class Checkpoints:
    """The checkpoints of one run, on storage that all ranks share."""

    def __init__(self, config: Config, mesh: Mesh, dtype: torch.dtype, run: Mapping[str, Any] | None = None):
        """run: the identity of the run (rlhf.identity), which is saved in every checkpoint."""
        self.keep, self.formats, self.mesh = config.checkpoint.keep, config.checkpoint.format, mesh
        self.out = Path(config.out)
        self.last: Path | None = None  # the complete folder that was loaded or saved last
        self.saving: Saving | None = None
        self.deletion: Future[None] | None = None  # of old folders
        background = config.checkpoint.background
        self.writer = Writer(background, mesh.device, mesh.ranks_per_node, told=mesh.rank == 0)
        self.run = {"run": run or {}, "steps": config.steps}
        self.meta = {"mode": config.mode, "seed": config.seed, "dtype": str(dtype)}
        self.layout = {**asdict(mesh.layout), "zero": config.parallel.zero}

    def resume(self, learners: Iterable[tuple[str, Learner]], state: dict[str, float]) -> int:
        """Load the newest checkpoint into the trained learners and the algorithm's state.

        Return the number of steps done; 0 if there is no checkpoint. Raises UserError if the checkpoint is damaged or
        was saved with another seed, dtype or mode.
        """
        folder, remark = folders.newest(self.out)
        if folder is None:
            return 0
        if remark and self.mesh.rank == 0:
            say(remark)
        meta = folders.meta(folder)
        for key, value in self.meta.items():
            if meta[key] != value:
                raise UserError(f"{folder} was saved with {key}={meta[key]}, this run has {value}: {OTHER_RUN}")
        before = {key: meta[key] for key in self.layout}
        if before != self.layout and self.mesh.rank == 0:
            say(f"{folder.name} was saved at {_axes(before)}; the run continues at {_axes(self.layout)}, {REMARK}")
        # Each list is ordered by rank. So a rank checks the files that it reads if the layout is the same.
        self._check(folder, *self._share(_ranked(meta, "random")), *self._share(folders.exported(folder)))
        for role, learner in learners:
            files = _ranked(meta, role)
            if not files:
                raise UserError(f"{folder} was saved by an older version of rlhf: continue with it, or set another out")
            self._check(folder, *self._share(files))
            learner.load([(folder / name, place) for name, place in self._sorted(files, before)])
        if before == self.layout:
            random = torch.load(folder / self._random(), weights_only=True)
            torch.set_rng_state(random["cpu"])
            if "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"])
        state.update(meta["state"])
        self.last = folder
        return meta["step"]

    def flight(self) -> dict[str, Any] | None:
        """Return the saved state of the groups in flight of the loaded checkpoint; None if it has none."""
        if not self.last or not (self.last / FLIGHT).exists():
            return None
        self._check(self.last, FLIGHT)
        return torch.load(self.last / FLIGHT, weights_only=True)

    def save(
        self,
        step: int,
        learners: Iterable[tuple[str, Learner]],
        state: dict[str, float],
        export: Callable[[Path], None] | None = None,
        flight: dict[str, Any] | None = None,
    ) -> None:
        """Begin to write the folder of a step. settle() completes it.

        Before, it waits for the save in flight, if there is one. The learners may change when it returns. Exports are
        complete then. Every rank calls it. `flight` is the state of the groups in flight, identical on every rank.
        """
        self._settle_files(wait=True)
        partial = self._folder(step).with_suffix(".partial")
        if self.mesh.rank == 0:
            for old in self.out.glob("step_*.partial"):  # left by killed runs
                shutil.rmtree(old, ignore_errors=True)
            partial.mkdir(parents=True)
        self.mesh.barrier()
        for role, learner in learners:
            if self.layout["zero"] or self.mesh.dp_rank == self.mesh.cp_rank == 0:
                self.writer.add(partial / f"{role}_rank{self.mesh.rank}.safetensors", learner.state())
        random = {"cpu": torch.get_rng_state()}
        if self.mesh.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        self._add(partial / self._random(), random)
        if flight and self.mesh.rank == 0:
            self._add(partial / FLIGHT, flight)
        exported: Files = {}  # of this rank's share
        formats = self.formats if export else ()
        if export:
            for name in formats:
                export(partial / name)
            self.mesh.barrier()  # several ranks have written these files
            exported = folders.checksums(partial, self._share(folders.exports(partial, formats)))
        self.saving = Saving(step, dict(state), formats, exported)

    def settle(self, wait: bool = False) -> None:
        """Complete the save in flight if all ranks have written its files. Every rank calls it.

        Set `latest` to its folder, and begin to delete old folders (checkpoint.keep). wait: wait for the files, and
        until the old folders are deleted. Raises OSError if a file could not be written.
        """
        self._settle_files(wait)
        if wait and self.deletion:
            self.deletion.result()

    def _settle_files(self, wait: bool) -> None:
        if self.saving and (wait or all(self.mesh.all_gather(self.writer.done()))):
            saving, self.saving = self.saving, None
            # This gather waits for the files of all ranks.
            files = self.mesh.all_gather(self.writer.take() | saving.exported)
            if self.mesh.rank == 0:
                self._complete(saving, {name: file for each in files for name, file in each.items()})
            self.last = self._folder(saving.step)
            self.mesh.barrier()

    def _complete(self, saving: Saving, files: Files) -> None:
        """Rename the folder, and set `latest` and the links to it. Delete old folders on the writer's thread."""
        folder = self._folder(saving.step)
        partial = folder.with_suffix(".partial")
        meta = {"step": saving.step, "state": saving.state, **self.meta, **self.layout, **self.run, "files": files}
        _write(partial / "meta.json", folders.describe(meta))
        shutil.rmtree(folder, ignore_errors=True)  # exists if the run was resumed from an earlier checkpoint
        partial.rename(folder)
        _replace(self.out / "latest", folder.name)
        for name in saving.formats:
            _link(self.out / name, Path(folder.name) / name)
        if self.deletion:
            self.deletion.result()  # complete, because the thread has written the files after it
        self.deletion = self.writer.call(lambda: folders.retire(self.out, saving.step, self.keep))

    def _folder(self, step: int) -> Path:
        return self.out / f"step_{step:06}"

    def _sorted(self, files: list[str], layout: Mapping[str, int]) -> list[tuple[str, Place]]:
        """Return the files of a role and the places of the ranks that wrote them at a layout.

        The files of this rank's place come first, and of these its own. So at the same layout no other file is read.
        """
        saved, found = Layout(**{axis: layout[axis] for axis in ("tp", "pp", "cp", "dp")}), []
        for name in files:
            rank = int(name.rpartition("_rank")[2].partition(".")[0])
            place = saved.place(rank)
            near = (place.tp[0], place.pp[0]) == (self.mesh.tp_rank, self.mesh.pp_rank)
            found.append((not near, rank != self.mesh.rank, name, place))
        return [(name, place) for *_, name, place in sorted(found, key=lambda each: each[:3])]

    def _random(self) -> str:
        return f"random_rank{self.mesh.rank}.pt"

    def _share(self, names: list[str]) -> list[str]:
        """Return this rank's part of a list. The parts of all ranks are disjoint and cover the list."""
        return names[self.mesh.rank :: self.mesh.world]

    def _check(self, folder: Path, *names: str) -> None:
        """Raise UserError on all ranks if a rank cannot read its files, or if their checksums are wrong."""
        try:
            problem = folders.altered(folder, names)
            problem = problem and f"{problem}; {folders.remedy(folder)}"
        except OSError as error:
            problem = failure(error, folder) or str(error)
        self.mesh.agree(problem)

    def _add(self, path: Path, state: Any) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.writer.add_bytes(path, lambda call: call(buffer.getbuffer()))


def _ranked(meta: Mapping[str, Any], kind: str) -> list[str]:
    """Return the files that ranks wrote for themselves, of a role or of `random`, in order of rank."""
    return [name for name in meta.get("files", {}) if name.startswith(f"{kind}_rank")]


def _axes(layout: Mapping[str, int]) -> str:
    return " ".join(f"{axis} {int(size)}" for axis, size in layout.items())


def _write(path: Path, text: str) -> None:
    with folders.writing(path) as file:
        file.write(text.encode())


def _replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".partial")
    _write(fresh, text)
    fresh.replace(path)


def _link(path: Path, target: Path) -> None:
    fresh = path.with_suffix(".partial")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(path)
