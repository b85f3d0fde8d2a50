"""Lines to columns of tokens, on all CPUs.

What a line becomes depends on the line and the reader alone. So chunks of lines are read by processes of their own and put together in
order: the columns are bitwise those that one process makes, and the mistake that is told is the first one in the files.
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

from rlhf.config import Data
from rlhf.contracts import Form
from rlhf.data import forms, jsonl, templates
from rlhf.data.columns import Columns, Conversation, Record
from rlhf.data.forms import Keys
from rlhf.data.limits import Limits, trimmed
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

CHUNK = 1 << 19  # bytes of lines that a process is given at a time: about 0.2 s of work
LEAST = 4  # chunks for each process, or its start would not pay
MOST = 32  # processes: more than this one can feed

Line = tuple[int, str, bytes]  # its place among the lines of all files, "file:line", content


@dataclass(frozen=True, slots=True)
class Reader:
    """How the lines of a data set become tokens."""

    form: Form
    tokenizer: Tokenizer
    data: Data
    fit: Limits
    required: Keys

    def read(self, path: Path) -> Columns:
        """The records of a file, or of the files of a folder in the order of their names.

        Raises UserError naming file:line for the first line that does not fit, and for a data set without records.
        """
        chunks = list(_chunks(path))
        processes = min(len(os.sched_getaffinity(0)), MOST, len(chunks) // LEAST)
        columns = Columns.joined(self._apart(path, chunks, processes) if processes > 1 else list(map(self.columns, chunks)))
        if not len(columns):
            dropped = columns.counts[-1]
            why = f"{dropped} lines, all over data.max_tokens; raise it" if dropped else "no lines; set data.train and data.eval"
            raise UserError(f"data set {path} has no records: {why}")
        return columns

    def columns(self, chunk: list[Line]) -> Columns:
        """The records of some lines. Raises UserError naming file:line."""
        learn = "last" if self.form in forms.COMPARED else self.data.learn
        records, truncated, dropped = [], 0, 0
        for row, where, line in chunk:
            try:
                told = forms.read(line, self.form, self.required)
                siblings = [trimmed(templates.encode(self.tokenizer, self.data.template, messages, learn)) for messages, _ in told]
                over = self.fit.over(siblings)
                if over and self.data.overlong == "drop":  # all of them
                    dropped += 1
                    continue
                truncated += over
                said = [_conversation(*cut, reward) for cut, (_, reward) in zip(self.fit.cut(siblings), told, strict=True)]
                records.append(Record(row, line, said))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        return Columns.of(records, (len(records), truncated, dropped))

    def _apart(self, path: Path, chunks: list[list[Line]], processes: int) -> list[Columns]:
        """columns() of each chunk, from other processes.

        Not forked: no fork survives a CUDA context or the threads of an engine. Not a pool of the standard library: before Python 3.11.5
        that waits for ever when one of its processes is killed.
        """
        pairs = [get_context("spawn").Pipe() for _ in range(processes)]
        started = [get_context("spawn").Process(target=_serve, args=(self, theirs)) for _, theirs in pairs]
        found: list[Columns | UserError] = []
        try:
            for process, (_, theirs) in zip(started, pairs, strict=True):
                _start(process)
                theirs.close()  # so that the end of the process is that of the connection
            found = _deal(chunks, [ours for ours, _ in pairs])
        except (EOFError, OSError):
            raise UserError(f"data set {path}: a process that tokenizes it was killed; if memory ran out, give the job more") from None
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
    """All lines, in order; one chunk at least."""
    chunk: list[Line] = []
    size = 0
    for row, (where, line) in enumerate(jsonl.lines(path)):
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append((row, where, line))
        size += len(line)
    yield chunk


def _start(process: SpawnProcess) -> None:
    """Start it with Ctrl-C blocked: it comes to all processes, and the first one answers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _deal(chunks: list[list[Line]], connections: list[Connection]) -> list[Columns | UserError]:
    """The answers to the chunks, in their order, up to a mistake. Raises EOFError or OSError where a process ends."""
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
            answers[asked.pop(connection)] = connection.recv()
            idle.append(connection)


def _serve(reader: Reader, connection: Connection) -> None:
    """Be a process of a reader: answer each chunk. It ends with the process that started it, however that ends."""
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
