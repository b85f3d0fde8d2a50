"""Lines of jsonl files as samples: read, checked and tokenized once, then drawn as a pure function of (seed, step, index)."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.config import Data
from rlhf.contracts import Form, Sample, Text
from rlhf.data import columns
from rlhf.data.columns import Columns, Conversation, Record
from rlhf.data.forms import Keys
from rlhf.data.limits import Limits
from rlhf.data.reader import Reader
from rlhf.data.tokenizer import Tokenizer


@dataclass(slots=True)
class Counts:
    """What became of the lines."""

    kept: int = 0  # truncated ones included
    truncated: int = 0  # cut to the limits (data.overlong=truncate)
    dropped: int = 0  # over the limits and left out (data.overlong=drop)

    def __str__(self) -> str:
        return f"{self.kept} records ({self.truncated} truncated, {self.dropped} dropped)"


class Records:
    """A data set: 5 bytes per token, beside the lines themselves. Where there is a cache, the processes of a node share them."""

    def __init__(self, tokenizer: Tokenizer, columns: Columns) -> None:
        self.counts = Counts(*columns.counts.tolist())
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
        required: Keys = (),
        cache: Path | None = None,
    ) -> "Records":
        """Read a file, or all the files of a folder in the order of their names.

        form: which of forms.FORMS its lines have. max_prompt: most tokens of a prompt to be answered, where that is
        less than data.max_tokens. required: further keys that each line must have, such as the answer that a reward compares with.
        cache: folder for the tokens, which whoever loads the same data next takes from there.
        Raises UserError naming file:line for every line that does not fit, and for a data set without records.
        """
        path = Path(path)
        folder = cache and cache / columns.digest(path, tokenizer, config, form, max_prompt, required)[:40]
        known = columns.read(folder) if folder else None
        if known is None:
            known = Reader(form, tokenizer, config, Limits(tokenizer, config, max_prompt), required).read(path)
            if folder:
                columns.write(folder, known)
                known = columns.read(folder) or known  # mapped: nobody keeps a copy of its own
        return cls(tokenizer, known)

    def __len__(self) -> int:
        return len(self._columns)

    def draw(self, step: int, count: int, seed: int) -> list[Sample]:
        """The samples of `count` records at a step, counted from 0. group is the record's place in the step.

        Records are taken from a chain of permutations, one per epoch, each decided by (seed, epoch) alone. So every record comes
        once per epoch, a step may span epochs, and nothing has to be remembered between steps.
        """
        first, stop = step * count, (step + 1) * count
        orders = {epoch: permutation(len(self), seed, epoch) for epoch in range(first // len(self), (stop - 1) // len(self) + 1)}
        places = (divmod(n, len(self)) for n in range(first, stop))
        return self._samples(orders[epoch][place] for epoch, place in places)

    def head(self, count: int) -> list[Sample]:
        """The samples of the first records in the order of the files; count 0: of all."""
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
            tokens=np.array(said.ids),  # a copy: what is mapped is not to be written to
            mask=np.array(said.learn[1:]),
            group=group,
            reward=said.reward,
            truncated=said.truncated,
            text=Text(record.row, json.loads(record.line), self._tokenizer.decode(prompt, skip_special=False)),
        )


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch. Sorted from raw Philox bits, which numpy promises not to change, unlike its own shuffles."""
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(size)
    return np.argsort(bits, kind="stable")
