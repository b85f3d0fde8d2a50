"""The checkpoint folders of a run: chooses the one to resume from, detects damage, deletes old ones. Needs no torch."""

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

from rlhf import progress, texts
from rlhf.errors import STORAGE, UserError

KEYS = {"step", "state", "mode", "seed", "dtype", "zero", "tp", "pp", "cp", "dp"}  # keys that every meta.json has
NAME = re.compile(r"step_(\d{6,})")


def steps(out: Path) -> dict[int, Path]:
    """Return the step folders by step, in ascending order."""
    found = {
        int(match[1]): path for path in out.glob("step_*") if (match := NAME.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def newest(out: Path) -> tuple[Path | None, str]:
    """Return the folder that a run resumes from (None if there is none), and a remark to print ("" if there is none).

    It is the folder that `latest` names. A user may change `latest` to an older folder. If `latest` is missing or names
    a folder that does not exist, it is the newest complete folder. Raises UserError if the named folder is damaged, or
    if no complete folder is left.
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
    why = f"{latest} names {name!r}, which does not exist" if latest.exists() else f"{latest} is missing"
    whole = [folder for folder in there.values() if not damage(folder)]
    if not whole:
        raise UserError(f"{why}, and {out} has no complete checkpoint: delete {out} to start again, or set another out")
    return whole[-1], f"{why}: {whole[-1].name} is the newest complete checkpoint"


def newest_export(folder: Path, formats: Iterable[str]) -> Path | None:
    """Return the newest complete export in the folder of a run, or in one of its step folders; None if there is none.

    Of one step, formats are tried in their order. The links of the run name its newest exports.
    """
    if NAME.fullmatch(folder.name):
        found = [folder / name for name in formats]
    else:
        there, names = [*reversed(steps(folder).values())], [*formats]
        links = [folder / name for name in names if (folder / name).exists()]
        found = [link.parent / link.readlink() if link.is_symlink() else link for link in links]
        found.sort(key=lambda export: export.parent.name, reverse=True)
        found += [step / name for step in there for name in names]
    return next((export for export in found if _is_whole(export)), None)


def _is_whole(export: Path) -> bool:
    """Return whether an export exists, and the files of its step folder have their sizes."""
    return export.is_dir() and not (NAME.fullmatch(export.parent.name) and damage(export.parent))


def meta(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's meta.json. Raises ValueError if it is damaged, and OSError."""
    found = texts.parse(texts.regular(folder / "meta.json").read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not found.keys() >= KEYS:
        raise ValueError("keys are missing")
    crc32 = found.pop("crc32", None)  # checkpoints of older versions have no checksum and no list of files
    if crc32 not in (None, zlib.crc32(json.dumps(found).encode())):
        raise ValueError("its checksum is wrong")
    if not _formed(found):
        raise ValueError("values have the wrong types")
    if found["step"] != int(folder.name.removeprefix("step_")):
        raise ValueError(f"it belongs to step {found['step']}")
    return found


def _formed(meta: Mapping[str, Any]) -> bool:
    """Return whether the values of a meta.json have the right types. Without a checksum, it may have been changed."""
    run = meta.get("run", {})
    try:
        numbers = [
            *meta["state"].values(),
            *(number for file in meta.get("files", {}).values() for number in file.values()),
        ]
        pairs = [
            *({"keys": {}} | run)["keys"],
            *(text for pair in ({"read": {}} | run)["read"].values() for text in pair),
        ]
        sizes = [file["size"] for file in meta.get("files", {}).values()]
    except (AttributeError, LookupError, TypeError):
        return False
    return all(type(number) in (int, float) for number in (*numbers, *sizes)) and all(
        isinstance(text, str) for text in pairs
    )


def describe(meta: Mapping[str, Any]) -> str:
    """Return the text of meta.json, with a checksum of its content."""
    return json.dumps({**meta, "crc32": zlib.crc32(json.dumps(meta).encode())})


class Hashed:
    """A file that is being written. It counts the bytes written so far and computes their checksum."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.crc32 = file, 0, 0
        self.error: OSError | None = None

    @property
    def found(self) -> dict[str, int]:
        """The size and checksum, in the form of `files` in meta.json."""
        return {"size": self.size, "crc32": self.crc32}

    def write(self, data: bytes | memoryview) -> int:
        progress.move()
        self.size, self.crc32 = self.size + len(data), zlib.crc32(data, self.crc32)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save raises another error in its place
            raise

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def writing(path: Path) -> Iterator[Hashed]:
    """Open a new file for writing, and flush it to storage at the end. Raises OSError with the path."""
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
    """Return the files of a checkpoint's exported folders, with their names in meta.json."""
    found = (file for name in formats for file in (folder / name).rglob("*") if file.is_file())
    return sorted(file.relative_to(folder).as_posix() for file in found)


def checksums(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Read files and return their sizes and checksums, in the form of `files` in meta.json."""
    return {name: {"size": (folder / name).stat().st_size, "crc32": checksum(folder / name)} for name in names}


def exported(folder: Path) -> list[str]:
    """Return the files of a checkpoint's exported folders that exist and have a checksum.

    Checkpoints of older versions have no checksums.
    """
    listed = meta(folder).get("files", {})
    return [name for name, file in listed.items() if "/" in name and "crc32" in file and (folder / name).exists()]


def damage(folder: Path) -> str:
    """Return a message about the first file that is missing or has another size; "" if there is none.

    altered() compares checksums.
    """
    try:
        return _incomplete(folder, meta(folder).get("files", {}))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in STORAGE:  # a file that cannot be read now may be intact
            raise
        return f"{folder}/meta.json is damaged ({getattr(error, 'strerror', None) or error})"


def _incomplete(folder: Path, files: Mapping[str, Mapping[str, int]]) -> str:
    """Return a message about the first file that is missing or has another size; "" if there is none.

    Raises OSError or ValueError for a name that no file can have.
    """
    for name, wanted in files.items():
        file = folder / name
        if not file.exists():
            # no error if the whole export is missing: a user may move it elsewhere
            if file.parent == folder or (folder / Path(name).parts[0]).exists():
                return f"{file} is missing"
        elif file.stat().st_size != wanted["size"]:
            return f"{file} is damaged: it has {file.stat().st_size} bytes, {wanted['size']} were written"
    return ""


def altered(folder: Path, names: Iterable[str]) -> str:
    """Return a message about the first of these files with a wrong checksum; "" if there is none. Reads whole files."""
    files = meta(folder).get("files", {})
    for name in names:
        if name in files and checksum(folder / name) != files[name].get("crc32"):
            return f"{folder / name} is damaged: its checksum is wrong"
    return ""


def checksum(path: Path) -> int:
    """Return the checksum of a file. The whole file is read."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            found = zlib.crc32(part, found)
    return found


def retire(out: Path, step: int, keep: int) -> None:
    """Delete all except the newest `keep` folders of steps up to `step`, which has just been written.

    Folders of later steps exist if the user has set `latest` to an earlier step. They are not counted and not deleted.
    Folders that `latest` or a link names are not deleted either.
    """
    there = steps(out)
    targets = [path.resolve() for path in out.iterdir() if path.is_symlink()]
    targets.append((out / (out / "latest").read_text().strip()).resolve())
    held = {folder for folder in there.values() for target in targets if folder.resolve() in (target, *target.parents)}
    for old in [folder for number, folder in there.items() if number <= step][:-keep]:
        if old not in held:
            shutil.rmtree(old)


def remedy(folder: Path) -> str:
    """Return advice for a checkpoint that cannot be resumed from."""
    number = int(folder.name.removeprefix("step_"))
    older = [path for step, path in steps(folder.parent).items() if step < number and not damage(path)]
    if not older:
        return f"no older complete checkpoint is left: delete {folder.parent} to start again, or set another out"
    return f"to resume from the checkpoint before it: echo {older[-1].name} > {folder.parent}/latest"
