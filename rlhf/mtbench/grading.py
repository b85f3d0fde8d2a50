"""Asks a judge for the judgments that are missing, and keeps each reply at once in a file of FastChat's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rlhf import errors, progress, texts
from rlhf.errors import JudgingError
from rlhf.judge.client import Client, JudgeError, RefusedError
from rlhf.mtbench import rows
from rlhf.mtbench.judgments import ERROR, FAILED, Judgment, Request, restore
from rlhf.mtbench.rows import Row
from rlhf.output import Progress, say

LETTERS = 4  # characters per token, for the estimate; English text has about as many
FAILURES = 8  # after so many failed requests in a row, or replies that are cut before their result, no other is sent


async def grade(path: Path, client: Client, judgments: list[Judgment]) -> None:
    """Complete the judgments with the replies in a file, and with those of the judge, which are added to the file.

    A file that a killed process has left is repaired. A request that the endpoint refuses stays without a reply. Raises
    JudgingError if requests have failed. The others are in the file then, and another call sends only the requests that
    are left. Raises UserError if the file has replies to other requests.
    """
    _tidy(path, judgments)
    left = [(judgment, request) for judgment in judgments for request in judgment.left]
    total = sum(len(judgment.requests) for judgment in judgments)
    say(_plan(client, total - len(left), [request for _, request in left]))
    if not left:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with errors.naming(path), path.open("a") as file, Progress("judge", "requests", len(left), shown=True) as shown:
        faults = await _ask(client, left, file, shown)
    _tidy(path, judgments)
    missing = sum(len(judgment.left) for judgment in judgments)
    count = f"{total - missing} of {total} requests have a reply, in {path}, and {missing} have none"
    if faults.failed:
        raise JudgingError(f"{count}: {faults.failed}; start again: only those are sent")
    if faults.cut:
        limit = f"cut at judge.max_tokens={client.config.max_tokens}: raise it, and set another out"
        say(f"{faults.cut} replies without a result were {limit}")
        if faults.streak >= FAILURES and missing:
            raise JudgingError(f"{count}: the last {faults.streak} replies were {limit}")
    if faults.refused and missing == total:
        raise JudgingError(f"{count}: {faults.refused}")
    if faults.refused:
        say(f"{count}, because the endpoint refuses them; the table counts them as failed: {faults.refused}")


@dataclass(slots=True)
class Faults:
    """What was wrong with requests."""

    failed: str = ""  # the last error of a request that may succeed in another call
    refused: str = ""  # the last error of a request that the endpoint refuses
    cut: int = 0  # replies without a result that reached the limit of tokens
    streak: int = 0  # the last requests that failed, or had such a reply


async def _ask(client: Client, left: list[tuple[Judgment, Request]], file: TextIO, shown: Progress) -> Faults:
    """Send requests, until FAILURES in a row have failed."""
    queue, faults = iter(left), Faults()

    async def work() -> None:
        for judgment, request in queue:
            if faults.streak >= FAILURES:
                return
            try:
                reply = await client.ask(request.messages)
            except RefusedError as error:
                faults.refused = str(error)
                continue
            except JudgeError as error:
                faults.failed, faults.streak = str(error), faults.streak + 1
                continue
            lost = reply.cut and request.result(reply.text) in (FAILED, ERROR)
            faults.cut, faults.streak = faults.cut + lost, faults.streak + 1 if lost else 0
            judgment.replies[request] = reply.text
            file.write(f"{json.dumps(judgment.line())}\n")
            file.flush()  # a killed process loses nothing that was paid for
            shown.add(1, len(reply.text) // LETTERS)
            progress.move()

    await asyncio.gather(*(work() for _ in range(min(client.config.concurrency, len(left)))))
    return faults


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
        with rows.at(str(path)):
            kept = restore(_rows(path), judgments)
        rows.write(path, kept)


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
