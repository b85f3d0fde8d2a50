"""Small data sets of the tests, and the text of their samples."""

import gzip
import json
from pathlib import Path

import numpy as np

from rlhf.contracts import Sample
from rlhf.data.tokenizer import Tokenizer

SYSTEM, USER, ASSISTANT = (
    {"role": role, "content": text} for role, text in (("system", "S."), ("user", "Q?"), ("assistant", "A."))
)
HUMAN, GPT = {"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}  # the same messages in ShareGPT
OTHER, AGAIN = {"role": "assistant", "content": "No."}, {"role": "user", "content": "Sure?"}


def write(file: Path, *rows: object) -> Path:
    """Write a jsonl file. A row that is a string is written unchanged."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def first_lines(file: Path, count: int) -> list[dict]:
    with gzip.open(file) as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


def learned(tokenizer: Tokenizer, sample: Sample) -> str:
    """Return the text that the policy learns: labels[t] = tokens[t + 1] where mask[t]."""
    return tokenizer.decode(sample.tokens[1:][sample.mask], skip_special=False)


def whole(tokenizer: Tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.tokens, skip_special=False)


def first_learned(sample: Sample) -> int:
    """Return the number of tokens before the first learned one."""
    return int(np.flatnonzero(sample.mask)[0]) + 1
