"""Encodes and decodes text with the tokenizer of a Hugging Face folder, or with a sentencepiece tokenizer.model.

It needs no transformers. The ids are those of the AutoTokenizer of transformers 5 for the same folder, with two
exceptions. Special tokens that are spelled in ordinary text stay text (see Tokenizer.encode). The other exception is a
tokenizer.model without a tokenizer.json. Alone, its ids are those of sentencepiece. Beside a tokenizer_config.json or
another file that names tokens, they are those of LlamaTokenizer, except in runs of spaces, which are merged as in
sentencepiece; AutoTokenizer uses another class if the folder names none or the model is a Mistral. Tokenizer.save
writes a tokenizer.json for such a folder, so that AutoTokenizer has the ids of the training.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any

from rlhf import texts
from rlhf.data.chat import ChatTemplates, Message, Tools
from rlhf.errors import MissingError, UserError

if TYPE_CHECKING:
    from rlhf.data.codec import Codec

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
VOCABULARIES = ({"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"})  # a tokenizer needs one of them
TEMPLATES = "additional_chat_templates"  # folder with more *.jinja files


class Tokenizer:
    """The vocabulary of a model.

    bos       starts every text; None if the model has no such token
    eos       ends every response
    stop_ids  eos, then the other stop tokens of generation_config.json, or of config.json if there is no such file
    vocab     number of ids; the model's embedding may be larger because of padding
    chats     its chat templates; None if it has none
    model     the folder of the model
    rows      number of ids that the model has; None if it has all. Text with other ids cannot be encoded
    path      the folder or file that it was read from; unpickling in another process reads it again
    files     name in a folder -> path, for all files that it was read from, except config.json
    kind      the class of transformers that reads the folder, as in backends.Settings; config.json may decide it
    """

    def __init__(
        self,
        path: Path,
        codec: Codec,
        files: dict[str, Path],
        stops: list[int],
        chats: ChatTemplates | None,
        model: str,
        rows: int | None,
        variables: Mapping[str, Any],
        kind: str,
    ) -> None:
        self.path, self.files, self.model, self.rows, self.kind = path, files, model, rows, kind
        self.bos, self.eos, self.vocab = codec.bos, codec.eos, codec.vocab
        self.stop_ids = tuple(dict.fromkeys([codec.eos, *stops]))
        self._codec, self.chats, self._variables = codec, chats, variables
        self._encode = lru_cache(maxsize=8)(codec.encode)  # the conversations of a group share a prompt
        self._check([self.eos] if self.bos is None else [self.bos, self.eos], "the tokenizer")

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: str = "",
        rows: int | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tokenizer:
        """Read a Hugging Face folder or a sentencepiece file. In a folder, tokenizer.json comes before tokenizer.model.

        model, rows: folder of the model, and number of rows of its embedding. The tokenizer may have more ids, if none
        of them is used. variables: further variables for its chat templates (data.template_variables).
        Raises MissingError if there is no tokenizer, and UserError with the name of a file that cannot be read.
        """
        path = Path(path)
        if not path.exists():
            remedy = texts.download(str(path)) or "set policy.tokenizer to a Hugging Face folder or a tokenizer.model"
            raise MissingError(f"tokenizer {path}: no such file or folder; {remedy}")
        names = [*FILES, *(f"{TEMPLATES}/{file.name}" for file in sorted((path / TEMPLATES).glob("*.jinja")))]
        folder = {name: path / name for name in names if (path / name).is_file()}
        files = folder if path.is_dir() else {"tokenizer.model": path}
        if not any(files.keys() >= needed for needed in VOCABULARIES):
            found = "neither tokenizer.json nor tokenizer.model, nor vocab.json with merges.txt, in this folder"
            raise MissingError(f"tokenizer {path}: {found}; set policy.tokenizer")
        from rlhf.data import backends  # here, because it imports tokenizers
        from rlhf.data.codec import Codec

        for file in files.values():
            texts.fetched(file)
        beside = {"config.json": path / "config.json"} if (path / "config.json").is_file() else {}
        settings = backends.Settings.read(files, texts.fields(beside, "config.json", texts.AGAIN))
        codec = Codec(*backends.build(path, files, settings))
        sources = _chat_templates(files, settings.values)
        chats = ChatTemplates(sources, {**codec.special, **variables}) if sources else None
        stops = _stops(beside | files, codec.vocab)
        return cls(path, codec, files, stops, chats, model, rows, dict(variables), settings.kind)

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[Path, str, int | None, Mapping[str, Any]]]:
        return Tokenizer.load, (self.path, self.model, self.rows, self._variables)

    def encode(self, text: str, *, continues: bool = False, control: bool = False) -> list[int]:
        """Return the token ids of a text, without adding bos or eos.

        continues: the text follows other tokens, so tokenizers like Llama's must not put a space before it.
        control: special tokens that are spelled in the text become these tokens. It is off by default, because the text
        of a user must not be able to end a turn or start another.
        Raises UserError for half of a surrogate pair, which JSON can contain but no tokenizer can encode, and for a
        token that the model does not have (see rows).
        """
        ids = self._encode(texts.encodable(text), continues, control)
        self._check(ids, "the text")
        return ids.copy()

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
        return self.chats.render(messages, cue, tools)

    def chat(self, messages: list[Message], cue: bool) -> list[int]:
        """Return the token ids of render(). Special tokens that are spelled in the text become these tokens."""
        return self.encode(self.render(messages, cue), control=True)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into an exported Hugging Face folder.

        If there is no tokenizer.json, also write one, so that AutoTokenizer has the same ids (see above).
        """
        folder = Path(folder)
        for name, file in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
        if "tokenizer.json" not in self.files:
            self._codec.first.save(str(folder / "tokenizer.json"))
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            settings |= texts.fields(self.files, "tokenizer_config.json", texts.AGAIN) | self._codec.settings()
            texts.save(folder / "tokenizer_config.json", settings)

    def _check(self, ids: Sequence[int], what: str) -> None:
        """Raise UserError if the model has no row for one of the ids."""
        if self.rows is not None and self.vocab > self.rows and max(ids, default=0) >= self.rows:
            token = self.decode([max(ids)], skip_special=False)
            few = f"with id {max(ids)}, but {self.model}/config.json has vocab_size={self.rows}"
            raise UserError(f"{what} has the token {token!r:.80} {few}; remove it, or set another policy.tokenizer")


def _stops(files: Mapping[str, Path], vocab: int) -> list[int]:
    """Return the stop tokens, as transformers and vLLM read them."""
    name = "generation_config.json" if "generation_config.json" in files else "config.json"
    found = texts.fields(files, name, texts.AGAIN).get("eos_token_id")
    stops = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and 0 <= token < vocab for token in stops):
        raise UserError(f"{files[name]}: eos_token_id {stops!r:.80} is not a token id or a list of them; {texts.AGAIN}")
    return stops


def _chat_templates(files: dict[str, Path], settings: dict[str, Any]) -> dict[str, str]:
    """Return name -> source of the chat templates. A single one is "default"."""
    if "chat_template.jinja" in files:
        more = {Path(name).stem: file for name, file in files.items() if name.startswith(f"{TEMPLATES}/")}
        every = {**more, "default": files["chat_template.jinja"]}
        return {name: texts.read(file, texts.AGAIN) for name, file in every.items()}
    template = settings.get("chat_template")
    named = template if isinstance(template, list) else [{"name": "default", "template": template}]
    found = {str(entry.get("name")): entry.get("template") for entry in named if isinstance(entry, dict)}
    for source in found.values():
        if not isinstance(source, (str, NoneType)):
            raise UserError(
                f"{files['tokenizer_config.json']}: chat_template {source!r:.80} is not a text; {texts.AGAIN}"
            )
    known = {name: source for name, source in found.items() if source is not None}
    return known if "default" in known else {}
