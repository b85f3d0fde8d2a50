"""Builds the page of the report. All scripts, styles and data are inside, so it opens offline and loads nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf import lazy
from rlhf.errors import UserError
from rlhf.report import runs, samples

FILE = "report.html"  # name of the report in the folder of a run
HERE = Path(__file__).parent
LIBRARY = ("bokeh.min.js", "bokeh-api.min.js")  # of the package bokeh, which is not imported
SCRIPTS = ("report.js", "charts.js", "tables.js", "samples.js")
VALUES = 1_000_000  # largest number of values of metrics in a page, of all runs together
SAMPLES = 20_000  # largest number of samples in a page, of all runs together
CHARACTERS = 24_000_000  # largest number of characters of their texts
BYTES = 14_000_000  # largest size of their block in the file, which has up to 6 MB of other content
LENGTHS = (20_000, 8_000, 4_000, 2_000, 1_000, 500, 250, 100)  # limits of a text in characters; the first that fits
REMEDY = "install it (pip install bokeh)"


def plotting() -> Path | None:
    """Return the folder of the plotting library's scripts; None if the package is not installed."""
    folder = lazy.package("bokeh")
    return folder / "server" / "static" / "js" if folder else None


def write(folders: Sequence[Path], file: Path) -> int:
    """Write the report of the runs, and return its size in bytes. The file is replaced atomically.

    Raises UserError if the plotting library is missing, if a folder does not exist, or if the file is a folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the folder `out` of a run")
    if file.is_dir():
        raise UserError(f"{file}: a folder; give a file, such as {file / FILE}")
    text = build(folders).encode("utf-8", "replace")
    part = partial(file, os.getpid())
    try:
        part.write_bytes(text)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return len(text)


def partial(file: Path, process: int) -> Path:
    """Return the file that a process writes first. A run and a user may write the same report at the same time."""
    return file.with_name(f"{file.name}.{process}.partial")


def build(folders: Sequence[Path]) -> str:
    """Return the HTML text of the report of the runs."""
    scripts = plotting()
    if scripts is None:
        raise UserError(f"the report needs the package bokeh: {REMEDY}")
    found = [runs.read(folder, VALUES // len(folders)) for folder in folders]
    kept = [samples.read(run, SAMPLES // len(found)) for run in found]
    packed, cut = _samples(found, kept)
    names = _names(folders)
    made = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    described = [
        asdict(run) | {"folder": str(run.folder), "name": name} for run, name in zip(found, names, strict=True)
    ]
    data = _block({"made": made, "cut": cut, "runs": described})
    code = [(scripts / name).read_text("utf-8") for name in LIBRARY]
    code.append("\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS))
    parts = {
        "policy": " ".join(map(_digest, code)),
        "style": (HERE / "report.css").read_text("utf-8"),
        "runs": data,
        "samples": packed,
        "scripts": "".join(f"<script>{text}</script>\n" for text in code),
    }
    page = (HERE / "report.html").read_text("utf-8")
    for name, text in parts.items():
        before, _, after = page.partition(f"{{{{{name}}}}}")
        page = before + text + after
    return page


def _samples(found: Sequence[runs.Run], kept: Sequence[Sequence[samples.Row]]) -> tuple[str, int]:
    """Return the block of the samples, and the length to which texts are cut; 0: none is cut.

    If short texts are too many, too, every second sample is left out, with a remark.
    """
    rest = kept
    while True:
        for longest in LENGTHS:
            packed, size, cuts = samples.pack(rest, longest)
            if size <= CHARACTERS and len(block := _block(packed)) <= BYTES:
                for run, old, new in zip(found, kept, rest, strict=True):
                    if len(new) < len(old):
                        run.remarks.append(
                            f"samples: {len(old) - len(new):,} more are left out, to keep this page small"
                        )
                return block, longest if cuts else 0
        rest = [rows[1::2] for rows in rest]


def _block(value: Any) -> str:
    """Return a value as compressed JSON in base64, which has no characters that HTML would read."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 5, mtime=0)).decode()


def _digest(script: str) -> str:
    """Return the source expression that allows this script. The page's policy forbids all others, and all requests."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
    paths = [folder.resolve().parts for folder in folders]
    longest = max(map(len, paths))
    for length in range(1, longest):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
