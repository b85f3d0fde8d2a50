"""Reads the folder of a run for the report. Files may be missing or damaged: remarks say what is left out."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf import texts

METRICS, CONFIG, LEDGER = "metrics.jsonl", "config.toml", "ledger.json"  # files of a run
EVALUATIONS = ("evaluate",)  # modes without training; they write MODE.jsonl and MODE.toml (rlhf.metrics.own_name)
MODE = re.compile(r"# \./launch\.sh (\S+)")  # begins config.toml


@dataclass(slots=True)
class Run:
    """What the folder of a run contains, except for its samples."""

    folder: Path
    mode: str = ""
    steps: list[int] = field(default_factory=list)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)  # name -> a value per step; None: no value
    # metrics of the modes without training, which have files of their own: mode -> name -> value
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)  # key -> value as text
    ledger: dict[str, dict[str, float]] = field(default_factory=dict)  # phase -> tenant -> predicted GiB
    remarks: list[str] = field(default_factory=list)  # what is missing or left out, for the reader


def read(folder: Path, most: int = 1_000_000) -> Run:
    """Return the content of a run's folder. No file needs to exist, or to be complete.

    most: limit of the number of values of metrics; of a longer run, every second, third ... step is returned.
    """
    run = Run(folder)
    for mode in EVALUATIONS:  # other files may be data of the user
        if (file := folder / f"{mode}.jsonl").is_file():
            for _, row in _rows(run, file):
                run.evaluations[mode] = row
    rows = _thinned(run, _series(run), most)
    run.steps = [*rows]
    names = dict.fromkeys(name for row in rows.values() for name in row)
    run.metrics = {name: [row.get(name) for row in rows.values()] for name in names}
    possible = (CONFIG, *(f"{mode}.toml" for mode in EVALUATIONS))
    if files := [folder / name for name in possible if (folder / name).is_file()]:
        _configure(run, files[0])
    else:
        run.remarks.append(f"{CONFIG} is missing")
    if (folder / LEDGER).is_file():
        run.ledger = _ledger(run, folder / LEDGER)
    return run


def number(value: Any) -> float | None:
    """Return a finite number with six digits, or None for any other value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:  # false for nan, too
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _series(run: Run) -> dict[int, dict[str, float]]:
    """Return step -> metrics of metrics.jsonl, in the order of the steps."""
    file = run.folder / METRICS
    if not file.is_file():
        if not run.evaluations:
            run.remarks.append(f"{METRICS} is missing: there are no curves")
        return {}
    rows: dict[int, dict[str, float]] = {}
    repeated = 0
    for step, row in _rows(run, file):
        if rows and step <= next(reversed(rows)):  # a killed run went on from here: the later line counts
            stale = [old for old in rows if old >= step]
            repeated += len(stale)
            for old in stale:
                del rows[old]
        rows[step] = row
    if repeated:
        run.remarks.append(f"{METRICS}: {repeated:,} lines of steps that ran again are left out")
    if not rows:
        run.remarks.append(f"{METRICS} has no complete line: there are no curves")
    return rows


def _thinned(run: Run, rows: dict[int, dict[str, float]], most: int) -> dict[int, dict[str, float]]:
    """Return every n-th step of a long run and its last one, at most about `most` values.

    If there are few evaluations, all of them are kept.
    """
    width = len({name for row in rows.values() for name in row})
    every = -(-len(rows) * width // most)
    if every < 2:
        return rows
    last = len(rows) - 1
    evaluated = {step for step, row in rows.items() if any(name.startswith("eval_") for name in row)}
    few = evaluated if len(evaluated) * every <= len(rows) else set()
    kept = {step: row for i, (step, row) in enumerate(rows.items()) if i % every == 0 or i == last or step in few}
    run.remarks.append(f"{METRICS}: {len(kept):,} of {len(rows):,} steps are in this page")
    return kept


def _rows(run: Run, file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, metrics) of each line that is complete. Values that are no finite numbers are omitted."""
    damaged = []
    for line, found in enumerate(objects(file), 1):
        step = found.get("step") if found else None
        if found is None or type(step) is not int or abs(step) > 2**53:
            damaged.append(f"{line:,}")
            continue
        values = ((name, number(value)) for name, value in found.items() if name != "step")
        yield step, {name: value for name, value in values if value is not None}
    if damaged:
        more = " and others" if len(damaged) > 5 else ""
        run.remarks.append(f"{file.name}: damaged lines are left out: {', '.join(damaged[:5])}{more}")


def objects(file: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the JSON object of each line of a file; None for a damaged line. A missing file has no lines."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            if line.strip():
                yield _parsed(line)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = texts.parse(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _configure(run: Run, file: Path) -> None:
    """Set mode and config from a TOML file that the run has written."""
    text = file.read_text(encoding="utf-8", errors="replace")
    match = MODE.match(text)
    run.mode = match[1] if match else ""
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError):
        run.remarks.append(f"{file.name} is damaged: it is no TOML")
        return
    run.config = dict(_flat(tree))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def _ledger(run: Run, file: Path) -> dict[str, dict[str, float]]:
    """Return the predicted GiB by phase and tenant that the run has written."""
    found = _parsed(file.read_text(encoding="utf-8", errors="replace")) or {}
    phases = {phase: rows for phase, rows in found.items() if isinstance(rows, dict)}
    if not phases:
        run.remarks.append(f"{LEDGER} is damaged: the predicted memory is not shown")
    return {
        phase: {name: gib for name, value in rows.items() if (gib := number(value))} for phase, rows in phases.items()
    }
