"""Reads the sample files of a run for the report, and shortens them to the size that the page may have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.report.runs import Run, number, objects

# keys of a line that a row of the page has in its own form; all other keys with a short value are shown as they are
KNOWN = {
    *(
        "step",
        "use",
        "set",
        "row",
        "group",
        "prompt",
        "response",
        "turns",
        "reward",
        "rule",
        "score",
        "parts",
        "failed",
    ),
    *("advantage", "finish", "versions", "prompt_tokens", "response_tokens"),
}
Row = dict[str, Any]


def read(run: Run, most: int) -> list[Row]:
    """Return at most `most` samples of a run, ordered by step. A remark says what is left out.

    Of many files, those are read first whose steps divide the run evenly: the last, the middle ...
    """
    found = [*(run.folder / "samples").glob("*.jsonl")]
    steps = sorted((int(path.stem[5:]), path) for path in found if _is_step(path))
    others = sorted(path for path in found if not _is_step(path))
    rows: list[Row] = []
    seen = damaged = used = 0
    for file in [*others, *(steps[i][1] for i in spread(len(steps)))]:
        limit = most // 2 if steps and file in others else most  # an evaluation leaves half of the page to the steps
        if len(rows) >= limit:
            continue
        used += 1
        for line in objects(file):
            seen, damaged = seen + 1, damaged + (line is None)
            if line is not None and len(rows) < limit:
                rows.append(_row(line))
    if damaged:
        run.remarks.append(f"samples: damaged lines are left out: {damaged:,}")
    if used < len(found) or len(rows) < seen - damaged:
        remark = f"samples: {len(rows):,} of {seen:,} in {used:,} of {len(found):,} files are in this page"
        run.remarks.append(f"{remark}; out/samples has all")
    rows.sort(key=lambda row: row["step"])
    return rows


def _is_step(file: Path) -> bool:
    """Return whether this is the file of a step, as rlhf.recorder names it."""
    return file.stem.startswith("step_") and file.stem[5:].isdecimal()


def spread(count: int) -> list[int]:
    """Return 0 ... count - 1 in an order in which any number of the first ones divide the range about evenly."""
    bits = max(count - 1, 1).bit_length()
    halves = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [count - 1 - i for i in halves if i < count]


def pack(rows: Sequence[Sequence[Row]], longest: int) -> tuple[list[dict[str, Any]], int, int]:
    """Return the samples of each run with texts of at most `longest` characters, their size and the number of cuts.

    size: characters of all texts. Equal prompts of a run are stored once.
    """
    cut = _Cut(longest)
    return [cut.pack(part) for part in rows], cut.size, cut.cuts


class _Cut:
    """Cuts texts to a length, and counts their characters."""

    def __init__(self, longest: int):
        self.longest, self.size, self.cuts = longest, 0, 0

    def pack(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the prompts and the samples of a run. A sample has the number of its prompt."""
        prompts: dict[str, int] = {}
        samples = [
            row
            | {
                "prompt": prompts.setdefault(row["prompt"], len(prompts)),
                "turns": [[role, self.text(content)] for role, content in row["turns"]],
            }
            for row in rows
        ]
        return {"prompts": [self.text(prompt) for prompt in prompts], "samples": samples}

    def text(self, text: str) -> str:
        """Return a text, or its beginning and end if it is too long."""
        if (left := len(text) - self.longest) > 0:
            self.cuts += 1
            end = self.longest // 4
            text = f"{text[: self.longest - end]}\n[… {left:,} characters are left out …]\n{text[-end:]}"
        self.size += len(text)
        return text


def _row(line: dict[str, Any]) -> Row:
    """Return a sample as the page has it. Values of a wrong type become None or text."""
    turns = line.get("turns")
    parts, tokens, versions = line.get("parts"), line.get("response_tokens"), line.get("versions")
    step = line.get("step")
    row = {
        "step": step if type(step) is int and abs(step) < 2**53 else 0,
        "use": _text(line.get("use")),
        "set": _text(line.get("set")),
        "prompt": _text(line.get("prompt")),
        "turns": list(_turns(turns if isinstance(turns, list) else [])) or [["assistant", _text(line.get("response"))]],
        "parts": {str(name): number(value) for name, value in parts.items()} if isinstance(parts, dict) else {},
        "failed": line.get("failed") is True,
        "finish": _text(line.get("finish")),
        "tokens": len(tokens) if isinstance(tokens, list) else None,
        "versions": [number(version) for version in versions] if isinstance(versions, list) else [],
        **{name: number(line.get(name)) for name in ("row", "group", "reward", "rule", "score", "advantage")},
    }
    more = {
        name: _text(value)
        for name, value in line.items()
        if name not in KNOWN and isinstance(value, (str, int, float)) and len(str(value)) <= 100
    }
    return row | ({"more": more} if more else {})


def _turns(turns: list[Any]) -> Iterator[list[str]]:
    for turn in turns:
        if isinstance(turn, dict):
            yield [_text(turn.get("role")), _text(turn.get("content"))]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)
