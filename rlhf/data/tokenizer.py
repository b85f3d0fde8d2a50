"""Encodes and decodes text, from a tokenizer.json with `tokenizers` or a sentencepiece tokenizer.model.

It needs no transformers. The ids are those of its AutoTokenizer for the same folder, with two exceptions. Special
tokens that are spelled in ordinary text stay text (see Tokenizer.encode). And a tokenizer.json is used unchanged, while
some classes of transformers replace parts of it.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Protocol

from rlhf import texts
from rlhf.data.chat import ChatTemplates, Message, Tools
from rlhf.errors import UserError

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
AGAIN = "copy the file again"


class Tokenizer:
    """The vocabulary of a model.

    bos       starts every text; None if the model has no such token
    eos       ends every response
    stop_ids  eos, then the other stop tokens of generation_config.json
    vocab     number of ids; the model's embedding may be larger because of padding
    chats     its chat templates; None if it has none
    path      the folder or file that it was read from; unpickling in another process reads it again
    files     name in a folder -> path, for all files that it was read from
    """

    def __init__(
        self,
        path: Path,
        codec: Codec,
        files: dict[str, Path],
        chats: ChatTemplates | None,
        stops: list[int],
        variables: Mapping[str, Any],
    ) -> None:
        self.path = path
        self.bos, self.eos, self.vocab = codec.bos, codec.eos, codec.vocab
        self.stop_ids = tuple(dict.fromkeys([codec.eos, *stops]))
        self._codec, self.files, self.chats, self._variables = codec, files, chats, variables
        self._encode = lru_cache(maxsize=8)(codec.encode)  # the conversations of a group share a prompt

    @classmethod
    def load(cls, path: str | Path, variables: Mapping[str, Any] = MappingProxyType({})) -> Tokenizer:
        """Read a Hugging Face folder or a sentencepiece file. In a folder, tokenizer.json comes before tokenizer.model.

        variables: further variables for its chat templates (data.template_variables).
        Raises UserError with the name of a file that is missing or cannot be read.
        """
        path = Path(path)
        if not path.exists():
            remedy = texts.download(str(path)) or "set policy.tokenizer to a Hugging Face folder or a tokenizer.model"
            raise UserError(f"tokenizer {path}: no such file or folder; {remedy}")
        folder = {name: path / name for name in FILES if (path / name).is_file()}
        files = folder if path.is_dir() else {"tokenizer.model": path}
        for file in files.values():
            texts.fetched(file)
        settings = _read_json(files, "special_tokens_map.json") | _read_json(files, "tokenizer_config.json")
        special = {
            key: text
            for key, value in settings.items()
            if key.endswith("_token") and (text := _content(value)) is not None
        }
        codec: Codec
        if "tokenizer.json" in files:
            codec = _Json(files["tokenizer.json"], special.get("bos_token"), special.get("eos_token"))
        elif "tokenizer.model" in files:
            codec = _SentencePiece(files["tokenizer.model"], settings.get("add_bos_token", True))
        else:
            raise UserError(
                f"tokenizer {path}: neither tokenizer.json nor tokenizer.model in this folder; set policy.tokenizer"
            )
        stops = _read_json(files, "generation_config.json").get("eos_token_id") or []
        stops = stops if isinstance(stops, list) else [stops]
        if not all(type(token) is int and 0 <= token < codec.vocab for token in stops):
            file = files["generation_config.json"]
            raise UserError(f"{file}: eos_token_id {stops!r:.80} is not a token id or a list of them; {AGAIN}")
        sources = _chat_templates(files, settings)
        chats = ChatTemplates(sources, {**special, **variables}) if sources else None
        return cls(path, codec, files, chats, stops, dict(variables))

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[Path, Mapping[str, Any]]]:
        return Tokenizer.load, (self.path, self._variables)

    def encode(self, text: str, *, continues: bool = False, control: bool = False) -> list[int]:
        """Return the token ids of a text, without adding bos or eos.

        continues: the text follows other tokens, so tokenizers like Llama's must not put a space before it.
        control: special tokens that are spelled in the text become these tokens. It is off by default, because the text
        of a user must not be able to end a turn or start another. With sentencepiece, they always stay text.
        Raises UserError for half of a surrogate pair, which JSON can contain but no tokenizer can encode.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"the text contains half of a surrogate pair ({text!r:.80}); remove it") from None
        return self._encode(text, continues, control).copy()

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ids. Ids beyond the vocabulary are skipped. A padded embedding may have sampled them."""
        return self._codec.decode([int(i) for i in ids if i < self.vocab], skip_special)

    def render(self, messages: list[Message], cue: bool, tools: Tools = None) -> str:
        """Return the text of a conversation, rendered with the tokenizer's own chat template.

        cue: add the header of the assistant's next turn. Raises UserError if there is no template, or if the template
        raises an error.
        """

        if self.chats is None:
            raise UserError(
                "data.template=tokenizer, but the tokenizer has no chat template; choose another data.template"
            )
        if isinstance(self._codec, _SentencePiece):
            need = "data.template=tokenizer needs a tokenizer.json, not only a tokenizer.model"
            raise UserError(f"{need}; choose another data.template")
        return self.chats.render(messages, cue, tools)

    def chat(self, messages: list[Message], cue: bool) -> list[int]:
        """Return the token ids of render(). Special tokens that are spelled in the text become these tokens."""
        return self.encode(self.render(messages, cue), control=True)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into an exported Hugging Face folder.

        For a sentencepiece file alone, also write a tokenizer_config.json, so that AutoTokenizer reads it as a Llama
        tokenizer. That class supports BPE models only, so a unigram model gets no such file.
        """
        folder = Path(folder)
        for name, file in self.files.items():
            shutil.copyfile(file, folder / name)
        if isinstance(self._codec, _SentencePiece) and self._codec.bpe and "tokenizer_config.json" not in self.files:
            (folder / "tokenizer_config.json").write_text(json.dumps(self._codec.settings(), indent=2) + "\n")


class Codec(Protocol):
    """The interface of the two kinds of tokenizer files."""

    bos: int | None
    eos: int
    vocab: int

    def encode(self, text: str, continues: bool, control: bool) -> list[int]: ...

    def decode(self, ids: list[int], skip_special: bool) -> str: ...


class _Json:
    """A tokenizer.json. Its post-processor decides whether texts start with a bos."""

    def __init__(self, file: Path, bos: str | None, eos: str | None) -> None:
        from tokenizers import Tokenizer as Backend

        self.file = file
        spec = texts.load(file, AGAIN)
        if not isinstance(spec, dict) or "model" not in spec:
            raise UserError(f"{file}: it has no 'model', so it is not a tokenizer.json; {AGAIN}")
        with _sound(file):
            self._first = Backend.from_file(str(file))
            parts = {key: _unprefixed(spec.get(key)) for key in ("normalizer", "pre_tokenizer")}
            same = all(parts[key] == spec.get(key) for key in parts)
            self._later = self._first if same else Backend.from_str(json.dumps(spec | parts))
            for backend in (self._first, self._later):
                backend.no_truncation()
                backend.no_padding()
            bos_id, eos_id = (None if token is None else self._first.token_to_id(token) for token in (bos, eos))
            self.bos = bos_id if bos_id in self._first.encode("").ids[:1] else None  # many have a bos but do not use it
            added = self._first.get_added_tokens_decoder()
            self.vocab = max([self._first.get_vocab_size() - 1, *added]) + 1
        if eos_id is None:
            raise UserError(f"{file}: eos_token={eos!r} is not in its vocabulary; set it in tokenizer_config.json")
        self.eos = eos_id

    def encode(self, text: str, continues: bool, control: bool) -> list[int]:
        backend = self._later if continues else self._first
        backend.encode_special_tokens = not control  # True: encode special tokens as ordinary text
        with _sound(self.file):
            return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        with _sound(self.file):
            return self._first.decode(ids, skip_special_tokens=skip_special)


class _SentencePiece:
    """A sentencepiece tokenizer.model, such as that of Llama 2."""

    def __init__(self, file: Path, add_bos: bool) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as proto

        self.file = texts.regular(file)
        with texts.Blaming(
            f"{file}: not a sentencepiece model", "set policy.tokenizer to one, or to a folder with tokenizer.json"
        ):
            self._first = sentencepiece.SentencePieceProcessor(model_file=str(file))
            model = proto.ModelProto.FromString(self._first.serialized_model_proto())
            model.normalizer_spec.add_dummy_prefix = False
            self._later = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
            self.bpe = model.trainer_spec.model_type == proto.TrainerSpec.BPE
            self.vocab, self.eos = self._first.vocab_size(), self._first.eos_id()
            self.bos = self._first.bos_id() if add_bos and self._first.bos_id() >= 0 else None
        if self.eos < 0:
            raise UserError(f"{file}: the model has no eos token to end responses; set policy.tokenizer to another one")

    def encode(self, text: str, continues: bool, control: bool) -> list[int]:
        with _sound(self.file):
            return (self._later if continues else self._first).encode(text)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        with _sound(self.file):
            if skip_special:
                return self._first.decode(ids)
            runs = itertools.groupby(ids, self._first.is_control)
            return "".join(
                "".join(map(self._first.id_to_piece, run)) if control else self._first.decode(list(run))
                for control, run in runs
            )

    def settings(self) -> dict[str, Any]:
        """Return the tokenizer_config.json of this model for transformers."""
        ids = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": self._first.unk_id()}
        pieces = {key: None if i is None else self._first.id_to_piece(i) for key, i in ids.items()}
        # legacy=False: a space is added before the text only, not after every special token
        adding = {"add_bos_token": self.bos is not None, "add_eos_token": False, "legacy": False}
        return {"tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": False} | pieces | adding


def _unprefixed(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer of a tokenizer.json, changed so that it adds no space before the text."""
    if part is None or part["type"] == "Prepend":
        return None
    kind = part["type"]
    if kind == "Sequence":
        inner = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {inner: [kept for kept in map(_unprefixed, part[inner]) if kept is not None]}
    if kind == "Metaspace":  # add_prefix_space is the older key
        return {key: value for key, value in part.items() if key != "add_prefix_space"} | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if kind == "ByteLevel" else part


def _read_json(files: dict[str, Path], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    value = texts.load(files[name], AGAIN)
    if not isinstance(value, dict):
        raise UserError(f"{files[name]}: not a JSON object; {AGAIN}")
    return value


def _content(token: object) -> str | None:
    """Return the text of a special token, which is a string or an object with `content`; None for anything else."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _chat_templates(files: dict[str, Path], settings: dict[str, Any]) -> dict[str, str]:
    """Return name -> source of the chat templates. A single one is "default"."""
    if "chat_template.jinja" in files:
        return {"default": texts.read(files["chat_template.jinja"], AGAIN)}
    template = settings.get("chat_template")
    named = template if isinstance(template, list) else [{"name": "default", "template": template}]
    found = {str(entry.get("name")): entry.get("template") for entry in named if isinstance(entry, dict)}
    for source in found.values():
        if not isinstance(source, (str, NoneType)):
            raise UserError(f"{files['tokenizer_config.json']}: chat_template {source!r:.80} is not a text; {AGAIN}")
    known = {name: source for name, source in found.items() if source is not None}
    return known if "default" in known else {}


def _sound(file: Path) -> texts.Blaming:
    return texts.Blaming(f"{file}: not a valid tokenizer", AGAIN)
