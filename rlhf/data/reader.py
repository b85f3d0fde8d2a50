"""Tokenizes the lines of a data set into columns, on all CPUs.

The tokens of a line depend only on the line and the reader. So worker processes tokenize chunks of lines, which are
then joined in order. The columns are bitwise equal to those of a single process, and an error is the first one in the
files.
"""

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Thread

import numpy as np

from rlhf import progress
from rlhf.config import Data
from rlhf.contracts import Form
from rlhf.data import forms, lines, templates
from rlhf.data.columns import Columns, Conversation, Record
from rlhf.data.forms import Need
from rlhf.data.limits import Encoded, Limits, trimmed
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

CHUNK = 1 << 19  # bytes of lines per chunk: about 0.2 s of work
LEAST = 4  # smallest number of chunks per process for which its start is worth the time
MOST = 32  # largest number of processes; this process cannot send chunks to more
MOST_SKIPPED = 0.5  # largest share of skipped lines; more are probably a mistake in a key or in the form of the data

Line = tuple[int, str, bytes]  # index among the lines of all files, and what lines.read() yields


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads and tokenizes the lines of a data set."""

    form: Form
    tokenizer: Tokenizer
    data: Data
    fit: Limits
    required: tuple[Need, ...]

    def read(self, path: Path, first: bool = False) -> Columns:
        """Return the records of a data set, in the order of its files.

        first: read only chunks of lines until one has a record.
        Raises UserError with file:line for the first invalid line, for a data set without records, and for one of which
        more than half of the lines are skipped (data.invalid=skip).
        """
        if first and (found := next(filter(len, map(self.columns, _chunks(path))), None)):
            return found
        chunks = list(_chunks(path))
        processes = min(len(os.sched_getaffinity(0)), MOST, len(chunks) // LEAST)
        columns = Columns.joined(
            self._apart(path, chunks, processes) if processes > 1 else list(map(self.columns, chunks))
        )
        _, _, dropped, skipped = columns.counts.tolist()
        if skipped > (len(columns) + dropped + skipped) * MOST_SKIPPED:
            many = f"{skipped} of {len(columns) + dropped + skipped} lines are invalid, more than half; the first is"
            raise UserError(f"data set {path}: {many} {columns.reason.tobytes().decode()}")
        if not len(columns):
            too_long = f"all {dropped} lines are longer than data.max_tokens; raise it"
            why = too_long if dropped else "it has no lines; set data.train and data.eval"
            raise UserError(f"data set {path} has no records: {why}")
        return columns

    def columns(self, chunk: list[Line]) -> Columns:
        """Return the records of some lines. Raises UserError with file:line."""
        records, truncated, dropped, skipped, reason = [], 0, 0, 0, ""
        for row, where, line in chunk:
            try:
                try:
                    template, siblings, rewards = self._encoded(line)
                except UserError as error:
                    if self.data.invalid == "error":
                        raise
                    skipped, reason = skipped + 1, reason or f"{where}: {error}"
                    continue
                over = self.fit.over(siblings)
                if over and self.data.overlong == "drop":  # drop all conversations of the group
                    dropped += 1
                    continue
                truncated += over
                cuts = zip(self.fit.cut(siblings, template), rewards, strict=True)
                records.append(Record(row, line, template, [_conversation(*cut, reward) for cut, reward in cuts]))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        return Columns.of(records, (len(records), truncated, dropped, skipped), reason)

    def _encoded(self, line: bytes) -> tuple[str, list[Encoded], list[float]]:
        """Return the template of a line, the tokens and the reward of each conversation. Raises UserError."""
        learn = "last" if self.form in forms.COMPARED else self.data.learn
        content = forms.read(line, self.form, self.required)
        template = templates.choose(self.tokenizer, self.data.template, content.told[0][0], content.is_text)
        asked = template == "tokenizer" or not content.is_text  # else `tools` is a key of the reward function
        tools = templates.read_tools(content.tools) if asked else None
        encoded = [templates.encode(self.tokenizer, template, messages, learn, tools) for messages, _ in content.told]
        return template, [trimmed(each) for each in encoded], [reward for _, reward in content.told]

    def _apart(self, path: Path, chunks: list[list[Line]], processes: int) -> list[Columns]:
        """Return columns() of each chunk, computed by worker processes.

        The processes are not forked, because a fork does not work with a CUDA context or with threads. The standard
        library's pool is not used, because before Python 3.11.5 it hangs when one of its processes is killed.
        """
        pairs = [get_context("spawn").Pipe() for _ in range(processes)]
        started = [get_context("spawn").Process(target=_serve, args=(self, theirs)) for _, theirs in pairs]
        found: list[Columns | UserError] = []
        try:
            for process, (_, theirs) in zip(started, pairs, strict=True):
                _start(process)
                theirs.close()  # then the connection closes when the process ends
            found = _deal(chunks, [ours for ours, _ in pairs])
        except (EOFError, OSError):
            killed = "a process that tokenizes it was killed; if memory ran out, give the job more memory"
            raise UserError(f"data set {path}: {killed}") from None
        finally:
            for process in started:
                if process.pid:
                    process.kill()
                    process.join()
            for connection in itertools.chain(*pairs):
                connection.close()
        columns = []
        for answer in found:
            if isinstance(answer, UserError):
                raise answer
            columns.append(answer)
        return columns


def _chunks(path: Path) -> Iterator[list[Line]]:
    """Yield all lines in chunks, in order. There is at least one chunk."""
    chunk: list[Line] = []
    size = 0
    for row, (where, line) in enumerate(lines.read(path)):
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append((row, where, line))
        size += len(line)
    yield chunk


def _start(process: SpawnProcess) -> None:
    """Start a process with SIGINT blocked. Ctrl-C is sent to all processes, and only the parent handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _deal(chunks: list[list[Line]], connections: list[Connection]) -> list[Columns | UserError]:
    """Send the chunks to the processes, and return the answers in order. Stop after the first UserError.

    Raises EOFError or OSError if a process ends.
    """
    answers: dict[int, Columns | UserError] = {}
    asked: dict[Connection, int] = {}
    idle, following = list(connections), 0
    while True:
        mistaken = any(isinstance(answer, UserError) for answer in answers.values())
        while idle and following < len(chunks) and not mistaken:
            connection = idle.pop()
            connection.send(chunks[following])
            asked[connection], following = following, following + 1
        if not asked:
            return [answers[i] for i in range(following)]
        ready = wait(list(asked))
        for connection in [connection for connection in asked if connection in ready]:
            progress.move()
            answers[asked.pop(connection)] = connection.recv()
            idle.append(connection)


def _serve(reader: Reader, connection: Connection) -> None:
    """The main function of a worker process: answer each chunk until the parent process ends."""
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError):
        while True:
            chunk = connection.recv()
            try:
                connection.send(reader.columns(chunk))
            except UserError as error:
                connection.send(error)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent, "only a child process has a parent to wait for"
    parent.join()
    os._exit(1)


def _conversation(ids: list[int], learn: list[bool], truncated: bool, reward: float) -> Conversation:
    return Conversation(np.array(ids, np.int32), np.array(learn, bool), truncated, reward)
