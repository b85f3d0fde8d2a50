"""Lines of jsonl files as samples: read, checked and tokenized once, then drawn as a pure function of (seed, step, index)."""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.config import Data
from rlhf.contracts import Sample, UserError
from rlhf.data import forms, jsonl, templates
from rlhf.data.forms import Keys
from rlhf.data.limits import Encoded, Limits, trimmed
from rlhf.data.tokenizer import Tokenizer


@dataclass(slots=True)
class Counts:
    """What became of the lines."""

    kept: int = 0  # truncated ones included
    truncated: int = 0  # cut to the limits (data.overlong=truncate)
    dropped: int = 0  # over the limits and left out (data.overlong=drop)


@dataclass(frozen=True, slots=True)
class Span:
    """Where the tokens of one conversation lie."""

    start: int
    stop: int
    truncated: bool  # the limit cut the response
    reward: float  # what the form says that the response is worth


@dataclass(frozen=True, slots=True)
class Record:
    """One line that was kept."""

    row: int  # its place among the lines of all files
    line: bytes
    spans: tuple[Span, ...]


class Records:
    """A data set in memory: 4 bytes and a bit of mask per token, beside the lines themselves."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.counts = Counts()
        self._tokenizer = tokenizer
        self._records: list[Record] = []
        self._tokens = array("i")
        self._learn = bytearray()

    @classmethod
    def load(
        cls, path: str | Path, mode: str, tokenizer: Tokenizer, config: Data, max_prompt: int | None = None, required: Keys = ()
    ) -> "Records":
        """Read a file, or all the files of a folder in the order of their names.

        mode decides which forms a line may have (forms.FORMS). max_prompt: most tokens of a prompt to be answered, where that is
        less than data.max_tokens. required: further keys that each line must have, such as the answer that a reward compares with.
        Raises UserError naming file:line for every line that does not fit, and for a data set without records.
        """
        records = cls(tokenizer)
        fit = Limits(tokenizer, config, max_prompt)
        learn = "last" if mode in forms.COMPARED else config.learn
        for row, (where, line) in enumerate(jsonl.lines(Path(path))):
            try:
                told = forms.read(line, mode, required)
                siblings = [trimmed(templates.encode(tokenizer, config.template, messages, learn)) for messages, _ in told]
                records._add(row, line, siblings, [reward for _, reward in told], fit)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        if not records._records:
            dropped = records.counts.dropped
            why = f"{dropped} lines, all over data.max_tokens; raise it" if dropped else "no lines; set data.train and data.eval"
            raise UserError(f"data set {path} has no records: {why}")
        return records

    def __len__(self) -> int:
        return len(self._records)

    def draw(self, step: int, count: int, seed: int) -> list[Sample]:
        """The samples of `count` records at a step, counted from 0. group is the record's place in the step.

        Records are taken from a chain of permutations, one per epoch, each decided by (seed, epoch) alone. So every record comes
        once per epoch, a step may span epochs, and nothing has to be remembered between steps.
        """
        first, stop = step * count, (step + 1) * count
        orders = {epoch: permutation(len(self), seed, epoch) for epoch in range(first // len(self), (stop - 1) // len(self) + 1)}
        places = (divmod(n, len(self)) for n in range(first, stop))
        return self._samples(self._records[orders[epoch][place]] for epoch, place in places)

    def head(self, count: int) -> list[Sample]:
        """The samples of the first records in the order of the files; count 0: of all."""
        return self._samples(iter(self._records[: count or None]))

    def _samples(self, records: Iterator[Record]) -> list[Sample]:
        return [self._sample(record, rank, group) for group, record in enumerate(records) for rank in range(len(record.spans))]

    def _sample(self, record: Record, rank: int, group: int) -> Sample:
        span = record.spans[rank]
        tokens = np.frombuffer(self._tokens[span.start : span.stop], np.int32)
        learn = np.frombuffer(self._learn[span.start : span.stop], bool)
        num_prompt = int(learn.argmax()) if learn.any() else len(tokens)
        prompt = tokens[:num_prompt].tolist()
        if prompt[:1] == [self._tokenizer.bos]:
            prompt = prompt[1:]
        return Sample(
            tokens=tokens,
            mask=learn[1:],
            group=group,
            reward=span.reward,
            truncated=span.truncated,
            meta={"row": record.row, "prompt": self._tokenizer.decode(prompt, skip_special=False), "record": json.loads(record.line)},
        )

    def _add(self, row: int, line: bytes, siblings: list[Encoded], rewards: list[float], fit: Limits) -> None:
        """Keep a line's conversations, or leave all of them out."""
        if fit.over(siblings):
            if fit.overlong == "drop":
                self.counts.dropped += 1
                return
            self.counts.truncated += 1
        self.counts.kept += 1
        spans = (self._store(*cut, reward) for cut, reward in zip(fit.cut(siblings), rewards, strict=True))
        self._records.append(Record(row, line, tuple(spans)))

    def _store(self, ids: list[int], learn: list[bool], truncated: bool, reward: float) -> Span:
        start = len(self._tokens)
        self._tokens.extend(ids)
        self._learn.extend(learn)
        return Span(start, len(self._tokens), truncated, reward)


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch. Sorted from raw Philox bits, which numpy promises not to change, unlike its own shuffles."""
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(size)
    return np.argsort(bits, kind="stable")
