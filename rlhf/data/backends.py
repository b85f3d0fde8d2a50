"""Builds the `tokenizers` backend of a folder, from tokenizer.json, tokenizer.model, or vocab.json and merges.txt.

Some classes of transformers 5 use only the vocabulary of a tokenizer.json and build the parts around it themselves. The
folders of such a class get the same parts here, or are refused (see parts.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from rlhf import texts
from rlhf.data.parts import DEFAULTS, PARTS, REFUSED, SPACE, spaced
from rlhf.errors import UserError
from rlhf.model.families import FAMILIES

GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")  # without Fast: classes that use a tokenizer.json as it is
UNCHANGED = "set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json, so that it is used as it is"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Added = dict[int, AddedToken]  # by id
Piece = proto.ModelProto.SentencePiece


@dataclass(frozen=True, slots=True)
class Settings:
    """What the files beside a vocabulary say about it."""

    kind: str  # the class of transformers that reads the folder; "" for the one that uses tokenizer.json unchanged
    values: dict[str, Any]  # of tokenizer_config.json and special_tokens_map.json
    added: Added  # the tokens that they add to the vocabulary

    @classmethod
    def read(cls, files: Mapping[str, Path], model: Mapping[str, Any]) -> Settings:
        """Read the files of a folder. model: the content of its config.json. Raises UserError for damaged files.

        As in transformers, special_tokens_map.json and added_tokens.json count only if tokenizer_config.json has no
        added_tokens_decoder.
        """
        values = texts.fields(files, "tokenizer_config.json", texts.AGAIN)
        kind, declared = _kind(values, model), values.get("added_tokens_decoder")
        if declared is not None:
            with sound(files["tokenizer_config.json"]):
                return cls(kind, values, {int(i): _token(token) for i, token in declared.items()})
        named = texts.fields(files, "special_tokens_map.json", texts.AGAIN)
        if "tokenizer.json" not in files and "tokenizer.model" in files:
            named.pop("additional_special_tokens", None)  # transformers takes those of the tokenizer.model
        values |= named
        special = {_content(token) for token in [*map(values.get, NAMED), *_unnamed(values)]}
        added = texts.fields(files, "added_tokens.json", texts.AGAIN)
        with sound(files.get("added_tokens.json")):
            return cls(kind, values, {index(i): _added(text, text in special) for text, i in added.items()})

    def special(self, own: dict[str, str]) -> dict[str, str]:
        """Return the texts of the special tokens by name, such as eos_token. own: those of a tokenizer.model."""
        values = (own or DEFAULTS.get(self.kind, {})) | self.values
        keys = [*NAMED, *(key for key in values if key.endswith("_token") and key not in NAMED)]
        return {key: text for key in keys if (text := _content(values.get(key))) is not None}


def sound(file: Path | None) -> texts.Blaming:
    return texts.Blaming(f"{file}: not a valid tokenizer", texts.AGAIN)


def build(path: Path, files: Mapping[str, Path], settings: Settings) -> tuple[Backend, Path, dict[str, str]]:
    """Return the backend of a folder, the file of its vocabulary, and the texts of its special tokens by name.

    path: the folder or file, for messages. files: those of one of tokenizer.VOCABULARIES, and others. Raises UserError
    if it cannot be read, or if its ids would not be those of transformers.
    """
    own: dict[str, str] = {}
    if "tokenizer.json" in files:
        source = files["tokenizer.json"]
        with sound(source):
            backend, added = _from_json(source, settings)
    elif "tokenizer.model" in files:
        source = texts.regular(files["tokenizer.model"])
        remedy = "set policy.tokenizer to one, or to a folder with tokenizer.json"
        with texts.Blaming(f"{source}: not a sentencepiece model", remedy):
            backend, added, own = _from_sentencepiece(source, settings)
    else:
        source = files["vocab.json"]
        backend, added = _from_merges(path, files, settings), settings.added
    special = settings.special(own)
    with sound(source):
        _add(backend, source, added, special, settings.values)
        # Without the key, a tokenizer.model starts texts with a bos, as in transformers 4. transformers 5 adds none.
        if "tokenizer.json" not in files and settings.values.get("add_bos_token", "tokenizer.model" in files):
            _begin(backend, special.get("bos_token"))
    return backend, source, special


def _kind(values: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Return the class that AutoTokenizer uses, as in Settings.kind."""
    family = FAMILIES.get(str(model.get("model_type")))
    named = str(values.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    if family and (family.tokenizer_wins or not named):
        named = family.tokenizer
    return "" if named in GENERIC else named


def _content(token: object) -> str | None:
    """Return the text of a special token, which is a string or an object with `content`; None for anything else."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _unnamed(values: Mapping[str, Any]) -> list[Any]:
    """Return the special tokens that have no name."""
    found = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    return list(found.values()) if isinstance(found, dict) else list(found)


def _token(token: Mapping[str, Any]) -> AddedToken:
    """Return a token that is written as an object, as in the added_tokens of a tokenizer.json."""
    return AddedToken(**{key: value for key, value in token.items() if key not in ("id", "__type")})


def _added(text: str, special: bool) -> AddedToken:
    return AddedToken(text, special=special, normalized=not special)


def _add(backend: Backend, source: Path, added: Added, special: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Add tokens in the order of transformers, which decides their ids: also special tokens that no file gives an id.

    Raises UserError if an id is not the one in the files, or if that special token is the eos.
    """
    held = {repr(token): token for token in backend.get_added_tokens_decoder().values()}
    tokens = [token for _, token in sorted(added.items()) if repr(token) not in held]
    known, eos = {token.content for token in [*held.values(), *tokens]}, special.get("eos_token")
    if eos is None or (eos not in known and backend.token_to_id(eos) is None):
        raise UserError(f"{source}: eos_token={eos!r} is not in its vocabulary; set it in tokenizer_config.json")
    for token in [*(values.get(key, text) for key, text in special.items()), *_unnamed(values)]:
        if (text := _content(token)) and text not in known:
            sides = {key: token.get(key, False) for key in ("lstrip", "rstrip")} if isinstance(token, dict) else {}
            tokens.append(AddedToken(text, special=True, normalized=False, **sides))
            known.add(text)
    for token in tokens:
        token.special = token.special or token.content in special.values()
    backend.add_tokens(tokens)
    for i, token in sorted(added.items()):
        if (found := backend.token_to_id(token.content)) != i:
            other = f"the added token {token.content!r:.80} has id {i}, but transformers gives it {found}"
            raise UserError(f"{source}: {other}; number the added tokens without gaps, after the vocabulary")


def _begin(backend: Backend, bos: str | None) -> None:
    """Put a bos before texts."""
    if bos:
        first = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=first)


def _from_json(file: Path, settings: Settings) -> tuple[Backend, Added]:
    """Return the backend of a tokenizer.json, and the tokens to add."""
    spec = texts.load(file, texts.AGAIN)
    if not isinstance(spec, dict) or "model" not in spec:
        raise UserError(f"{file}: it has no 'model', so it is not a tokenizer.json; {texts.AGAIN}")
    if settings.kind in REFUSED:
        raise UserError(
            f"{file}: transformers reads it as {settings.kind}, which does not use this file as it is; {UNCHANGED}"
        )
    if settings.kind not in PARTS:
        return Backend.from_file(str(file)), settings.added
    backend = Backend.from_str(json.dumps(spec | {"added_tokens": []}))
    before, added = _split(backend), settings.added or {token["id"]: _token(token) for token in spec["added_tokens"]}
    PARTS[settings.kind](backend, settings.values)
    if _split(backend) != before:
        if str(settings.values.get("tokenizer_class")).removesuffix("Fast") in GENERIC:
            return Backend.from_file(str(file)), settings.added
        other = f"transformers reads it as {settings.kind}, which ignores how this file splits a text"
        raise UserError(f"{file}: {other}; {UNCHANGED}")
    return backend, added


def _split(backend: Backend) -> str:
    """Return how a byte-level tokenizer splits a text before its merges; "" for a tokenizer of another kind."""
    part = backend.pre_tokenizer
    text = json.dumps(json.loads(part.__getstate__()), sort_keys=True) if part else ""
    return re.sub('"(add_prefix_space|trim_offsets)": (true|false), ', "", text) if "ByteLevel" in text else ""


def _from_merges(path: Path, files: Mapping[str, Path], settings: Settings) -> Backend:
    """Return the backend of a vocab.json and a merges.txt, which do not say how a text is split before the merges."""
    if settings.kind not in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        wrote = f"AutoTokenizer.from_pretrained('{path}').save_pretrained('{path}')"
        missing = f"tokenizer_class {settings.kind or None} does not say how to split a text before merges.txt"
        raise UserError(
            f'{path}: {missing}; write a tokenizer.json: python -c "from transformers import AutoTokenizer; {wrote}"'
        )
    with texts.Blaming(f"{path}: vocab.json and merges.txt do not fit each other", "copy both files again"):
        vocab, merges = models.BPE.read_file(str(files["vocab.json"]), str(files["merges.txt"]))
        backend = Backend(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    PARTS[settings.kind](backend, settings.values)
    return backend


def _from_sentencepiece(file: Path, settings: Settings) -> tuple[Backend, Added, dict[str, str]]:
    """Return the backend of a tokenizer.model, the tokens to add, and its own special tokens by name.

    The ids of a file alone are those of sentencepiece. Beside files of transformers, they are those of LlamaTokenizer,
    which differs in the spaces: a text that starts with a space gets no other before it, and a text after an added
    token only with `legacy`.
    """
    model = proto.ModelProto.FromString(file.read_bytes())
    bpe = model.trainer_spec.model_type == proto.TrainerSpec.BPE
    backend = Backend(_merged(model) if bpe else _unigram(model))
    alone = not settings.values and not settings.added
    if alone:
        _plain(backend, model)
    elif bpe and settings.kind in ("", "LlamaTokenizer"):
        PARTS["LlamaTokenizer"](backend, settings.values)
    else:
        unlike = f"{settings.kind or 'LlamaTokenizer'} cannot read this {'BPE' if bpe else 'unigram'} model"
        raise UserError(f"{file}: {unlike}; set policy.tokenizer to the file alone, or to a folder with tokenizer.json")
    added = {
        i: AddedToken(piece.piece, normalized=False, special=piece.type == Piece.CONTROL)
        for i, piece in enumerate(model.pieces)
        if piece.type == Piece.CONTROL or (piece.type == Piece.USER_DEFINED and not alone)
    }
    pieces, trainer = {piece.piece for piece in model.pieces}, model.trainer_spec
    names = {"bos_token": trainer.bos_piece, "eos_token": trainer.eos_piece, "unk_token": trainer.unk_piece}
    return backend, added | settings.added, {key: piece for key, piece in names.items() if piece in pieces}


def _merged(model: proto.ModelProto) -> models.BPE:
    """Return a BPE model. Its merges are ordered as sentencepiece merges: by score, then the longer piece."""
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges = sorted(
        (-held.score, -len(piece), -cut, piece[:cut], piece[cut:])
        for held in model.pieces
        if held.type == Piece.NORMAL
        for piece in [held.piece]
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    )
    trainer = model.trainer_spec
    return models.BPE(
        vocab,
        [merge[3:] for merge in merges],
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=any(piece.type == Piece.USER_DEFINED for piece in model.pieces),
    )


def _unigram(model: proto.ModelProto) -> models.Unigram:
    trainer = model.trainer_spec
    return models.Unigram([(piece.piece, piece.score) for piece in model.pieces], trainer.unk_id, trainer.byte_fallback)


def _plain(backend: Backend, model: proto.ModelProto) -> None:
    """Set the parts of sentencepiece itself."""
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    atoms = [piece.piece for piece in model.pieces if piece.type == Piece.USER_DEFINED]
    if atoms:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(_either(atoms)), "isolated")
    if atoms or model.trainer_spec.model_type != proto.TrainerSpec.BPE:
        first = [backend.pre_tokenizer] if atoms else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*first, _unspelled(model)])
    backend.decoder = spaced(spec.add_dummy_prefix)


def _unspelled(model: proto.ModelProto) -> pre_tokenizers.PreTokenizer:
    """Return a split of texts that spell a piece which sentencepiece never finds in a text, such as a control token.

    The text is split after the first character of that piece. A unigram model would find the piece anywhere, a BPE
    model with `ignore_merges` as the whole text.
    """
    hidden = [piece.piece for piece in model.pieces if piece.type not in (Piece.NORMAL, Piece.USER_DEFINED)]
    first, others = _either({piece[0] for piece in hidden}), _either({piece[1:] for piece in hidden if piece[1:]})
    if model.trainer_spec.model_type == proto.TrainerSpec.BPE:
        first, others = rf"\A(?:{first})", rf"(?:{others})\z"
    return pre_tokenizers.Split(Regex(f"(?:{first})(?={others})"), "merged_with_previous")


def _either(found: Iterable[str]) -> str:
    """Return a regular expression of texts. It finds the longest."""
    return "|".join(re.escape(text) for text in sorted(found, key=lambda text: (-len(text), text)))
