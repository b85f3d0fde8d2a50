"""Asks a judge for the judgments that are missing, and keeps each reply at once in a file of FastChat's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from rlhf import errors, progress, texts
from rlhf.errors import JudgingError
from rlhf.judge.client import Client, JudgeError
from rlhf.mtbench import rows
from rlhf.mtbench.judgments import Judgment, Request, restore
from rlhf.mtbench.rows import Row
from rlhf.output import Progress, say

LETTERS = 4  # characters per token, for the estimate; English text has about as many
FAILURES = 8  # after so many failed requests in a row no other is sent


async def grade(path: Path, client: Client, judgments: list[Judgment]) -> None:
    """Complete the judgments with the replies in a file, and with those of the judge, which are added to the file.

    A file that a killed process has left is repaired. Raises JudgingError if requests have failed. The others are in
    the file then, and another call sends only the requests that are left.
    """
    _tidy(path, judgments)
    left = [(judgment, request) for judgment in judgments for request in judgment.left]
    total = sum(len(judgment.requests) for judgment in judgments)
    say(_plan(client, total - len(left), [request for _, request in left]))
    if not left:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with errors.naming(path), path.open("a") as file, Progress("judge", "requests", len(left), shown=True) as shown:
        failed = await _ask(client, left, file, shown)
    _tidy(path, judgments)
    if failed:
        missing = sum(len(judgment.left) for judgment in judgments)
        count = f"{total - missing} of {total} requests have a reply, in {path}, and {missing} have none"
        raise JudgingError(f"{count}: {failed}; start again: only those are sent")


async def _ask(client: Client, left: list[tuple[Judgment, Request]], file: TextIO, shown: Progress) -> str:
    """Send requests. Return the message of the last error, or "" if all have a reply."""
    queue, failed, streak = iter(left), "", 0

    async def work() -> None:
        nonlocal failed, streak
        for judgment, request in queue:
            if streak >= FAILURES:
                return
            try:
                reply = await client.ask(request.messages)
            except JudgeError as error:
                failed, streak = str(error), streak + 1
                continue
            streak = 0
            judgment.replies[request] = reply.text
            file.write(f"{json.dumps(judgment.line())}\n")
            file.flush()  # a killed process loses nothing that was paid for
            shown.add(1, len(reply.text) // LETTERS)
            progress.move()

    await asyncio.gather(*(work() for _ in range(min(client.config.concurrency, len(left)))))
    return failed


def _plan(client: Client, known: int, left: Iterable[Request]) -> str:
    """Return the line that is printed before requests are sent."""
    lengths = [request.characters for request in left]
    before = f"{known} requests were judged before" if known else "none was judged before"
    if not lengths:
        return f"judge {client.model}: nothing to send, {before}"
    tokens = f"about {sum(lengths) // LETTERS:,} tokens (one per {LETTERS} characters)"
    most = f"replies of up to {client.config.max_tokens:,} tokens each"
    return f"judge {client.model}: {len(lengths)} requests with {tokens}, and {most}; {before}"


def _tidy(path: Path, judgments: list[Judgment]) -> None:
    """Take the replies from a file, and remove the lines that no longer count, such as halves of complete pairs."""
    if path.exists():
        rows.write(path, restore(_rows(path), judgments))


def _rows(path: Path) -> list[Row]:
    """Return the lines of a file. Damaged ones, such as a half-written last line, are left out."""
    found, damaged = [], []
    for number, line in enumerate(path.read_text(errors="replace").split("\n"), 1):
        try:
            row = texts.parse(line) if line else None
        except ValueError:
            row = None
        if isinstance(row, dict):
            found.append(row)
        elif line:
            damaged.append(str(number))
    if damaged:
        say(f"{path}: damaged lines are removed: {', '.join(damaged)}")
    return found
