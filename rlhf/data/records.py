"""Lines of jsonl files as samples: read, checked and tokenized once, then drawn as a pure function of (seed, step, index)."""

import gzip
import json
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import Data
from rlhf.contracts import Sample, UserError
from rlhf.data import templates
from rlhf.data.templates import Message
from rlhf.data.tokenizer import Tokenizer

Row = dict[str, Any]
Keys = tuple[str, ...]
Encoded = tuple[list[int], list[bool]]  # token ids, and which of them are learned
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def _turns(row: Row, key: str) -> list[Message]:
    """The conversation up to a response: a text is what the user says."""
    value = row[key]
    if isinstance(value, list):
        messages = templates.validate(value)
        if messages[-1]["role"] == "assistant":
            raise UserError(f"{key!r} ends with the assistant, who is to answer it; end it with the user")
        return messages
    return [{"role": "user", "content": _text(row, key)}]


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        raise UserError(f"{key!r} is {row[key]!r:.80}; give a string")
    if not row[key].strip():
        raise UserError(f"{key!r} is empty; give it a text or remove the line")
    return row[key]


def _prompt(row: Row, keys: Keys) -> list[list[Message]]:
    return [_turns(row, keys[0])]


def _exchange(row: Row, keys: Keys) -> list[list[Message]]:
    return [[*_turns(row, keys[0]), {"role": "assistant", "content": _text(row, keys[1])}]]


def _conversation(row: Row, keys: Keys) -> list[list[Message]]:
    messages = templates.validate(row[keys[0]])
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{keys[0]!r} ends with {messages[-1]['role']!r}; end it with the assistant, whose turns are learned")
    return [messages]


# The forms of a line: the keys that make it one, and what reads its conversations. A line is of the first form whose keys it
# has; whatever other keys it has are left to rewards. Several conversations are siblings of one group, the best one first.
Form = Callable[[Row, Keys], list[list[Message]]]
PROMPTS: dict[Keys, Form] = {("prompt",): _prompt, ("query",): _prompt, ("question",): _prompt}
RESPONSES: dict[Keys, Form] = {
    ("messages",): _conversation,
    ("prompt", "response"): _exchange,
    ("query", "response"): _exchange,
    ("question", "answer"): _exchange,
}
FORMS = {"sft": RESPONSES, "grpo": PROMPTS, "evaluate": PROMPTS}


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


@dataclass(frozen=True, slots=True)
class Record:
    """One line that was kept."""

    row: int  # its place among the lines of all files
    content: Row
    spans: tuple[Span, ...]


class Limits:
    """How long a conversation may be, and what happens to a longer one."""

    def __init__(self, tokenizer: Tokenizer, config: Data, max_prompt: int | None) -> None:
        self.max_tokens = config.max_tokens
        self.max_prompt = config.max_tokens if max_prompt is None else min(max_prompt, config.max_tokens)
        self.overlong, self.template, self.tokenizer = config.overlong, config.template, tokenizer

    def over(self, encoded: Encoded) -> bool:
        """Whether a conversation is too long. Raises UserError if that is an error."""
        ids, learn = encoded
        limit = self._limit(learn)
        if len(ids) > limit and self.overlong == "error":
            what = "conversation" if any(learn) else "prompt"
            remedy = "shorten it, raise data.max_tokens, or set data.overlong to truncate or drop"
            raise UserError(f"{what} of {len(ids)} tokens is longer than {limit}; {remedy}")
        return len(ids) > limit

    def cut(self, ids: list[int], learn: list[bool]) -> tuple[list[int], list[bool], bool]:
        """The conversation within its limit, and whether its response was cut.

        What stands before the last response is cut from the left, sparing the bos and the cue, token by token: a turn may lose
        its beginning. A response that does not fit even so is cut at its right and loses its eos.
        """
        limit = self._limit(learn)
        if len(ids) <= limit:
            return ids, learn, False
        start = _last_response(learn)
        bos = ids[:1] if ids[0] == self.tokenizer.bos else []
        least = len(bos) + templates.num_cue(self.tokenizer, self.template)
        if limit <= least:
            raise UserError(f"data.max_tokens leaves {limit} tokens here, but bos and cue alone are {least}; raise it")
        room = min(max(limit - (len(ids) - start), least), start)  # for what stands before the response
        left = start - (room - len(bos))
        ids, learn = bos + ids[left:], [False] * len(bos) + learn[left:]
        return ids[:limit], learn[:limit], len(ids) > limit

    def _limit(self, learn: list[bool]) -> int:
        return self.max_tokens if any(learn) else self.max_prompt


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

        mode decides which forms a line may have (FORMS). max_prompt: most tokens of a prompt to be answered, where that is less
        than data.max_tokens. required: further keys that each line must have, such as the answer that a reward compares with.
        Raises UserError naming file:line for every line that does not fit, and for a data set without records.
        """
        records = cls(tokenizer)
        fit = Limits(tokenizer, config, max_prompt)
        for row, (where, line) in enumerate(_lines(Path(path))):
            try:
                content, conversations = _read(line, FORMS[mode], required)
                encoded = [templates.encode(tokenizer, config.template, messages) for messages in conversations]
                records._add(row, content, encoded, fit)
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
            reward=float(len(record.spans) > 1 and rank == 0),
            truncated=span.truncated,
            meta={"row": record.row, "prompt": self._tokenizer.decode(prompt, skip_special=False), "record": record.content},
        )

    def _add(self, row: int, content: Row, encoded: list[Encoded], fit: Limits) -> None:
        if any(map(fit.over, encoded)):
            if fit.overlong == "drop":
                self.counts.dropped += 1
                return
            self.counts.truncated += 1
        self.counts.kept += 1
        self._records.append(Record(row, content, tuple(self._store(*fit.cut(*pair)) for pair in encoded)))

    def _store(self, ids: list[int], learn: list[bool], truncated: bool) -> Span:
        start = len(self._tokens)
        self._tokens.extend(ids)
        self._learn.extend(learn)
        return Span(start, len(self._tokens), truncated)


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch. Sorted from raw Philox bits, which numpy promises not to change, unlike its own shuffles."""
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(size)
    return np.argsort(bits, kind="stable")


def _last_response(learn: list[bool]) -> int:
    """Where the last learned run starts; the end if nothing is learned."""
    starts = [t for t in range(len(learn)) if learn[t] and not (t > 0 and learn[t - 1])]
    return starts[-1] if starts else len(learn)


def _read(line: bytes, forms: dict[Keys, Form], required: Keys) -> tuple[Row, list[list[Message]]]:
    """A line's object, and its conversations by the first form that fits it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"not JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"not an object but {row!r:.80}; write one object per line")
    keys = next((keys for keys in forms if all(key in row for key in keys)), None)
    if keys is None:
        wanted = ", or ".join(" and ".join(map(repr, keys)) for keys in forms)
        raise UserError(f"has the keys {', '.join(map(repr, row)) or 'none'}; give it {wanted}")
    for key in required:
        if row.get(key) is None:
            raise UserError(f"no {key!r}, which the reward needs; add it, or set another reward.function")
    return row, forms[keys](row, keys)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """("file:line", content) of every line that is not blank."""
    for file in _files(path):
        try:
            with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield f"{file}:{number}", line
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: cannot be read ({error}); copy the file again") from None


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"data set {path}: no such file or folder; set data.train and data.eval to jsonl files or folders of them")
        return [path]
    files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
    if not files:
        raise UserError(f"data set {path}: no file in this folder ends in {', '.join(SUFFIXES)}; set data.train and data.eval")
    return files
