"""The interface of a format: a class that detects, opens and writes folders of weights in this format.

All other code uses formats only through this interface. To add a format, write its class and add it to the table in
rlhf/weights/formats/__init__.py.
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
    """The contents of a folder, read from headers only."""

    path: Path  # the folder; in Megatron's formats, the folder of the iteration
    format: str  # name of the format, as in FORMATS
    layout: str  # in names.LAYOUTS
    shards: list[dict[str, Entry]]  # for each shard: local name -> location of the tensor
    args: dict[str, Any] = field(default_factory=dict)  # Megatron's description of the model, if any
    iteration: int = 0  # 0: unknown
    remarks: list[str] = field(default_factory=list, kw_only=True)  # on files and tensors that are not read
    plain: bool = field(default=False, kw_only=True)  # vLLM, which can read a folder by itself, reads the same tensors

    @abstractmethod
    def tilings(self, arch: Architecture, pad: bool = False) -> list[list[Tile]]:
        """Return the tiles of every shard for a model of arch. pad: also those of padding rows (see names.tiles)."""

    @abstractmethod
    def architecture(self) -> Architecture:
        """Return the architecture that the folder's own files describe. Raises UserError if they do not."""

    def check(self, arch: Architecture) -> None:  # noqa: B027  (most formats have nothing to check)
        """Raise UserError if the folder as a whole cannot hold a model of arch. files.py checks the tensors."""


@dataclass(frozen=True)
class Target:
    """A folder to write.

    tp, pp     the layout of Megatron's rank files; (1, 1) for formats without rank files
    iteration  the number of the iteration, for Megatron's formats
    divisor    the rows of the vocabulary are a multiple of divisor * tp (Megatron-LM's make_vocab_size_divisible_by);
               0: no padding if tp divides the vocabulary, else 128 as in Megatron-LM
    shard      largest number of bytes of tensors in a Hugging Face file (a larger tensor gets a file of its own)
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
        """The tiles of each file, by its path in the folder."""
        return self.format.lay_out(self)

    @property
    def rows(self) -> int:
        """Rows of the padded vocabulary."""
        unit = self.tp * (self.divisor or (1 if self.arch.vocab % self.tp == 0 else 128))
        return -(-self.arch.vocab // unit) * unit


class Format(ABC):
    """One way to store the weights of a model in a folder."""

    split: ClassVar[bool]  # True: one file per tensor-parallel rank and pipeline stage
    pads: ClassVar[bool]  # True: the vocabulary may be padded
    needs_config: ClassVar[bool]  # True: a folder without config.json is incomplete

    def __init__(self, name: str, layout: str):
        """name: the format's name for users. layout: the layout of written folders, in names.LAYOUTS."""
        self.name, self.layout = name, layout

    @abstractmethod
    def owns(self, folder: Path, iteration: int | None = None) -> bool:
        """Return whether the folder, or the given iteration in it, has this format, by the names of its files."""

    @abstractmethod
    def open(self, folder: Path, iteration: int | None = None) -> Contents:
        """Return the contents of a folder. Only headers are read.

        Raises UserError with the name of the file if the folder is incomplete or damaged.
        """

    @abstractmethod
    def lay_out(self, target: Target) -> dict[str, list[Tile]]:
        """Return the tiles of each file of a new folder, by the file's path in the folder."""

    @abstractmethod
    def begin(self, target: Target, path: Path, shapes: Mapping[str, Shape]) -> dict[str, Entry]:
        """Create a file with space for tensors (local name -> shape). Return the locations of their bytes."""

    @abstractmethod
    def finish(self, target: Target, folder: Path, config: Mapping[str, Any]) -> None:
        """Write config.json and the other small files. The file that marks the folder as complete comes last."""

    def config_folders(self, folder: Path, beside: Path | None) -> list[Path]:
        """Return the folders in which config.json may be, in order of precedence.

        beside: a further folder that the user has set.
        """
        return [folder]
