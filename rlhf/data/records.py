"""A data set in memory. It is read and tokenized once. The samples of a step depend only on the seed and the step."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.config import Data
from rlhf.contracts import Form, Sample, Text
from rlhf.data import columns
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

    def __str__(self) -> str:
        text = f"{self.kept} records ({self.truncated} truncated, {self.dropped} dropped)"
        if not self.skipped:
            return text
        share = self.skipped / (self.kept + self.dropped + self.skipped)
        return f"{text}, {self.skipped} invalid lines skipped ({share:.2%}; the first: {self.reason})"


class Records:
    """A data set. It takes 5 bytes per token, plus the lines. With a cache, the processes of a node share them."""

    def __init__(self, tokenizer: Tokenizer, columns: Columns) -> None:
        kept, truncated, dropped, skipped = columns.counts.tolist()
        self.counts = Counts(kept, truncated, dropped, skipped, columns.reason.tobytes().decode())
        self._tokenizer, self._columns = tokenizer, columns

    @classmethod
    def load(
        cls,
        path: str | Path,
        form: Form,
        tokenizer: Tokenizer,
        config: Data,
        *,
        max_prompt: int | None = None,
        required: tuple[Need, ...] = (),
        cache: Path | None = None,
        first: bool = False,
    ) -> "Records":
        """Read the files of a data set (lines.files) in order.

        form: the key of forms.FORMS for its lines. max_prompt: largest number of tokens of a prompt without a response,
        if that is less than data.max_tokens. required: further keys that each line must have, such as the answer for a
        reward function. cache: folder for the tokens. The next load of the same data reads them from there.
        first: read only the first lines.
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
        return cls(tokenizer, known)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def templates(self) -> set[str]:
        """The templates that the records are written with."""
        return set(self._columns.templates.tolist())

    def first(self) -> str:
        """Return the first record as the model sees it, with marks around what is learned. Long texts are cut."""
        sample = self.head(1)[0]
        template, what = sample.text.template, "a prompt"
        if template == "plain" and self._tokenizer.chats:
            template += " without the tokenizer's chat template"
        if sample.mask.any():
            what = f"{' and '.join(LEARNED)} enclose what is learned"
        lines = _shortened(_marked(self._tokenizer, sample), "\n[...]\n", 4 * MOST).split("\n")
        return "\n".join([f"first record, template {template} ({what}):", *(f"  | {line}" for line in lines)])

    def draw(self, step: int, count: int, seed: int) -> list[Sample]:
        """Return the samples of `count` records for a step (counted from 0). group is the record's index in the step.

        Each epoch has a permutation of the records, which depends only on the seed and the epoch. Steps take records
        from these permutations in order. So every record comes once per epoch, a step may span epochs, and no state is
        needed.
        """
        first, stop = step * count, (step + 1) * count
        orders = {
            epoch: permutation(len(self), seed, epoch)
            for epoch in range(first // len(self), (stop - 1) // len(self) + 1)
        }
        places = (divmod(n, len(self)) for n in range(first, stop))
        return self._samples(orders[epoch][place] for epoch, place in places)

    def head(self, count: int) -> list[Sample]:
        """Return the samples of the first `count` records in the order of the files; count=0: of all records."""
        return self._samples(range(len(self))[: count or None])

    def _samples(self, places: Iterable[int]) -> list[Sample]:
        records = (self._columns.record(place) for place in places)
        return [self._sample(record, said, group) for group, record in enumerate(records) for said in record.siblings]

    def _sample(self, record: Record, said: Conversation, group: int) -> Sample:
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


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch.

    It sorts raw Philox bits. Numpy guarantees that these stay the same in later versions, unlike its shuffles.
    """
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(size)
    return np.argsort(bits, kind="stable")
