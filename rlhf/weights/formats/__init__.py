"""The formats of weights on storage, by the names that users write. This file alone decides which one a folder has."""

from __future__ import annotations

from pathlib import Path

from rlhf.weights.formats.format import Contents, Format, Target
from rlhf.weights.formats.hf import HuggingFace
from rlhf.weights.formats.rank_files import LEGACY, MCORE, MCORE_LOCAL
from rlhf.weights.formats.torch_dist import TorchDist

__all__ = ["FORMATS", "Contents", "Format", "Target", "inspect", "recognise"]

FORMATS: dict[str, Format] = {form.name: form for form in (HuggingFace(), MCORE, MCORE_LOCAL, LEGACY, TorchDist())}


def recognise(folder: str | Path, iteration: int | None = None) -> Format:
    """The format of a folder, by the names of its files.

    A folder of no known format counts as Hugging Face's. The three formats of rank files have the same file names, so
    one of them stands for all; Contents.format, which is read from the files, is exact.
    """
    return next(form for form in reversed(FORMATS.values()) if form.owns(Path(folder), iteration))


def inspect(folder: str | Path, iteration: int | None = None) -> Contents:
    """What a folder holds. Reads headers only. Raises UserError, naming the file, if it is incomplete or damaged."""
    return recognise(folder, iteration).open(Path(folder), iteration)
