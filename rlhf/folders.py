"""The step folders of a run on storage: which one it continues from, whether that is whole, and which ones may go. Needs no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rlhf import texts
from rlhf.errors import STORAGE, UserError

KEYS = {"step", "state", "mode", "seed", "dtype", "zero", "tp", "pp", "cp", "dp"}  # of every meta.json
NAME = re.compile(r"step_(\d{6,})")


def steps(out: Path) -> dict[int, Path]:
    """The step folders that are there, by their step, in its order."""
    found = {int(match[1]): path for path in out.glob("step_*") if (match := NAME.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(found.items()))


def newest(out: Path) -> tuple[Path | None, str]:
    """The folder that a run continues from (None: there is none), and what is to be said of the choice.

    It is the one that `latest` names, which may be an older one: a person may choose. Where `latest` is missing, or names a folder that
    is gone, it is the newest whole one. Raises UserError where that named one is damaged, or where no whole one is left.
    """
    latest = out / "latest"
    name = texts.regular(latest).read_text(errors="replace").strip() if latest.exists() else ""
    if NAME.fullmatch(name) and (out / name).is_dir():
        if problem := damage(out / name):
            raise UserError(f"{problem}; {remedy(out / name)}")
        return out / name, ""
    there = steps(out)
    if not there and not latest.exists():
        return None, ""
    why = f"{latest} names {name!r}, which is not there" if latest.exists() else f"{latest} is missing"
    whole = [folder for folder in there.values() if not damage(folder)]
    if not whole:
        raise UserError(f"{why}, and {out} holds no whole checkpoint: delete {out} to begin again, or set another out")
    return whole[-1], f"{why}: {whole[-1].name} is the newest whole checkpoint"


def meta(folder: Path) -> dict[str, Any]:
    """What describe() was given. Raises ValueError where it is damaged, and OSError."""
    found = texts.parse(texts.regular(folder / "meta.json").read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not found.keys() >= KEYS:
        raise ValueError("it tells no step")
    crc32 = found.pop("crc32", None)  # checkpoints of before have none, nor a list of files
    if crc32 not in (None, zlib.crc32(json.dumps(found).encode())):
        raise ValueError("its checksum is another")
    if not _formed(found):
        raise ValueError("it is not of the form that is written")
    if found["step"] != int(folder.name.removeprefix("step_")):
        raise ValueError(f"it is that of step {found['step']}")
    return found


def _formed(meta: Mapping[str, Any]) -> bool:
    """Whether a description has the types that describe() is given: one without a checksum may have been changed."""
    run = meta.get("run", {})
    try:
        numbers = [*meta["state"].values(), *(number for file in meta.get("files", {}).values() for number in file.values())]
        pairs = [*({"keys": {}} | run)["keys"], *(text for pair in ({"read": {}} | run)["read"].values() for text in pair)]
        sizes = [file["size"] for file in meta.get("files", {}).values()]
    except (AttributeError, LookupError, TypeError):
        return False
    return all(type(number) in (int, float) for number in (*numbers, *sizes)) and all(isinstance(text, str) for text in pairs)


def describe(meta: Mapping[str, Any]) -> str:
    """The text of meta.json, with a checksum of its own."""
    return json.dumps({**meta, "crc32": zlib.crc32(json.dumps(meta).encode())})


class Hashed:
    """A file that is being written, with the size and the checksum of what has been."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.crc32 = file, 0, 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.size, self.crc32 = self.size + len(data), zlib.crc32(data, self.crc32)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save raises another one in its place
            raise

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def writing(path: Path) -> Iterator[Hashed]:
    """A new file, which is on storage in the end. Raises OSError with its path."""
    hashed: Hashed | None = None
    try:
        with path.open("wb") as file:
            hashed = Hashed(file)
            yield hashed
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else hashed and hashed.error
        if not cause:
            raise
        cause.filename = cause.filename or str(path)
        raise cause from None


def exports(folder: Path, formats: Iterable[str]) -> list[str]:
    """The files of a checkpoint's exported folders, as meta.json names them."""
    found = (file for name in formats for file in (folder / name).rglob("*") if file.is_file())
    return sorted(file.relative_to(folder).as_posix() for file in found)


def checksums(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Files that were written in pieces, as `files` of meta.json lists them. Reads them."""
    return {name: {"size": (folder / name).stat().st_size, "crc32": checksum(folder / name)} for name in names}


def exported(folder: Path) -> list[str]:
    """The files of a checkpoint's exported folders that have checksums, which those of before have not, and that are still there."""
    listed = meta(folder).get("files", {})
    return [name for name, file in listed.items() if "/" in name and "crc32" in file and (folder / name).exists()]


def damage(folder: Path) -> str:
    """The first thing that is wrong with a checkpoint, with the file; empty: it is whole, as far as sizes tell."""
    try:
        return _incomplete(folder, meta(folder).get("files", {}))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in STORAGE:  # what may not be read is not damaged
            raise
        return f"{folder}/meta.json is damaged ({getattr(error, 'strerror', None) or error})"


def _incomplete(folder: Path, files: Mapping[str, Mapping[str, int]]) -> str:
    """The first file that is missing, or has another size; empty: none. Raises OSError and ValueError for names that no file has."""
    for name, wanted in files.items():
        file = folder / name
        if not file.exists():
            if file.parent == folder or (folder / Path(name).parts[0]).exists():  # a person may move an exported folder as a whole
                return f"{file} is missing"
        elif file.stat().st_size != wanted["size"]:
            return f"{file} is damaged: it has {file.stat().st_size} bytes, {wanted['size']} were written"
    return ""


def altered(folder: Path, names: Iterable[str]) -> str:
    """The first of these files that is not what was written, by its checksum; empty: they all are. Reads them as a whole."""
    files = meta(folder).get("files", {})
    for name in names:
        if name in files and checksum(folder / name) != files[name].get("crc32"):
            return f"{folder / name} is damaged: its checksum is not that of what was written"
    return ""


def checksum(path: Path) -> int:
    """The checksum of a file, which is read as a whole."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            found = zlib.crc32(part, found)
    return found


def retire(out: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` folders up to a step that has just been written.

    Those of later steps are of a run that somebody went back from: they do not count, and stay. So does what `latest` or a link names.
    """
    there = steps(out)
    targets = [path.resolve() for path in out.iterdir() if path.is_symlink()]
    targets.append((out / (out / "latest").read_text().strip()).resolve())
    held = {folder for folder in there.values() for target in targets if folder.resolve() in (target, *target.parents)}
    for old in [folder for number, folder in there.items() if number <= step][:-keep]:
        if old not in held:
            shutil.rmtree(old)


def remedy(folder: Path) -> str:
    """What to do about a checkpoint that cannot be continued from."""
    number = int(folder.name.removeprefix("step_"))
    older = [path for step, path in steps(folder.parent).items() if step < number and not damage(path)]
    if not older:
        return f"no older whole checkpoint is left: delete {folder.parent} to begin again, or set another out"
    return f"to continue from the whole one before it: echo {older[-1].name} > {folder.parent}/latest"
