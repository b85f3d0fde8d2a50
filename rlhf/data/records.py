"""Data sets in memory. They are read and tokenized once. The samples of a step depend only on the seed and the step."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from rlhf.config import Data
from rlhf.contracts import Form, Sample, Text
from rlhf.data import columns, sets
from rlhf.data.columns import Columns, Conversation, Record
from rlhf.data.forms import Need
from rlhf.data.limits import Limits
from rlhf.data.reader import Reader
from rlhf.data.tokenizer import Tokenizer

MOST = 600  # characters of a part of the first record that are shown
LEARNED = (">>>", "<<<")  # enclose the learned parts of the first record


@dataclass(slots=True)
class Counts:
    """Numbers of lines."""

    kept: int = 0  # including truncated lines
    truncated: int = 0  # longer than the limits and cut (data.overlong=truncate)
    dropped: int = 0  # longer than the limits and dropped (data.overlong=drop)
    skipped: int = 0  # invalid and skipped (data.invalid=skip)
    reason: str = ""  # why the first of them was skipped

    @classmethod
    def of(cls, columns: Columns) -> "Counts":
        kept, truncated, dropped, skipped = columns.counts.tolist()
        return cls(kept, truncated, dropped, skipped, columns.reason.tobytes().decode())

    def __str__(self) -> str:
        text = f"{self.kept} records ({self.truncated} truncated, {self.dropped} dropped)"
        if not self.skipped:
            return text
        share = self.skipped / (self.kept + self.dropped + self.skipped)
        return f"{text}, {self.skipped} invalid lines skipped ({share:.2%}; the first: {self.reason})"


class Records:
    """The records of a data set, or of several with weights.

    They take 5 bytes per token, plus the lines. With a cache, the processes of a node share them.
    sets      name -> numbers of lines, in order
    weights   of the data sets: their shares of the draws, as ratios
    """

    def __init__(self, tokenizer: Tokenizer, columns: Mapping[str, Columns], weights: Sequence[Fraction]) -> None:
        self.sets, self.weights = {name: Counts.of(held) for name, held in columns.items()}, weights
        self._tokenizer, self._columns = tokenizer, list(columns.items())

    @classmethod
    def load(
        cls,
        path: str | Path,
        form: Form,
        tokenizer: Tokenizer,
        config: Data,
        *,
        name: str = "",
        max_prompt: int | None = None,
        required: tuple[Need, ...] = (),
        cache: Path | None = None,
        first: bool = False,
    ) -> "Records":
        """Read the files of a data set (lines.files) in order.

        form: the key of forms.FORMS for its lines. name: its name (rlhf.data.sets). max_prompt: largest number of
        tokens of a prompt without a response, if that is less than data.max_tokens. required: further keys that each
        line must have, such as the answer for a reward function. cache: folder for the tokens. The next load of the
        same data reads them from there. first: read only the first lines.
        Raises UserError with file:line for the first invalid line, and for a data set without records.
        """
        path = Path(path)
        folder = cache and cache / columns.digest(path, tokenizer, config, form, max_prompt, required)[:40]
        known = columns.read(folder) if folder else None
        if known is None:
            known = Reader(form, tokenizer, config, Limits(tokenizer, config, max_prompt), required).read(path, first)
            if folder:
                columns.write(folder, known)
                known = columns.read(folder) or known  # memory-mapped, so this process keeps no copy
        return cls(tokenizer, {name: known}, [Fraction(1)])

    @classmethod
    def joined(cls, parts: "Sequence[Records]", weights: Mapping[str, float]) -> "Records":
        """Return the records of data sets with different names. weights: name -> weight, else 1.

        Raises UserError if no data set has the name of a weight.
        """
        held = {name: columns for part in parts for name, columns in part._columns}
        return cls(parts[0]._tokenizer, held, sets.weights(list(held), weights))

    def __len__(self) -> int:
        return sum(len(columns) for _, columns in self._columns)

    @property
    def counts(self) -> Counts:
        """The numbers of lines of the only data set."""
        (counts,) = self.sets.values()
        return counts

    @property
    def templates(self) -> set[str]:
        """The templates that the records are written with."""
        return {template for _, columns in self._columns for template in columns.templates.tolist()}

    @property
    def epoch(self) -> tuple[str, Fraction]:
        """The name of the data set of which one pass takes the most draws, and the number of these draws."""
        i, draws = sets.epoch(self.weights, [len(columns) for _, columns in self._columns])
        return self._columns[i][0], draws

    def passes(self, draws: int) -> dict[str, float]:
        """Return how often `draws` draws read each data set: name -> number of passes."""
        counts = zip(self._columns, sets.counts(self.weights, draws), strict=True)
        return {name: count / len(columns) for (name, columns), count in counts}

    def first(self) -> str:
        """Return the first record of each data set as the model sees it, with marks around what is learned.

        Long texts are cut.
        """
        return "\n".join(self._first(place) for place in range(len(self._columns)))

    def _first(self, place: int) -> str:
        several, [sample, *_] = len(self._columns) > 1, self._samples([(place, 0)])
        template, what = sample.text.template, "a prompt"
        if template == "plain" and self._tokenizer.chats:
            template += " without the tokenizer's chat template"
        if sample.mask.any():
            what = f"{' and '.join(LEARNED)} enclose what is learned"
        most = 4 * MOST // len(self._columns)
        lines = _shortened(_marked(self._tokenizer, sample), "\n[...]\n", most).split("\n")
        title = f"first record{f' of {sample.text.set}' if several else ''}, template {template} ({what}):"
        return "\n".join([title, *(f"  | {line}" for line in lines)])

    def draw(self, step: int, count: int, seed: int) -> list[Sample]:
        """Return the samples of `count` records for a step (counted from 0). group is the record's index in the step.

        Each pass over a data set has a permutation of its records, which depends only on the seed and the pass. Steps
        take records from these permutations in order: from each data set as many as sets.counts() gives it, in shuffled
        places, so that no rank gets one data set only. So every record comes once per pass, a step may span passes, and
        no state is needed.
        """
        begin, end = (sets.counts(self.weights, n * count) for n in (step, step + 1))
        drawn = [self._drawn(i, *span, seed) for i, span in enumerate(zip(begin, end, strict=True))]
        dealt = [i for i, records in enumerate(drawn) for _ in records]
        following = [iter(records) for records in drawn]
        order = permutation(count, seed, step, len(drawn))
        return self._samples((dealt[place], next(following[dealt[place]])) for place in order)

    def _drawn(self, i: int, begin: int, end: int, seed: int) -> list[int]:
        """Return the indices of a data set's draws `begin` to `end` - 1, counted over the whole run."""
        size = len(self._columns[i][1])
        orders = {index: permutation(size, seed, index, i) for index in range(begin // size, -(-end // size))}
        return [orders[n // size][n % size] for n in range(begin, end)]

    def head(self, count: int) -> list[Sample]:
        """Return the samples of the first `count` records in the order of the files; count=0: of all records."""
        every = ((i, n) for i, (_, columns) in enumerate(self._columns) for n in range(len(columns)))
        return self._samples(itertools.islice(every, count or None))

    def _samples(self, places: Iterable[tuple[int, int]]) -> list[Sample]:
        """Return the samples of records. places: index of the data set, and of the record in it."""
        records = ((name, columns.record(n)) for i, n in places for name, columns in [self._columns[i]])
        return [
            self._sample(name, record, said, group)
            for group, (name, record) in enumerate(records)
            for said in record.siblings
        ]

    def _sample(self, name: str, record: Record, said: Conversation, group: int) -> Sample:
        num_prompt = int(said.learn.argmax()) if said.learn.any() else len(said.ids)
        prompt = said.ids[:num_prompt].tolist()
        if prompt[:1] == [self._tokenizer.bos]:
            prompt = prompt[1:]
        return Sample(
            tokens=np.array(said.ids),  # a copy, because memory-mapped columns are read-only
            mask=np.array(said.learn[1:]),
            group=group,
            reward=said.reward,
            truncated=said.truncated,
            text=Text(
                record.row,
                json.loads(record.line),
                self._tokenizer.decode(prompt, skip_special=False),
                template=record.template,
                set=name,
            ),
        )


def _marked(tokenizer: Tokenizer, sample: Sample) -> str:
    """Return the text of a sample with marks around its learned parts, each part without its middle if it is long."""
    text, shown, start = "", "", 0
    for learned, run in itertools.groupby([False, *sample.mask.tolist()]):
        start += len(list(run))
        known, text = text, tokenizer.decode(sample.tokens[:start].tolist(), skip_special=False)
        part = _shortened(text[len(known) :], " [...] ")
        shown += f"{LEARNED[0]}{part}{LEARNED[1]}" if learned else part
    return shown


def _shortened(text: str, gap: str, most: int = MOST) -> str:
    """Return a text of more than `most` characters without its middle."""
    return text if len(text) <= most else text[: most // 2] + gap + text[-(most // 2) :]


def permutation(size: int, seed: int, index: int, stream: int = 0) -> np.ndarray:
    """Return the order of a pass over a data set, or of a step. index: its number. stream: the number of the data set.

    It sorts raw Philox bits. Numpy guarantees that these stay the same in later versions, unlike its shuffles.
    """
    bits = np.random.Philox(np.random.SeedSequence((seed, index, stream))).random_raw(size)
    return np.argsort(bits, kind="stable")
