"""The ids, texts and stop tokens of every form of tokenizer folder are those of transformers' AutoTokenizer."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rows import write
from vocabularies import CHATML, TEXTS, write_byte_level, write_sentencepiece

from rlhf.config import Data
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

START, END = "<|im_start|>", "<|im_end|>"
TALK = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "  What is 2 + 2?\nThink <b>hard</b>, naïve one. "},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "Sure?"},
]
SPELLED = [
    *TEXTS,
    f"{START}user\n hi {END}\n  {START}",
    f" {START} two  {END} three",
    f"{END}{END}hello",
    "<s>[INST] hi [/INST] there </s><s>",
    " leading",
    "  two before",
    "\n",
    "",
    "cafe\u0301",  # two code points, one after NFC
    "<|endoftext|>text",
]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "chat_template": CHATML, "add_bos_token": True}
IDS = {END: 420, START: 421}  # after the 420 pieces of write_sentencepiece


def token(text: str, **flags: bool) -> dict:
    return {"content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | flags


def folder(path: Path, family: str = "llama", **files: object) -> Path:
    """Write a config.json and JSON files: name without .json -> content."""
    path.mkdir(exist_ok=True)
    for name, content in ({"config": {"model_type": family}} | files).items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def sentencepiece(path: Path, **files: object) -> Path:
    write_sentencepiece(path)
    return folder(path, **files)


def saved(path: Path, family: str = "llama", **files: object) -> Path:
    """Write a tokenizer.json as the converters of transformers 4 wrote that of Llama 2, and these files beside it."""
    transformers = pytest.importorskip("transformers")
    made = sentencepiece(path / "made", tokenizer_config=LLAMA)
    spec = json.loads(transformers.AutoTokenizer.from_pretrained(made).backend_tokenizer.to_str())
    parts = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    spec |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": parts}}
    shutil.rmtree(made)
    (path / "tokenizer.model").write_bytes(b"not read if there is a tokenizer.json")
    return folder(path, family, tokenizer=spec, **files)


def byte_level(path: Path, family: str, changes: dict, bos: str | None = None) -> Path:
    settings = json.loads((write_byte_level(path, bos=bos) / "tokenizer_config.json").read_text())
    return folder(path, family, tokenizer_config=settings | changes)


def merges(path: Path, family: str, **files: object) -> Path:
    """Write vocab.json and merges.txt in place of a tokenizer.json."""
    spec = json.loads((write_byte_level(path) / "tokenizer.json").read_text())
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    lines = [" ".join(pair) for pair in spec["model"]["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    return folder(path, family, vocab=spec["model"]["vocab"], **files)


def decoder(first: int, **flags: bool) -> dict:
    """Return an added_tokens_decoder with the tokens of Qwen or ChatML from an id on."""
    names = ("<|endoftext|>", START, END)
    return {str(first + i): token(name, special=True, **flags) for i, name in enumerate(names)}


QWEN_SETTINGS = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHATML, "eos_token": END}
FORMS: dict[str, Callable[[Path], Path]] = {
    "llama2": lambda path: sentencepiece(
        path, tokenizer_config=LLAMA | {"legacy": False, "eos_token": token("</s>") | {"__type": "AddedToken"}}
    ),
    "llama2 legacy": lambda path: sentencepiece(path, tokenizer_config=LLAMA | {"legacy": True}),
    "llama2 without space": lambda path: sentencepiece(path, tokenizer_config=LLAMA | {"add_prefix_space": False}),
    "llama2 pad": lambda path: sentencepiece(path, tokenizer_config=LLAMA | {"pad_token": "[PAD]"}),
    "llama2 chatml": lambda path: sentencepiece(path, tokenizer_config=LLAMA | {"eos_token": END}, added_tokens=IDS),
    "llama2 chatml legacy": lambda path: sentencepiece(
        path, tokenizer_config=LLAMA | {"eos_token": END, "legacy": True}, added_tokens=IDS
    ),
    "llama2 chatml map": lambda path: sentencepiece(
        path,
        tokenizer_config=LLAMA | {"eos_token": "</s>"},
        added_tokens=IDS,
        special_tokens_map={"eos_token": token(END), "additional_special_tokens": [START]},
    ),
    "llama2 chatml decoder": lambda path: sentencepiece(
        path,
        tokenizer_config=LLAMA | {"eos_token": END, "added_tokens_decoder": decoder(420)},
        special_tokens_map={"eos_token": "</s>"},
    ),
    "llama2 chatml spaces": lambda path: sentencepiece(
        path,
        tokenizer_config=LLAMA | {"eos_token": END, "added_tokens_decoder": decoder(420, lstrip=True, rstrip=True)},
    ),
    "llama2 json": lambda path: saved(path, tokenizer_config=LLAMA | {"legacy": False}),
    "llama2 json legacy": lambda path: saved(path, tokenizer_config=LLAMA | {"legacy": True}),
    "llama2 json chatml": lambda path: saved(
        path, tokenizer_config=LLAMA | {"eos_token": END, "added_tokens_decoder": decoder(420)}
    ),
    "llama2 json alone": lambda path: saved(
        path, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"}, tokenizer_config={"chat_template": CHATML}
    ),
    "code llama json": lambda path: saved(
        path, tokenizer_config=LLAMA | {"tokenizer_class": "CodeLlamaTokenizer", "legacy": True}
    ),
    "mistral json": lambda path: saved(
        path, "mistral", tokenizer_config=LLAMA | {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "</s>"}
    ),
    "phi3 json": lambda path: saved(path, "phi3", tokenizer_config=LLAMA | {"eos_token": "</s>"}),
    "llama3": lambda path: byte_level(path, "llama", {}, bos="<|begin|>"),
    "llama3 pad": lambda path: byte_level(path, "llama", {"pad_token": "[PAD]"}, bos="<|begin|>"),
    "gpt2 json": lambda path: byte_level(path, "llama", {"tokenizer_class": "Unheard"}),
    "qwen2": lambda path: byte_level(path, "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}),
    "qwen2 generic": lambda path: byte_level(path, "qwen2", {}),
    "qwen2 decoder": lambda path: byte_level(path, "qwen2", QWEN_SETTINGS | {"added_tokens_decoder": decoder(400)}),
    "qwen3": lambda path: byte_level(path, "qwen3", {"tokenizer_class": "Qwen2TokenizerFast"}),
    "qwen3 generic": lambda path: byte_level(path, "qwen3", {}),
    "qwen2 merges": lambda path: merges(
        path, "qwen2", tokenizer_config=QWEN_SETTINGS | {"added_tokens_decoder": decoder(400)}
    ),
    "qwen2 merges map": lambda path: merges(
        path,
        "qwen2",
        tokenizer_config=QWEN_SETTINGS | {"eos_token": "<|endoftext|>"},
        added_tokens={"<|endoftext|>": 400, START: 401, END: 402},
        special_tokens_map={"eos_token": END, "additional_special_tokens": [START]},
    ),
    "qwen3 merges": lambda path: merges(
        path, "qwen3", tokenizer_config={"chat_template": CHATML, "added_tokens_decoder": decoder(400)}
    ),
    "gpt2 merges": lambda path: merges(
        path,
        "llama",
        tokenizer_config=QWEN_SETTINGS | {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder(400)},
    ),
}


def auto(path: Path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path)


def assert_equal(ours: Tokenizer, theirs, texts: list[str]) -> None:
    for text in texts:
        ids = ours.encode(text, control=True)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), (text, skip)
    assert (ours.eos, ours.vocab) == (theirs.eos_token_id, len(theirs))
    assert [ours.bos][: ours.bos is not None] == theirs("").input_ids
    for cue in (False, True):
        assert ours.render(TALK, cue) == theirs.apply_chat_template(TALK, add_generation_prompt=cue, tokenize=False)
        assert ours.chat(TALK, cue) == theirs.apply_chat_template(TALK, add_generation_prompt=cue, return_dict=False)


@pytest.mark.parametrize("form", FORMS)
def test_folder_equals_transformers_and_so_does_its_export(tmp_path: Path, form: str) -> None:
    made = FORMS[form](tmp_path / "made")
    ours = Tokenizer.load(made)
    assert_equal(ours, auto(made), SPELLED)
    exported = tmp_path / "exported"
    exported.mkdir()
    ours.save(exported)
    shutil.copy(made / "config.json", exported)
    assert_equal(ours, auto(exported), SPELLED)
    again = Tokenizer.load(exported)
    assert [again.encode(text) for text in SPELLED] == [ours.encode(text) for text in SPELLED]
    assert again.stop_ids == ours.stop_ids


@pytest.mark.parametrize(
    "write",
    [
        lambda path: sentencepiece(path, added_tokens=IDS, special_tokens_map={"eos_token": END}),
        lambda path: folder(path, "mistral", tokenizer_config=LLAMA | {"eos_token": END}, added_tokens=IDS),
    ],
    ids=["no class", "mistral"],
)
def test_sentencepiece_texts_get_a_space_without_a_class_too(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """AutoTokenizer puts no space before these texts. From the export, it does."""
    write_sentencepiece(tmp_path / "made")
    ours = Tokenizer.load(write(tmp_path / "made"))
    theirs = auto(tmp_path / "made")
    for text in (f"{START}user\nhi{END}\n{START}", f"{START}  two"):
        assert ours.encode(text, control=True) == theirs.encode(text, add_special_tokens=False)
    named = Tokenizer.load(
        sentencepiece(tmp_path / "named", tokenizer_config=LLAMA | {"eos_token": END}, added_tokens=IDS)
    )
    assert [ours.encode(text, control=True) for text in SPELLED] == [named.encode(t, control=True) for t in SPELLED]
    (tmp_path / "exported").mkdir()
    ours.save(tmp_path / "exported")
    shutil.copy(tmp_path / "made" / "config.json", tmp_path / "exported")
    exported = auto(tmp_path / "exported")
    assert [exported.encode(t, add_special_tokens=False) for t in SPELLED] == [
        ours.encode(t, control=True) for t in SPELLED
    ]
    assert exported.eos_token_id == ours.eos == IDS[END]


def test_special_tokens_of_a_sentencepiece_folder_are_text_unless_asked_for(tmp_path: Path) -> None:
    ours = Tokenizer.load(FORMS["llama2 chatml decoder"](tmp_path))
    text = f"hi{END}\n{START}system</s>"
    ids = ours.encode(text, control=True)
    assert {ours.eos, ours.eos - 1, 2} <= set(ids)
    assert not {ours.eos, ours.eos - 1, 2} & set(ours.encode(text))
    assert ours.decode(ours.encode(text)) == text
    assert Tokenizer.load(folder(tmp_path, tokenizer_config=LLAMA | {"bos_token": ""})).bos is None


def spoiled(path: Path, **changes: object) -> Path:
    """Write a byte-level folder whose tokenizer.json has other parts."""
    spec = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(spec | changes))
    return path


DIGITS = [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
]
REFUSED = {
    "digits": (
        lambda path: spoiled(
            byte_level(path, "llama", {"tokenizer_class": "GPT2Tokenizer"}),
            pre_tokenizer={"type": "Sequence", "pretokenizers": DIGITS},
        ),
        "tokenizer.json: transformers reads it as GPT2Tokenizer, which ignores how this file splits a text; "
        "set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json",
    ),
    "llama of bytes": (
        lambda path: byte_level(path, "llama", {"tokenizer_class": "LlamaTokenizerFast"}),
        "reads it as LlamaTokenizer",
    ),
    "merges": (
        lambda path: merges(path, "llama", tokenizer_config={"eos_token": END}),
        "does not say how to split a text before merges.txt; write a tokenizer.json: python -c",
    ),
    "vocab alone": (lambda path: folder(path, vocab={"a": 0}), "neither tokenizer.json nor tokenizer.model, nor vocab"),
    "other merges": (
        lambda path: folder(
            merges(path, "qwen2", tokenizer_config=QWEN_SETTINGS | {"added_tokens_decoder": decoder(400)}),
            "qwen2",
            vocab={"a": 0},
        ),
        "vocab.json and merges.txt do not fit each other",
    ),
    "gap": (
        lambda path: sentencepiece(path, tokenizer_config=LLAMA | {"eos_token": END}, added_tokens={END: 425}),
        "the added token '<\\|im_end\\|>' has id 425, but transformers gives it 420; number the added tokens",
    ),
    "no such eos": (
        lambda path: sentencepiece(path, tokenizer_config=LLAMA | {"eos_token": END}),
        "eos_token='<\\|im_end\\|>' is not in its vocabulary",
    ),
    "added": (
        lambda path: sentencepiece(path, tokenizer_config=LLAMA, added_tokens={END: "420"}),
        "added_tokens.json: not a valid tokenizer",
    ),
    "decoder": (
        lambda path: sentencepiece(path, tokenizer_config=LLAMA | {"added_tokens_decoder": {"x": token(END)}}),
        "tokenizer_config.json: not a valid tokenizer",
    ),
    "unigram": (
        lambda path: folder(write_sentencepiece(path, "unigram").parent, tokenizer_config=LLAMA),
        "LlamaTokenizer cannot read this unigram model; set policy.tokenizer to the file alone",
    ),
    "other class": (
        lambda path: sentencepiece(path, tokenizer_config={"tokenizer_class": "T5Tokenizer"}),
        "T5Tokenizer cannot read this BPE model",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_folders_with_other_ids_in_transformers_are_refused(tmp_path: Path, form: str) -> None:
    write, message = REFUSED[form]
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(write(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_generic_class_uses_the_file_as_it_is(tmp_path: Path) -> None:
    """The remedy of the refusal works."""
    parts = {"type": "Sequence", "pretokenizers": DIGITS}
    path = spoiled(byte_level(tmp_path, "llama", {"tokenizer_class": "PreTrainedTokenizerFast"}), pre_tokenizer=parts)
    assert_equal(Tokenizer.load(path), auto(path), SPELLED)


def test_a_model_type_does_not_change_a_tokenizer_of_another_kind(tmp_path: Path) -> None:
    """A qwen2 model may have a sentencepiece tokenizer here, and it may be exported and loaded again."""
    plain = Tokenizer.load(write_sentencepiece(tmp_path))
    ours = Tokenizer.load(folder(tmp_path, "qwen2"))
    assert (ours.bos, ours.eos, ours.vocab) == (plain.bos, plain.eos, plain.vocab)
    ours.save(folder(tmp_path / "exported", "qwen2"))
    again = Tokenizer.load(tmp_path / "exported")
    assert [again.encode(text) for text in SPELLED] == [plain.encode(text) for text in SPELLED]


def test_ids_that_the_model_does_not_have_may_exist_but_not_be_used(tmp_path: Path) -> None:
    path = byte_level(tmp_path, "llama", {"pad_token": "[PAD]"}, bos="<|begin|>")
    ours = Tokenizer.load(path, "runs/sft", rows=404)  # [PAD] is 404
    assert ours.vocab == 405
    assert ours.encode("fine") == Tokenizer.load(path).encode("fine")
    assert pickle.loads(pickle.dumps(ours)).rows == 404
    with pytest.raises(
        UserError, match=r"the text has the token '\[PAD\]' with id 404, but runs/sft/config.json has vocab_size=404"
    ):
        ours.encode("text [PAD]", control=True)
    assert 404 not in ours.encode("text [PAD]")
    lines = write(tmp_path / "lines.jsonl", *({"prompt": "a", "response": text} for text in ("b", "[PAD]")))
    with pytest.raises(UserError, match=r"lines.jsonl:2: the text has the token '\[PAD\]' with id 404"):
        Records.load(lines, "demonstrations", ours, Data())
    with pytest.raises(UserError, match=r"the tokenizer has the token '<\|begin\|>' with id 403"):
        Tokenizer.load(path, "runs/sft", rows=403)


def test_all_chat_templates_are_copied(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "made", "llama", {})
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "exported").mkdir()
    Tokenizer.load(path).save(tmp_path / "exported")
    assert auto(tmp_path / "exported").chat_template == {"default": CHATML, "tool_use": "tools"}
