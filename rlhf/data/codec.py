"""Encodes and decodes with a `tokenizers` backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from rlhf.data.backends import sound


class Codec:
    """A backend, and a second one for text that follows other tokens, which puts no space before it.

    bos      the id that it puts before texts; many have such a token and do not use it
    eos      the id that ends a response
    vocab    number of ids
    special  texts of the special tokens by name, such as eos_token
    """

    def __init__(self, first: Backend, file: Path, special: dict[str, str]) -> None:
        """file: the file of the vocabulary, for messages."""
        self.first, self.file, self.special = first, file, special
        with sound(file):
            first.no_truncation()
            first.no_padding()
            self.later = _without_space(first)
            start, text = (first.encode("a", add_special_tokens=adds).ids[:1] for adds in (True, False))
            self.bos = None if start == text else start[0]
            eos = first.token_to_id(special["eos_token"])
            self.vocab = max([first.get_vocab_size() - 1, *first.get_added_tokens_decoder()]) + 1
        assert eos is not None, "build() refuses a folder without an eos"
        self.eos = eos

    def encode(self, text: str, continues: bool, control: bool) -> list[int]:
        backend = self.later if continues else self.first
        backend.encode_special_tokens = not control  # True: encode special tokens as ordinary text
        with sound(self.file):
            return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        with sound(self.file):
            return self.first.decode(ids, skip_special_tokens=skip_special)

    def settings(self) -> dict[str, Any]:
        """Return the special and added tokens as in a tokenizer_config.json."""
        tokens = json.loads(self.first.to_str())["added_tokens"]
        return {**self.special, "added_tokens_decoder": {str(token.pop("id")): token for token in tokens}}


def _without_space(backend: Backend) -> Backend:
    """Return a backend that adds no space before a text. It is the same one if it adds none."""
    held = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    parts = {key: json.loads(part.__getstate__()) for key, part in held.items() if part is not None}
    changed = {key: _unprefixed(part) for key, part in parts.items()}
    return backend if changed == parts else Backend.from_str(json.dumps(json.loads(backend.to_str()) | changed))


def _unprefixed(part: dict[str, Any]) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer of a tokenizer.json, changed so that it adds no space before the text."""
    kind = part["type"]
    if kind == "Prepend":
        return None
    if kind == "Sequence":
        inner = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {inner: [kept for kept in map(_unprefixed, part[inner]) if kept is not None]}
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if kind == "ByteLevel" else part
