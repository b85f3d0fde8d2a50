"""What a format is: a class that finds, opens and lays out folders of weights. All other code treats formats alike.

To add a format, write its class and add a line to the table in rlhf/weights/formats/__init__.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.model.architecture import Architecture
from rlhf.weights.entries import Entry, Shape
from rlhf.weights.tiles import Tile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Contents(ABC):
    """What a folder holds, found by reading headers only."""

    path: Path  # the folder; for Megatron's formats that of the iteration
    format: str  # name of the format, as in FORMATS
    layout: str  # in names.LAYOUTS
    shards: list[dict[str, Entry]]  # for each shard: local name -> where the tensor is stored
    args: dict[str, Any] = field(default_factory=dict)  # Megatron's own description of the model, if any
    iteration: int = 0  # 0: none is known

    @abstractmethod
    def tilings(self, arch: Architecture, pad: bool = False) -> list[list[Tile]]:
        """The tiles of every shard, if it is a model of arch; with pad, also of padding rows (see names.tiles)."""

    @abstractmethod
    def architecture(self) -> Architecture:
        """The model as the folder's own files describe it. Raises UserError if they do not."""

    def check(self, arch: Architecture) -> None:  # noqa: B027  (most formats have nothing to check)
        """Raise UserError if the folder as a whole cannot hold a model of arch; its tensors are checked elsewhere."""


@dataclass(frozen=True)
class Target:
    """A folder to be written.

    tp, pp     the layout of Megatron's rank files; (1, 1) for formats that are not split over ranks
    iteration  under which Megatron's formats file it
    divisor    the rows of the vocabulary are a multiple of divisor * tp (Megatron-LM's make_vocab_size_divisible_by);
               0: no padding if tp divides the vocabulary, else 128 as in Megatron-LM
    shard      bytes of tensors per Hugging Face file, at most (a larger tensor gets a file of its own)
    """

    format: Format
    arch: Architecture
    dtype: torch.dtype
    tp: int = 1
    pp: int = 1
    iteration: int = 1
    divisor: int = 0
    shard: int = 4 << 30

    def __post_init__(self) -> None:
        assert self.format.split or (self.tp, self.pp) == (1, 1), f"{self.format.name} is not split over ranks"

    @cached_property
    def files(self) -> dict[str, list[Tile]]:
        """Path of a file within the folder -> the tiles that it holds."""
        return self.format.lay_out(self)

    @property
    def rows(self) -> int:
        """Rows of the padded vocabulary."""
        unit = self.tp * (self.divisor or (1 if self.arch.vocab % self.tp == 0 else 128))
        return -(-self.arch.vocab // unit) * unit


class Format(ABC):
    """One way to store the weights of a model in a folder."""

    split: ClassVar[bool]  # into files by tensor-parallel rank and pipeline stage
    pads: ClassVar[bool]  # whether the vocabulary may be padded
    needs_config: ClassVar[bool]  # a folder without config.json is incomplete

    def __init__(self, name: str, layout: str):
        """name: as users write it; layout: of the folders that are written, in names.LAYOUTS."""
        self.name, self.layout = name, layout

    @abstractmethod
    def owns(self, folder: Path, iteration: int | None = None) -> bool:
        """Whether the folder (or that iteration in it) is of this format, by the names of its files."""

    @abstractmethod
    def open(self, folder: Path, iteration: int | None = None) -> Contents:
        """Describe a folder; reads headers only. Raises UserError, naming the file, if it is incomplete or damaged."""

    @abstractmethod
    def lay_out(self, target: Target) -> dict[str, list[Tile]]:
        """The files of a new folder (paths within it), and the tiles that each of them holds."""

    @abstractmethod
    def begin(self, target: Target, path: Path, shapes: Mapping[str, Shape]) -> dict[str, Entry]:
        """Make one file with room for tensors (local name -> shape); returns where their bytes go."""

    @abstractmethod
    def finish(self, target: Target, folder: Path, config: Mapping[str, Any]) -> None:
        """Write config.json and the format's other small files; what marks the folder as complete comes last."""

    def config_folders(self, folder: Path, beside: Path | None) -> list[Path]:
        """Where the config.json of a folder may be, best place first; beside: a folder that the user named for it."""
        return [folder]
