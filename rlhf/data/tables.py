"""Reads the rows of parquet and Arrow files as JSON. This needs pyarrow, an optional package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rlhf import texts
from rlhf.errors import UserError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".parquet", ".arrow")
ROWS = 1024  # rows that are converted at a time


def is_table(file: Path) -> bool:
    return file.name.endswith(SUFFIXES)


def rows(file: Path) -> Iterator[bytes]:
    """Yield each row as the JSON text of an object. Only some rows are in memory. Raises UserError and OSError."""
    pyarrow, number = installed(file), 0
    try:
        for batch in _batches(file):
            for start in range(0, len(batch), ROWS):
                for row in batch.slice(start, ROWS).to_pylist():
                    number += 1
                    found = {key: _present(value) for key, value in row.items()}
                    yield json.dumps(found, ensure_ascii=False, default=_text).encode()
    except UserError as error:
        raise UserError(f"{file}: row {number} has {error}") from None
    except (ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({error}); {texts.AGAIN}") from None


def _present(value: Any) -> Any:
    """Return a value without the null fields of its structs.

    All structs of a column have the same fields, so those that an object does not have are null.
    """
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def installed(file: Path) -> ModuleType:
    """Return pyarrow. Raises UserError if it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{file}: {file.suffix} files need the package pyarrow: pip install pyarrow") from None
    return pyarrow


def _batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    if file.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(file) as opened:
            yield from opened.iter_batches(ROWS, use_threads=False)
        return
    with pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":  # the format of Arrow and Feather files; datasets writes streams
            table = pyarrow.ipc.open_file(source)
            yield from (table.get_batch(i) for i in range(table.num_record_batches))
            return
        source.seek(0)
        yield from pyarrow.ipc.open_stream(source)


def _text(value: Any) -> str | float:
    """Return the JSON value of a date, time or decimal number. Raises UserError for others, such as bytes."""
    if isinstance(value, (date, time)):  # datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    kind = f"a value of type {type(value).__name__}"
    raise UserError(f"{kind}, which JSON cannot hold; remove its column, or convert it to text")
