"""The common part of Megatron's formats: a folder per iteration, a tracker file, and args.

The tracker file names the complete iteration.

latest_checkpointed_iteration.txt   the tracker file: a number, or `release`
iter_0000001/                       rank files (rank_files.py) or sharded tensors (torch_dist.py)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlhf import texts
from rlhf.errors import UserError
from rlhf.model.architecture import Architecture
from rlhf.weights.formats import args
from rlhf.weights.formats.format import Contents, Format, Target

TRACKER = "latest_checkpointed_iteration.txt"
DIGITS = 9  # largest number of digits of an iteration
NAME = "name the iteration that is complete"
RANKS, METADATA = "mp_rank_*", ".metadata"  # the folder of an iteration contains one of the two


@dataclass(frozen=True, slots=True)
class MegatronContents(Contents):
    """One iteration of a Megatron checkpoint."""

    tp: int = 1
    pp: int = 1

    @property
    @abstractmethod
    def vocab(self) -> int:
        """Rows of the embedding over all ranks, including padding."""

    def architecture(self) -> Architecture:
        return args.architecture(self, self.vocab)

    def check(self, arch: Architecture) -> None:
        if self.vocab < arch.vocab:
            raise UserError(f"{self.path}: a vocabulary of {self.vocab} rows, but config.json asks for {arch.vocab}")
        if arch.layers % self.pp:
            what = f"{self.pp} pipeline stages cannot share config.json's {arch.layers} layers evenly"
            raise UserError(f"{self.path}: {what}")


class Megatron(Format):
    """A format whose folders contain iterations."""

    pads, needs_config = True, False
    sign: ClassVar[str]  # glob pattern of a name in the folder of an iteration

    def owns(self, folder: Path, iteration: int | None = None) -> bool:
        return any(True for place in _candidates(folder, iteration) for _ in place.glob(self.sign))

    def config_folders(self, folder: Path, beside: Path | None) -> list[Path]:
        return [folder, *([folder.parent] if _is_iteration(folder) else []), *([beside] if beside else [])]

    def finish(self, target: Target, folder: Path, config: Mapping[str, Any]) -> None:
        texts.save(folder / "config.json", config)
        partial = folder / f"{TRACKER}.partial"
        partial.write_text(str(target.iteration))
        partial.rename(folder / TRACKER)


def title(iteration: int) -> str:
    """Return the name of the folder of an iteration."""
    return f"iter_{iteration:07}"


def iteration_folder(folder: Path, iteration: int | None) -> Path:
    """Return the folder of the given iteration, or of the tracker file's. Raises UserError if it does not exist."""
    if _is_iteration(folder):
        return folder
    if iteration is not None:
        wanted = title(iteration)
    elif (folder / TRACKER).exists():
        wanted = _tracked(folder)
        if not wanted:
            what = f"{texts.read(folder / TRACKER, NAME).strip()[:40]!r} is neither a number nor release"
            raise UserError(f"{folder / TRACKER}: {what}: {NAME}")
    else:
        found = ", ".join(sorted(child.name for child in folder.glob("iter_*")))
        what = f"no {TRACKER}, so {found} may be incomplete"
        raise UserError(f"{folder}: {what}; give a complete one of these folders")
    if not (folder / wanted).is_dir():
        there = ", ".join(sorted(child.name for child in folder.iterdir() if child.is_dir()))
        raise UserError(f"{folder}: no folder {wanted}; there are {there}")
    return folder / wanted


def number(tree: Mapping[str, Any]) -> int:
    """Return the iteration that a checkpoint's own files state; 0 if it is not a number, as in a release."""
    found = tree.get("iteration")
    return found if isinstance(found, int) else 0


def _tracked(folder: Path) -> str:
    """Return the name of the folder that the tracker file names; "" if there is no such file or its text is invalid."""
    text = texts.read(folder / TRACKER, NAME).strip() if (folder / TRACKER).exists() else ""
    if text.isdecimal() and len(text) <= DIGITS:
        return title(int(text))
    return text if text == "release" else ""


def _candidates(folder: Path, iteration: int | None) -> list[Path]:
    """Return the folders that may be read: the requested or tracked iteration, or all iterations if it is not found."""
    if _is_iteration(folder):
        return [folder]
    wanted = _tracked(folder) if iteration is None else title(iteration)
    return [folder / wanted] if wanted and (folder / wanted).is_dir() else sorted(folder.glob("iter_*"))


def _is_iteration(folder: Path) -> bool:
    return any(True for sign in (RANKS, METADATA) for _ in folder.glob(sign))
