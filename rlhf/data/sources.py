"""The names of several data sets of one key, as in data.train=[math=a.jsonl, chat=b.jsonl]."""

import re
from collections.abc import Sequence
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


def _stem(path: Path) -> str:
    """Return the default name of a data set. Metrics and keys contain it, so it has only letters, digits, - and _."""
    name = path.absolute().name
    stem = next((name.removesuffix(suffix) for suffix in lines.SUFFIXES if name.endswith(suffix)), name)
    return re.sub(r"[^\w-]+", "-", stem).strip("-") or "data"
