"""A tokenized data set as a few long arrays, and a folder that caches them. The launcher writes it for the ranks.

The name of the folder is a digest of everything that the arrays depend on: the lines, the tokenizer's files, the keys,
and the code of this package. So it is never out of date, and several ranks may write it at the same time. It may be
deleted when no run uses it. Its files are memory-mapped after their checksums were compared, so the ranks of a node
share one copy in the system's file cache.
"""

import errno
import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from rlhf import folders, texts
from rlhf.config import Data
from rlhf.data import lines, tables
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

SUMS = "crc32.json"


@dataclass(frozen=True, slots=True)
class Conversation:
    """The tokens of a prompt and its response."""

    ids: np.ndarray  # [L+1] int32
    learn: np.ndarray  # [L+1] bool, True for tokens that are learned
    truncated: bool  # the response was cut to the limit
    reward: float  # of the response, from the data set


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the data set that was kept."""

    row: int  # index among the lines of all files
    line: bytes  # the JSON text of an object
    template: str  # the key of templates.TEMPLATES that it is written with
    siblings: list[Conversation]


@dataclass(frozen=True, slots=True)
class Columns:
    """All records of a data set, concatenated: R records, C conversations, T tokens and B bytes in total."""

    tokens: np.ndarray  # [T] int32
    learn: np.ndarray  # [T] bool
    token_ends: np.ndarray  # [C] int64, where the tokens of each conversation end
    truncated: np.ndarray  # [C] bool
    rewards: np.ndarray  # [C] float64
    sibling_ends: np.ndarray  # [R] int64, where the conversations of each record end
    rows: np.ndarray  # [R] int64
    lines: np.ndarray  # [B] uint8
    line_ends: np.ndarray  # [R] int64, where the bytes of each line end
    templates: np.ndarray  # [R] text, the template of each record
    counts: np.ndarray  # [4] int64, lines kept, truncated, dropped and skipped
    reason: np.ndarray  # [M] uint8, why the first skipped line was skipped, in UTF-8

    @classmethod
    def of(cls, records: list[Record], counts: tuple[int, int, int, int], reason: str = "") -> "Columns":
        every = [conversation for record in records for conversation in record.siblings]

        def ends(lengths: list[int]) -> np.ndarray:
            return np.cumsum(lengths, dtype=np.int64)

        return cls(
            tokens=np.concatenate([np.empty(0, np.int32), *(c.ids for c in every)]),
            learn=np.concatenate([np.empty(0, bool), *(c.learn for c in every)]),
            token_ends=ends([len(c.ids) for c in every]),
            truncated=np.array([c.truncated for c in every], bool),
            rewards=np.array([c.reward for c in every], np.float64),
            sibling_ends=ends([len(record.siblings) for record in records]),
            rows=np.array([record.row for record in records], np.int64),
            lines=np.frombuffer(b"".join(record.line for record in records), np.uint8),
            line_ends=ends([len(record.line) for record in records]),
            templates=np.array([record.template for record in records], "U16"),
            counts=np.array(counts),
            reason=np.frombuffer(reason.encode(errors="replace"), np.uint8),
        )

    @classmethod
    def joined(cls, parts: "list[Columns]") -> "Columns":
        """Return the records of all parts, in order."""

        def join(name: str) -> np.ndarray:
            arrays = [getattr(part, name) for part in parts]
            if name == "counts":
                return np.sum(arrays, axis=0)
            if name == "reason":
                return next((array for array in arrays if len(array)), arrays[0])
            if name.endswith("_ends"):
                sizes = [int(ends[-1]) if len(ends) else 0 for ends in arrays]
                arrays = [ends + start for ends, start in zip(arrays, np.cumsum([0, *sizes[:-1]]), strict=True)]
            return np.concatenate(arrays)

        return cls(**{field.name: join(field.name) for field in fields(cls)})

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, i: int) -> Record:
        siblings = []
        for c in range(*_span(self.sibling_ends, i)):
            part = slice(*_span(self.token_ends, c))
            siblings.append(
                Conversation(self.tokens[part], self.learn[part], bool(self.truncated[c]), float(self.rewards[c]))
            )
        line = self.lines[slice(*_span(self.line_ends, i))].tobytes()
        return Record(int(self.rows[i]), line, str(self.templates[i]), siblings)


def _span(ends: np.ndarray, i: int) -> tuple[int, int]:
    return int(ends[i - 1]) if i else 0, int(ends[i])


def read(folder: Path) -> Columns | None:
    """Return the columns that write() wrote, memory-mapped and read-only; None if the folder does not exist.

    Raises UserError if it is damaged.
    """
    if not folder.exists():
        return None
    try:
        if texts.parse((folder / SUMS).read_bytes()) != _sums(folder):
            raise ValueError("its checksums are others")
        return Columns(
            **{name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in _files(folder).items()}
        )
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); delete it, and the next run will write it") from None


def write(folder: Path, columns: Columns) -> None:
    """Write the folder atomically, unless another process has done so. Raises UserError if it cannot be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            part = Path(made) / folder.name
            part.mkdir()
            for name, file in _files(part).items():
                np.save(file, getattr(columns, name))
            (part / SUMS).write_text(json.dumps(_sums(part)))
            try:
                part.rename(folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: cannot be written ({reason}); set out to a folder that has free space") from None


def _files(folder: Path) -> dict[str, Path]:
    return {field.name: folder / f"{field.name}.npy" for field in fields(Columns)}


def _sums(folder: Path) -> dict[str, int]:
    """The checksum of each file."""
    return {name: folders.checksum(file) for name, file in _files(folder).items()}


def digest(path: Path, tokenizer: Tokenizer, config: Data, *arguments: object) -> str:
    """Return the name of a data set's folder. Everything that may change the arrays changes the name.

    arguments: further values that the arrays depend on. Their repr is used.
    """
    code = sorted(Path(__file__).parent.glob("*.py"))
    libraries = [version(name) for name in ("numpy", "tokenizers", "sentencepiece", "jinja2")]
    libraries += {tables.installed(file).__version__ for file in lines.files(path) if tables.is_table(file)}
    dated = config.template in ("auto", "tokenizer") and tokenizer.chats and tokenizer.chats.dated
    today = date.today() if dated else None
    told = (tokenizer.rows, tokenizer.kind, tokenizer.stop_ids)  # config.json decides them, and is not in `files`
    parts = [replace(config, train=(), weights={}, eval=()), arguments, libraries, today, told]
    for files in (code, tokenizer.files.values(), lines.files(path)):
        parts.append([_file_digest(file) for file in files])
    return hashlib.sha256(repr((parts, list(tokenizer.files))).encode()).hexdigest()


def contents(files: Iterable[Path]) -> str:
    """Return a fingerprint of the contents of files, in this order. Their names do not matter. Raises UserError."""
    return hashlib.sha256(" ".join(map(_file_digest, files)).encode()).hexdigest()[:32]


def _file_digest(file: Path) -> str:
    try:
        found = file.stat()
        return _digest(file, found.st_size, found.st_mtime_ns, found.st_ino)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


@cache
def _digest(file: Path, *state: int) -> str:
    """Return the digest of a file in this state. It is cached, because identity and digest() both need it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
