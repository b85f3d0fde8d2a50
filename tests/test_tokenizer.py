"""The tokenizer equals transformers and sentencepiece, and reports what is wrong with a folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vocabularies import CHATML, TEXTS, write_byte_level, write_sentencepiece

from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is 2 + 2?\nThink <b>hard</b>, naïve one."},
    {"role": "assistant", "content": "  four "},
    {"role": "user", "content": "Sure?"},
]


@pytest.fixture
def byte_level(tmp_path):
    return write_byte_level(tmp_path / "qwen")


@pytest.fixture
def sentencepiece_file(tmp_path):
    return write_sentencepiece(tmp_path / "sp")


def auto(folder):
    """Read a folder with transformers."""
    transformers = pytest.importorskip("transformers")
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same_ids(ours, theirs, texts=TEXTS):
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode(text)) == text


def test_byte_level_equals_transformers(byte_level):
    ours, theirs = Tokenizer.load(byte_level), auto(byte_level)
    assert_same_ids(ours, theirs, [*TEXTS, " leading", "\n\nnewlines", ""])
    assert (ours.bos, ours.eos, ours.vocab) == (None, theirs.eos_token_id, len(theirs))


@pytest.mark.parametrize("cue", [False, True])
def test_chat_equals_transformers(byte_level, cue):
    ours, theirs = Tokenizer.load(byte_level), auto(byte_level)
    assert ours.chat(MESSAGES, cue) == theirs.apply_chat_template(
        MESSAGES, add_generation_prompt=cue, return_dict=False
    )


def test_chat_template_has_what_transformers_gives_it(tmp_path):
    """Chat templates have all features of transformers.

    These are block trimming, tojson without escapes, loop controls, generation blocks, special tokens as variables, and
    the default of several templates.
    """
    template = (
        "{{ bos_token }}{% for message in messages %}\n    {% if loop.index > 3 %}{% break %}{% endif %}\n"
        "{% generation %}{{ message | tojson }}{% endgeneration %}{{ eos_token }}\n{% endfor %}\n"
        "{{ tools is none }}{% if add_generation_prompt %}{{ pad_token }}{% endif %}"
    )
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    folder = write_byte_level(tmp_path, bos="<|begin|>", template=several)
    ours, theirs = Tokenizer.load(folder), auto(folder)
    assert ours.render(MESSAGES, True) == theirs.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=False
    )
    assert "<b>" in ours.render(MESSAGES, True)


def test_chat_template_file_goes_first(byte_level):
    (byte_level / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer.load(byte_level).render(MESSAGES, False) == "You are terse.!"


def test_chat_template_errors(tmp_path):
    folder = write_byte_level(tmp_path, template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"chat template fails: roles must alternate"):
        Tokenizer.load(folder).chat(MESSAGES, True)
    (folder / "chat_template.jinja").write_text("{% for m in")
    with pytest.raises(UserError, match=r"chat template fails: "):
        Tokenizer.load(folder).chat(MESSAGES, True)
    with pytest.raises(UserError, match=r"has no chat template; choose another data.template"):
        Tokenizer.load(write_byte_level(tmp_path / "bare", template=None)).chat(MESSAGES, True)


def test_bos_is_what_the_tokenizer_itself_adds(tmp_path):
    llama3 = Tokenizer.load(write_byte_level(tmp_path / "llama3", bos="<|begin|>"))
    assert llama3.decode([llama3.bos], skip_special=False) == "<|begin|>"
    folder = write_byte_level(tmp_path / "gpt")  # has such a token, and does not put it before texts
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|endoftext|>"}))
    assert Tokenizer.load(folder).bos is None


def test_special_tokens_in_a_text_are_text_unless_asked_for(byte_level):
    tokenizer = Tokenizer.load(byte_level)
    text = "hi<|im_end|>\n<|im_start|>system"
    assert tokenizer.eos in tokenizer.encode(text, control=True)
    assert tokenizer.encode(text, control=True) == auto(byte_level).encode(text, add_special_tokens=False)
    ids = tokenizer.encode(text)
    assert tokenizer.eos not in ids
    assert tokenizer.decode(ids) == text


def test_stop_ids_come_from_the_generation_config_or_else_from_config_json(byte_level):
    def stops(**files):
        for name, eos in files.items():
            (byte_level / f"{name}.json").write_text(json.dumps(eos))
        return Tokenizer.load(byte_level).stop_ids

    eos = Tokenizer.load(byte_level).eos
    assert stops(config={"model_type": "llama"}) == (eos,)
    assert stops(config={"eos_token_id": [7, eos]}) == (eos, 7)
    assert stops(config={"eos_token_id": 9}) == (eos, 9)
    with pytest.raises(UserError, match=r"/config.json: eos_token_id \['x'\] is not a token id"):
        stops(config={"eos_token_id": "x"})
    assert stops(generation_config={"eos_token_id": [eos, 8]}) == (eos, 8)
    assert stops(generation_config={"eos_token_id": 6}) == (eos, 6)
    assert stops(generation_config={}) == (eos,)


def test_limits_baked_into_the_file_are_off(byte_level):
    spec = json.loads((byte_level / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (byte_level / "tokenizer.json").write_text(json.dumps(spec))
    assert_same_ids(Tokenizer.load(byte_level), auto(byte_level))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece(tmp_path, kind):
    import sentencepiece

    file = write_sentencepiece(tmp_path, kind)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for ours in Tokenizer.load(file), Tokenizer.load(tmp_path):
        assert (ours.bos, ours.eos, ours.vocab, ours.stop_ids) == (1, 2, len(theirs), (2,))
        for text in [*TEXTS, " leading", "\n", "", "</s><s>[INST]"]:
            assert ours.encode(text) == theirs.encode(text), text
            assert ours.decode(ours.encode(text)) == text
            assert not {ours.bos, ours.eos} & set(ours.encode(text)), "control tokens are spelled in pieces"
        assert ours.encode("</s><s>", control=True) == [ours.eos, ours.bos]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_saved_sentencepiece_equals_transformers(tmp_path, kind, family):
    ours = Tokenizer.load(write_sentencepiece(tmp_path / "sp", kind))
    exported = tmp_path / "exported"
    exported.mkdir()
    ours.save(exported)
    (exported / "config.json").write_text(json.dumps({"model_type": family}))
    theirs = auto(exported)
    assert_same_ids(ours, theirs, [*TEXTS, " leading", "two  spaces"])
    assert theirs("hello")["input_ids"] == [ours.bos, *ours.encode("hello")]
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos, ours.eos, ours.vocab)
    again = Tokenizer.load(exported)
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_sentencepiece_merges_by_score_and_keeps_user_defined_symbols(tmp_path):
    """In published models, the order of the scores is not that of the ids, and runs of spaces have equal scores."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    write_sentencepiece(tmp_path, user_defined_symbols=["####", "▁<X>"], control_symbols=["[INST]"])
    model = proto.ModelProto.FromString((tmp_path / "tokenizer.model").read_bytes())
    kept = [piece for piece in model.pieces if piece.piece.strip("▁") or piece.type != piece.NORMAL]
    runs = [proto.ModelProto.SentencePiece(piece="▁" * n, score=-1e9) for n in (2, 4, 8, 16, 15, 7, 3)]
    alone = [piece for piece in model.pieces if piece.piece == "▁"]
    del model.pieces[:]
    model.pieces.extend([*kept[:262], *runs, *kept[262:], *alone])
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    ours = Tokenizer.load(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    runs = ["a" + " " * n + "b" for n in range(40)]
    for text in [*TEXTS, *runs, "#### 42", "4####2 ###", "x <X>y", "[INST]####</s>####[INST]", "<s>", "####"]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text


def prefixed(folder, kind):
    """Return the tokenizers that put a space before a text. There are several ways to write this."""
    file = write_sentencepiece(folder / "sp")
    if kind == "sentencepiece":
        return Tokenizer.load(file)
    (folder / "sp" / "exported").mkdir()
    Tokenizer.load(file).save(folder / "sp" / "exported")
    auto(folder / "sp" / "exported").save_pretrained(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    if kind == "prepend":
        parts = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        spec |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": parts}}
    if kind == "old metaspace":
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "old metaspace", "prepend"])
def test_continued_text_gets_no_space_before_it(tmp_path, kind):
    tokenizer = prefixed(tmp_path, kind)
    assert tokenizer.encode("hello") != tokenizer.encode("hello", continues=True)
    assert tokenizer.encode("hello") == tokenizer.encode(" hello", continues=True)
    for left, right in (("2 + 2 =", " four"), ("hello", "!"), ("\n\nAssistant:", " hi"), ("hello", "\n\nthere")):
        assert tokenizer.encode(left) + tokenizer.encode(right, continues=True) == tokenizer.encode(left + right)


def test_byte_level_text_continues_as_it_starts(byte_level):
    tokenizer = Tokenizer.load(byte_level)
    assert all(tokenizer.encode(text) == tokenizer.encode(text, continues=True) for text in TEXTS)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_decode(tmp_path, kind):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path) if kind == "bytes" else write_sentencepiece(tmp_path))
    ids = [
        *tokenizer.encode("hi there"),
        tokenizer.eos,
        tokenizer.vocab,
        tokenizer.vocab + 9,
    ]  # as a padded embedding may sample
    assert tokenizer.decode(ids) == "hi there"
    assert tokenizer.decode(ids, skip_special=False) == "hi there" + ("<|im_end|>" if kind == "bytes" else "</s>")


def test_save_copies_the_files_that_are_there(tmp_path, byte_level):
    (byte_level / "generation_config.json").write_text("{}")
    (byte_level / "chat_template.jinja").write_text(CHATML)
    (byte_level / "model.safetensors").write_text("not a tokenizer's")
    exported = tmp_path / "exported"
    exported.mkdir()
    Tokenizer.load(byte_level).save(exported)
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert {file.name for file in exported.iterdir()} == names
    assert all((exported / name).read_bytes() == (byte_level / name).read_bytes() for name in names)


def test_errors_name_the_file(tmp_path, byte_level):
    def fails(path, message):
        with pytest.raises(UserError, match=message) as caught:
            Tokenizer.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "nowhere", "no such file or folder; set policy.tokenizer")
    fails(tmp_path, "neither tokenizer.json nor tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"\x00rubbish")
    fails(tmp_path / "tokenizer.model", "not a sentencepiece model")
    settings = (byte_level / "tokenizer_config.json").read_text()
    (byte_level / "tokenizer_config.json").write_text("{")
    fails(byte_level, r"tokenizer_config.json: not JSON")
    (byte_level / "tokenizer_config.json").write_text("[]")
    fails(byte_level, r"tokenizer_config.json: not a JSON object")
    (byte_level / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    fails(byte_level, r"tokenizer.json: eos_token='<gone>' is not in its vocabulary")
    (byte_level / "tokenizer_config.json").unlink()
    fails(byte_level, r"tokenizer.json: eos_token=None")
    (byte_level / "tokenizer_config.json").write_text(settings)
    (byte_level / "tokenizer.json").write_text("{}")
    fails(byte_level, "it has no 'model'")
    (byte_level / "tokenizer.json").write_text("oops")
    fails(byte_level, "tokenizer.json: not JSON")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        {"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}},
        {"model": {"type": "Word", "vocab": {}}},
        {"model": None},
        {"model": []},
        {"normalizer": {"type": "Prepend"}},
        {"normalizer": [1]},
        {"normalizer": "NFC"},
        {"pre_tokenizer": {"kind": "ByteLevel"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [None]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"decoder": {"type": "Gone"}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}},
        {"added_tokens": [{"id": -1, "content": "x"}]},
        {"truncation": 7},
        {"version": "9.9"},
    ],
    ids=repr,
)
def test_mutated_tokenizer_json(byte_level, changes):
    path = byte_level / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=r"tokenizer.json: not a valid tokenizer: .*; copy the file again"):
        Tokenizer.load(byte_level).encode("a")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "[" * 100_000, "tokenizer.json: not JSON"),
        ("tokenizer_config.json", '{"a":' * 100_000, "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", '{"eos_token": {"content": 7}}', "eos_token=None"),
        ("tokenizer_config.json", '{"eos_token": "<|im_end|>", "chat_template": 7}', "chat_template 7 is not a text"),
        (
            "generation_config.json",
            '{"eos_token_id": "2"}',
            "eos_token_id \\['2'\\] is not a token id or a list of them",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": [1, 1000000]}',
            "eos_token_id .* is not a token id or a list of them",
        ),
        ("chat_template.jinja", "é", "chat_template.jinja: not UTF-8"),
    ],
)
def test_damaged_files_beside(byte_level, name, content, message):
    (byte_level / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(byte_level)


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{% for i in range(10 ** 9) %}{% endfor %}", "{{ tools() }}"],
)
def test_templates_that_raise(tmp_path, template):
    with pytest.raises(UserError, match="chat template fails: "):
        Tokenizer.load(write_byte_level(tmp_path, template=template)).chat(MESSAGES, True)


def test_loading_imports_neither_torch_nor_transformers(byte_level, sentencepiece_file):
    code = (
        "import sys; from rlhf.data.tokenizer import Tokenizer; import rlhf.data.records\n"
        "assert not {'tokenizers', 'sentencepiece', 'jinja2'} & set(sys.modules)\n"
        f"Tokenizer.load({str(byte_level)!r}); Tokenizer.load({str(sentencepiece_file)!r})\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
