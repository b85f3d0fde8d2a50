"""Reads and writes FastChat's files of JSON lines. An error of reading is a UserError with the file and the line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf import errors
from rlhf.data import forms, lines
from rlhf.errors import UserError
from rlhf.texts import encodable

Id = int | str  # of a question
Row = dict[str, Any]


def read(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield the place and the object of each line of a file. Raises UserError."""
    for where, line in lines.read(Path(path)):
        with at(where):
            row = forms.parse(line)
        yield where, row


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of JSON lines atomically, and its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with errors.naming(path), partial.open("w") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def at(where: str) -> Iterator[None]:
    """Begin the message of a UserError with the place of the line."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{where}: {error}") from None


def text(row: Row, key: str) -> str:
    """Return a text that can be sent to a judge. Raises UserError."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{key!r} is {value!r:.80}; give a string")
    return encodable(value)


def texts(row: Row, key: str, blank: bool = False) -> tuple[str, ...]:
    """Return a list of texts with at least one element. blank: texts may be blank. Raises UserError."""
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{key!r} is {values!r:.80}; give a list of strings")
    if not blank and not all(value.strip() for value in values):
        raise UserError(f"{key!r} has an empty text; give it a text or remove the line")
    return tuple(encodable(value) for value in values)


def question_id(row: Row) -> Id:
    """Return the id of the question that a line is about. Raises UserError."""
    value = row.get("question_id")
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise UserError(f"'question_id' is {value!r:.80}; give a number or a string")
    return value


def order(number: Id) -> tuple[bool, Id]:
    """Return what sorts ids as FastChat does: by number. Strings follow the numbers."""
    return isinstance(number, str), number
