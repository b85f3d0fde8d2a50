"""Several data sets of one key: their names, and how many records of each a run has drawn.

The counts are those of Webster's method (also called Sainte-Lague): the draws of a set with weight w are due at the
times 1/2w, 3/2w, 5/2w, ..., and all draws are made in the order of these times. So in every span of draws the share of
a set differs from its weight's share by a few records at most, and the counts need no state.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import floor
from pathlib import Path

from rlhf.data import lines
from rlhf.errors import UserError

NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)", re.DOTALL)


def named(entries: Sequence[str], key: str) -> dict[str, str]:
    """Return name -> path of the entries of a key, in order. An entry is PATH or NAME=PATH.

    Without NAME, the name is that of the file or folder, without its suffix. A path that exists may contain "=".
    Raises UserError if two data sets have the same name.
    """
    found: dict[str, str] = {}
    for entry in entries:
        match = None if lines.exists(Path(entry)) else NAMED.fullmatch(entry)
        name, path = match.groups() if match else (_stem(Path(entry)), entry)
        if name in found:
            both = f"{key}: {found[name]} and {path} both have the name {name}"
            raise UserError(f"{both}; give one of them another name: OTHER={path}")
        found[name] = path
    return found


def weights(names: Sequence[str], given: Mapping[str, float]) -> list[Fraction]:
    """Return the weight of each data set, as data.weights gives it, else 1. Raises UserError for an unknown name."""
    if unknown := sorted(given.keys() - set(names)):
        known = f"no data set of data.train has this name; its names are {', '.join(names)}"
        raise UserError(f"data.weights.{unknown[0]}: {known}; correct it, or remove it")
    return [Fraction(str(given.get(name, 1))) for name in names]


def percentages(weights: Sequence[Fraction]) -> list[str]:
    """Return the share of the draws of each data set as text."""
    return [f"{float(weight / sum(weights)):.1%}" for weight in weights]


def counts(weights: Sequence[Fraction], draws: int) -> list[int]:
    """Return how many of the first `draws` draws are from each data set. Of equal times, the first set's is first."""
    time = Fraction(max(0, draws - len(weights))) / sum(weights)  # at most `draws` draws are due until then
    found = [floor(weight * time + Fraction(1, 2)) for weight in weights]
    while sum(found) < draws:
        found[min(range(len(found)), key=lambda i: (2 * found[i] + 1) / weights[i])] += 1
    return found


def epoch(weights: Sequence[Fraction], sizes: Sequence[int]) -> tuple[int, Fraction]:
    """Return the index of the data set of which one pass takes the most draws, and the number of these draws."""
    passes = [size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True)]
    return passes.index(max(passes)), max(passes)


def _stem(path: Path) -> str:
    """Return the default name of a data set. Metrics and keys contain it, so it has only letters, digits, - and _."""
    name = path.absolute().name
    stem = next((name.removesuffix(suffix) for suffix in lines.SUFFIXES if name.endswith(suffix)), name)
    return re.sub(r"[^\w-]+", "-", stem).strip("-") or "data"
