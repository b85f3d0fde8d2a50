"""The formats of weights on storage, by the names that users write. Only this file detects the format of a folder."""

from __future__ import annotations

from pathlib import Path

from rlhf.weights.formats.format import Contents, Format, Target
from rlhf.weights.formats.hf import HuggingFace
from rlhf.weights.formats.rank_files import LEGACY, MCORE, MCORE_LOCAL
from rlhf.weights.formats.torch_dist import TorchDist

__all__ = ["FORMATS", "Contents", "Format", "Target", "inspect", "recognise"]

FORMATS: dict[str, Format] = {form.name: form for form in (HuggingFace(), MCORE, MCORE_LOCAL, LEGACY, TorchDist())}


def recognise(folder: str | Path, iteration: int | None = None) -> Format:
    """Return the format of a folder, by the names of its files.

    The default is Hugging Face's format. Later rows of FORMATS are tried first. By their file names, mcore, mcore-local
    and legacy are equal, and legacy is returned. open() finds the exact one, which is in Contents.format.
    """
    return next(form for form in reversed(FORMATS.values()) if form.owns(Path(folder), iteration))


def inspect(folder: str | Path, iteration: int | None = None) -> Contents:
    """Return the contents of a folder. Only headers are read.

    Raises UserError with the name of the file if the folder is incomplete or damaged.
    """
    return recognise(folder, iteration).open(Path(folder), iteration)
