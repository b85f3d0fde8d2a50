"""Reads and parses text files of users. Every error becomes a UserError, one line that names the file."""

import argparse
import json
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from rlhf.errors import UserError

AGAIN = "copy the file again"  # the remedy for a damaged file

DEEPEST = 100  # largest nesting of JSON; deeper values would fail later, when they are pickled for other ranks

POINTER = b"version https://git-lfs.github.com/"  # the first bytes of a pointer of git-lfs

HUB = re.compile(r"(?:https?:/+huggingface\.co/(?:datasets/)?)?([A-Za-z0-9][\w.-]*/[\w.-]+)")  # names of repositories
FILE = re.compile(r".*\.(?:jsonl?|parquet|arrow|csv|tsv|txt|gz|zst|zip|model|safetensors|bin|pt|pth|gguf)", re.I)


def encodable(text: str) -> str:
    """Return a text. Raises UserError for half of a surrogate pair, which JSON can contain but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the text contains half of a surrogate pair ({text!r:.80}); remove it") from None
    return text


def regular(path: Path) -> Path:
    """Return the path if it is a regular file. Raises UserError for pipes, devices and folders, and OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: not a regular file; give a regular file, because each rank reads it again")
    return path


def fetched(path: Path) -> Path:
    """Return the path. Raises UserError if the file is a pointer of git-lfs in place of its content, and OSError."""
    if begins(regular(path), POINTER):
        raise UserError(f"{path}: a pointer of git-lfs, not the file itself; fetch the file: git lfs pull")
    return path


def begins(path: Path, start: bytes) -> bool:
    """Return whether a file begins with these bytes. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(start)) == start


def download(name: str, kind: str = "model") -> str:
    """Return advice with the command that downloads a model or data set from the Hugging Face hub.

    It is "" if `name` is no possible name of a repository, or is that of a file. kind: model or dataset.
    """
    if not (match := HUB.fullmatch(name)) or FILE.fullmatch(name):
        return ""
    command = f"hf download {match[1]}{'' if kind == 'model' else f' --repo-type {kind}'} --local-dir {match[1]}"
    return f"if it is a {kind} on the Hugging Face hub, download it: {command}"


def read(path: Path, remedy: str) -> str:
    """Return the text of a file. Raises UserError, whose message ends with the remedy."""
    try:
        return regular(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); {remedy}") from None


def load(path: Path, remedy: str) -> Any:
    """Return the value of a JSON file. Raises UserError, whose message ends with the remedy."""
    try:
        return parse(read(path, remedy))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from None


def fields(files: Mapping[str, Path], name: str, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file; {} if there is no such file. files: name -> path. Raises UserError."""
    if name not in files:
        return {}
    value = load(files[name], remedy)
    if not isinstance(value, dict):
        raise UserError(f"{files[name]}: not a JSON object; {remedy}")
    return value


def parse(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError for invalid JSON and for JSON nested deeper than DEEPEST."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    level = [found] if opened > DEEPEST else []
    for _ in range(DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError("it is nested too deeply")
    return found


@contextmanager
def paths() -> Iterator[None]:
    """Raise UserError in place of an OSError that has a path. For code before a run, where the path is user input."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{str(error.filename)[:200]}: {error.strerror}") from None


def save(path: Path, content: Any) -> None:
    """Write a JSON file atomically: it is either complete or missing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(path)


class Parser(argparse.ArgumentParser):
    """A command-line parser that raises UserError, so that a mistake is reported in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class Blaming:
    """Converts every error of the code inside to a UserError, one line of the form "what: error; remedy".

    It is for code of other packages that may raise any exception: tokenizers (also panics of its Rust code),
    sentencepiece and chat templates.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit, UserError)):
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self.what}: {said}; {self.remedy}") from None
