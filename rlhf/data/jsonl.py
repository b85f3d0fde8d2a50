"""Reads the lines of jsonl files, plain or compressed with gzip."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from rlhf import texts
from rlhf.errors import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def files(path: Path) -> list[Path]:
    """Return the file, or the data files of the folder in order of their names. Raises UserError if there is none."""
    if not path.is_dir():
        if not path.exists():
            remedy = texts.download(str(path), "dataset") or "give a jsonl file or a folder of them"
            raise UserError(f"data set {path}: no such file or folder; {remedy}")
        return [texts.regular(path)]
    found = sorted(texts.regular(file) for file in path.iterdir() if file.name.endswith(SUFFIXES))
    if not found:
        none = f"no file in this folder ends in {', '.join(SUFFIXES)}"
        raise UserError(f"data set {path}: {none}; give a jsonl file or a folder of them")
    return found


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("file:line", content) of every line that is not blank. Raises UserError for a file that cannot be read."""
    for file in files(path):
        try:
            with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield f"{file}:{number}", line
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: cannot be read ({error}); copy the file again") from None
