"""Finds the files of a data set, and reads their lines.

A line is the JSON text of one object: a line of a jsonl file, an element of a JSON array, or a row of a table.
"""

import fnmatch
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlhf import texts
from rlhf.data import tables
from rlhf.errors import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", *tables.SUFFIXES)
REFUSED = (".csv", ".tsv", ".xlsx", ".zip", ".tar", ".tgz", ".zst", ".xz", ".bz2", ".pkl")
WANTED = "give a jsonl, JSON or parquet file, a folder of them, or a folder that datasets has saved"
# Files of a folder that describe its data: of datasets' save_to_disk, and of older data sets on the Hugging Face Hub.
SPLITS, STATE = "dataset_dict.json", "state.json"
DESCRIPTIONS = (SPLITS, STATE, "dataset_info.json", "dataset_infos.json")
CACHED = "cache-*.arrow"  # what datasets has computed from the other files of a folder
# The name of a split as a word of a file's or folder's name. The datasets library knows the same words.
SPLIT = re.compile(r"(?:^|[-._ 0-9])(train|test|valid|val|dev|eval)(?:ing|idation|uation)?(?=[-._ 0-9]|$)", re.I)
HELD_OUT = {"val": "valid", "dev": "valid", "eval": "valid"}  # other words for the validation split
PART = 1 << 20  # characters of a JSON array that are read at a time
VALUE = json.JSONDecoder()
BLANK, BEHIND = re.compile(r"[ \t\n\r]*"), re.compile(r"[ \t\n\r]*([],])")  # BEHIND: what follows an element


def files(path: Path) -> list[Path]:
    """Return the files of a data set in the order in which they are read.

    path: a file; a folder, whose files are read in the order of their names; a folder that contains one such folder;
    a folder that datasets has saved; or a pattern, such as FOLDER/train-*. Raises UserError if there is no file, or if
    it is not clear which files are meant.
    """
    if path.is_dir():
        return _files_of_folder(path)
    if path.exists():
        return [_supported(texts.regular(path))]
    if found := _fitting(path):
        return of_one_kind(path.parent, found)
    if "*" in path.name and path.parent.is_dir():
        raise UserError(f"data set {path}: no data file has such a name; {WANTED}")
    remedy = texts.download(str(path), "dataset") or WANTED
    raise UserError(f"data set {path}: no such file or folder; {remedy}")


def read(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the place and the content of every line that is not blank. Raises UserError for an unreadable file.

    The place is "file:line", or "file: element N" or "file: row N", counted from 1.
    """
    for file in files(path):
        try:
            if tables.is_table(file):
                for number, row in enumerate(tables.rows(file), 1):
                    yield f"{file}: row {number}", row
                continue
            with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
                if _begins_array(stream.peek(PART)):
                    yield from _elements(file, stream)
                    continue
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield f"{file}:{number}", line
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: cannot be read ({error}); {texts.AGAIN}") from None


def exists(path: Path) -> bool:
    """Return whether there is a file or folder of this name, or a data file that fits it as a pattern."""
    return path.exists() or bool(_fitting(path))


def _fitting(path: Path) -> list[Path]:
    """Return the data files of a pattern. A path without * has none."""
    if "*" not in path.name or not path.parent.is_dir():
        return []
    return readable(file for file in path.parent.iterdir() if fnmatch.fnmatchcase(file.name, path.name))


def split(name: str) -> str:
    """Return the split that the name of a file or folder contains: train, test, valid, or "" for none."""
    word = match[1].lower() if (match := SPLIT.search(name)) else ""
    return HELD_OUT.get(word, word)


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / SPLITS).is_file():
        return files(_only([path.parent for path in sorted(folder.glob(f"*/{STATE}"))], folder, "splits"))
    if (folder / STATE).is_file():
        return _saved(folder)
    if found := readable(folder.iterdir()):
        return _of_one_split(folder, of_one_kind(folder, found))
    within = [path for path in sorted(folder.iterdir()) if path.is_dir() and readable(path.iterdir())]
    if within:
        return files(_only(within, folder, "folders"))
    for file in sorted(folder.iterdir()):
        _supported(file)
    raise UserError(f"data set {folder}: no file in this folder ends in {', '.join(SUFFIXES)}; {WANTED}")


def _only(paths: list[Path], folder: Path, what: str) -> Path:
    """Return the only path. Raises UserError if there is not exactly one."""
    if not paths:
        raise UserError(f"data set {folder}: it has no {what} with data; copy the folder again")
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        one = next((path for path in paths if path.name == "train"), paths[0])
        raise UserError(f"data set {folder}: it has the {what} {names}; give one of them, such as {one}")
    return paths[0]


def _saved(folder: Path) -> list[Path]:
    """Return the files of a data set that datasets has saved with save_to_disk, in its order."""
    again = "save the data set again with save_to_disk"
    state = texts.load(folder / STATE, again)
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        indices = state.get("_indices_data_files")
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{folder / STATE}: it names no data files; {again}") from None
    if indices:  # old versions of datasets saved a selection of rows as a file of indices
        raise UserError(f"{folder}: it is saved as a selection of rows; {again} of a new version of datasets")
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file, but {STATE} names it; copy the folder again")
    return [texts.regular(folder / name) for name in names]


def readable(candidates: Iterable[Path]) -> list[Path]:
    """Return the data files among the candidates, in the order of their names."""
    found = [file for file in candidates if file.name.endswith(SUFFIXES) and file.name not in DESCRIPTIONS]
    return [texts.regular(file) for file in sorted(found) if not fnmatch.fnmatchcase(file.name, CACHED)]


def _supported(file: Path) -> Path:
    """Return the file. Raises UserError if its name says that it has a format that is not read."""
    if file.name.endswith(REFUSED):
        raise UserError(f"{file}: {file.suffix} files are not read; convert it to jsonl, JSON or parquet")
    return file


def of_one_kind(folder: Path, found: list[Path]) -> list[Path]:
    """Return the files. Raises UserError if some may have the same records as others.

    These are text and tables, tables of two kinds, and files whose names differ only in the suffix.
    """
    if len({file.suffix if tables.is_table(file) else "" for file in found}) > 1:
        kinds = sorted({file.suffix for file in found})
        raise UserError(
            f"data set {folder}: it has {' and '.join(kinds)} files; give one kind, such as {folder}/*{kinds[-1]}"
        )
    known: dict[str, str] = {}
    for name in (file.name for file in found):
        stem = next(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))
        if stem in known:
            same = f"{known[stem]} and {name} differ only in the suffix, so both may have the same records"
            raise UserError(f"data set {folder}: {same}; move one of them away")
        known[stem] = name
    return found


def _of_one_split(folder: Path, found: list[Path]) -> list[Path]:
    """Return the files. Raises UserError if their names are those of several splits, such as train and test."""
    if len({named for file in found if (named := split(file.name))}) > 1:
        words = {match[1] for file in found if (match := SPLIT.search(file.name))}  # as written, for the pattern
        splits = sorted(words, key=lambda word: (split(word) != "train", word))
        given = f"it has files of the splits {', '.join(splits)}"
        raise UserError(f"data set {folder}: {given}; give those of one, such as {folder}/*{splits[0]}*")
    return found


def _begins_array(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _elements(file: Path, stream: io.BufferedReader | gzip.GzipFile) -> Iterator[tuple[str, bytes]]:
    """Yield the places and the elements of a JSON array. Only a part of the file is in memory at a time."""
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")
    number = 1
    try:
        text = reader.read(PART)
        at, last = text.index("[") + 1, False
        if (ends := BEHIND.match(text, at)) and ends[1] == "]":
            at, last = ends.end(), True  # the array is empty
        while not last:
            try:
                element, at, last = _element(text, at)
            except ValueError:
                more = reader.read(max(PART, len(text)))  # doubled, so the time is linear in the element's length
                if not more:
                    raise
                text, at = text[at:] + more, 0
                continue
            yield f"{file}: element {number}", element
            number += 1
        if (text[at:] + reader.read(PART)).strip():
            raise ValueError("text follows the array")
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
        where = f"{file}: element {number}"
        raise UserError(f"{where}: the array is not JSON here ({reason}); correct it, or write jsonl") from None


def _element(text: str, at: int) -> tuple[bytes, int, bool]:
    """Return an array's element that begins at `at`, where the next one begins, and whether it is the last.

    Raises ValueError if it is not JSON, or not complete.
    """
    begin = BLANK.match(text, at).end()  # type: ignore[union-attr]
    _, end = VALUE.raw_decode(text, begin)
    behind = BEHIND.match(text, end)
    if behind is None:
        raise ValueError("Expecting ',' or ']'")
    return text[begin:end].encode(), behind.end(), behind[1] == "]"
