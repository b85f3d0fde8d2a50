"""A line with a wrong form is refused with an error that names file:line, or skipped and counted."""

import re

import pyarrow
import pytest
from pyarrow import parquet
from rows import AGAIN, ASSISTANT, GPT, HUMAN, OTHER, SYSTEM, USER, write
from vocabularies import write_byte_level

from rlhf.config import Data
from rlhf.data import templates
from rlhf.data.forms import ANSWER
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError


@pytest.fixture(scope="session")
def tokenizer(llama3):
    return llama3


def fails(folder, tokenizer, form, good, line, error):
    """Check the error for a folder with a file whose second line is blank and whose third line is wrong."""
    file = write(folder / "a.jsonl.gz", good, "", line)
    with pytest.raises(UserError, match=re.escape(error)) as caught:
        Records.load(folder, form, tokenizer, Data(max_tokens=32, template="llama2"))
    assert str(caught.value).startswith(f"{file}:3: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{'prompt'", "not JSON (Expecting property name"),
        ("[", "not JSON (Expecting value"),
        ('["prompt"]', "not an object but ['prompt']; write one object per line"),
        ({"text": "hi", "id": 1}, "has the keys 'text', 'id'; give it 'prompt', or 'query', or 'question'"),
        ({}, "has the keys none; give it 'prompt'"),
        ({"prompt": 3}, "'prompt' is 3; give a string"),
        ({"prompt": None}, "'prompt' is None; give a string"),
        ({"prompt": " \n"}, "'prompt' is empty; give it a text or remove the line"),
        (r'{"prompt": "half \ud83d"}', "the text contains half of a surrogate pair ("),
        ({"prompt": []}, "messages are []; give a list of objects with 'role' and 'content'"),
        (
            {"prompt": [{"role": "user"}]},
            "message 1 is {'role': 'user'}; give an object with the strings 'role' and 'content'",
        ),
        ({"prompt": [{"role": "human", "content": "x"}]}, "message 1 has role 'human', expected 'user'"),
        (
            {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "'prompt' ends with the assistant; end it with the user",
        ),
        ({"messages": [ASSISTANT]}, "'messages' has no user message before the last assistant message; add one"),
        (
            {"prompt": "one two three four five six seven eight nine ten"},
            "tokens is longer than 32; shorten it, raise data.max_tokens, or set",
        ),
    ],
)
def test_prompt_errors_name_the_line(tmp_path, tokenizer, line, error):
    fails(tmp_path, tokenizer, "prompts", {"prompt": "good"}, line, error)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            {"prompt": "Q?"},
            "the keys 'prompt'; give it 'messages', or 'conversations', or 'conversation', or 'prompt' and 'response'",
        ),
        ({"prompt": "Q?", "response": ""}, "'response' is empty"),
        ({"prompt": "Q?", "response": 7}, "'response' is 7; give a string"),
        (
            {"prompt": "Q?", "response": ["A."]},
            "message 1 is 'A.'; give an object with the strings 'role' and 'content'",
        ),
        ({"prompt": "Q?", "completion": [USER]}, "'completion' ends with 'user'; end it with the assistant"),
        ({"messages": [USER]}, "'messages' ends with 'user'; end it with the assistant, whose messages are learned"),
        ({"messages": [USER, USER, ASSISTANT]}, "message 2 has role 'user', expected 'assistant'"),
        ({"prompt": "Q?", "response": "A. " * 30}, "tokens is longer than 32; shorten it, raise data.max_tokens"),
        ({"conversations": [HUMAN]}, "'conversations' ends with 'user'; end it with the assistant"),
        ({"conversations": [GPT, HUMAN, GPT]}, "message 1 has role 'assistant', expected 'user'"),
        (
            {"conversations": [HUMAN, {"from": "bot", "value": "A."}]},
            "message 2 is from 'bot'; it must be from one of human, user, gpt, assistant, chatgpt, system, tool, obs",
        ),
        (
            {"conversations": [{"from": ["human"], "value": "Q?"}]},
            "message 1 is from ['human']; it must be from one of",
        ),
        ({"conversations": [HUMAN, {"from": "gpt", "value": None}]}, "message 2 is {'role': 'assistant', 'content': N"),
        ({"conversations": "Q?"}, "messages are 'Q?'; give a list of objects"),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": "add(1, 2)"}, GPT]},
            "message 2 is from function_call, but its value is 'add(1, 2)'; give JSON with the keys 'name' and",
        ),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": '{"name": "add"}'}, GPT]},
            "message 2 is from function_call, but its value is",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "weight": 0}]},
            "message 2 has weight 0, but single messages cannot be left out; remove the key",
        ),
        ({"instruction": " ", "output": "A."}, "'instruction' is empty"),
        (
            {"instruction": "", "input": None, "output": "A."},
            "'instruction' is empty; give it a text or remove the line",
        ),
        ({"instruction": "Q?", "input": 3, "output": "A."}, "'input' is 3; give a string"),
        ({"instruction": "Q?", "output": ""}, "'output' is empty"),
        ({"instruction": "Q?", "output": "A.", "history": 3}, "'history' is 3; give a list of pairs"),
        ({"instruction": "Q?", "output": "A.", "history": [["Q?"]]}, "'history' is [['Q?']]; give a list of pairs"),
        ({"instruction": "Q?", "output": "A.", "history": [["Q?", ""]]}, "'history 1' is empty"),
        ({"instruction": "Q?", "output": "A.", "system": ["S."]}, "'system' is ['S.']; give a string"),
        (
            {"messages": [SYSTEM, USER, ASSISTANT], "system": "T."},
            "'system' and the first message are different system texts; remove one of them",
        ),
        (
            {"conversations": [{"from": "system", "value": "S."}, HUMAN, GPT], "system_prompt": "T."},
            "'system_prompt' and the first message are different system texts",
        ),
        (
            {"instruction": "Q?", "output": "A.", "system": "S.", "system_prompt": "T."},
            "'system' and 'system_prompt' are different system texts",
        ),
        (
            {"prompt": [USER], "completion": [AGAIN, ASSISTANT]},
            "'completion' does not contain the messages of the prompt; begin it with the assistant, or with them",
        ),
        (
            {"prompt": "Q?", "completion": "A.", "label": False},
            "'label' is False, but lines that label one response (KTO) are not read; give pairs with 'chosen' and 'rej",
        ),
        ({"conversations": [HUMAN, GPT], "kto_tag": True}, "'kto_tag' is True, but lines that label one response"),
    ],
)
def test_sft_errors_name_the_line(tmp_path, tokenizer, line, error):
    fails(tmp_path, tokenizer, "demonstrations", {"prompt": "Q?", "response": "A."}, line, error)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ({"prompt": "Q?", "chosen": "A."}, "'prompt' and 'chosen' and 'rejected', or 'query' and"),
        (
            {"prompt": "Q?", "completion": "A.", "label": True},
            "'label' is True, but lines that label one response (KTO)",
        ),
        ({"prompt": "Q?", "chosen": "A.", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "Q?", "chosen": "A.", "rejected": None}, "'rejected' is None; give a string"),
        ({"prompt": [USER, ASSISTANT], "chosen": "A.", "rejected": "No."}, "'prompt' ends with the assistant"),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": [OTHER]},
            "'chosen' ends with 'user'; end it with the assistant",
        ),
        (
            {"prompt": [USER], "chosen": [ASSISTANT, ASSISTANT], "rejected": [ASSISTANT, OTHER]},
            "message 3 has role 'assistant', expected 'user'",
        ),
        (
            {"chosen": [ASSISTANT], "rejected": [OTHER]},
            "'chosen' is a response without a prompt; add a 'prompt', or begin the messages with",
        ),
        (
            {"prompt": "Q?", "chosen": [AGAIN, ASSISTANT], "rejected": [AGAIN, OTHER]},
            "'chosen' does not contain the messages of the prompt; begin it with the assistant, or with them",
        ),
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
            "'chosen' does not contain the messages of the prompt",
        ),
        ({"chosen": "\n\nHuman: Q?\n\nAssistant: A.", "rejected": "x"}, "'chosen' is '\\n\\nHuman: Q?"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [AGAIN, OTHER]},
            "'chosen' and 'rejected' differ before their last messages, so they answer",
        ),
    ],
)
@pytest.mark.parametrize("form", ["scored", "pairs"])
def test_pair_errors_name_the_line(tmp_path, tokenizer, form, line, error):
    fails(tmp_path, tokenizer, form, {"prompt": "Q?", "chosen": "A.", "rejected": "No."}, line, error)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"score": 1.0}, "'score' is 1.0; give a list with one entry per response"),
        ({"response": "A."}, "'response' is 'A.'; give a list with one entry per response"),
        ({"score": [1, 2, 3]}, "'response' has 2 entries and 'score' 3; give every response a score"),
        (
            {"score": [1], "response": ["A."]},
            "'response' has 1 entries; give two or more to compare, or remove the line",
        ),
        ({"score": [1, "2"]}, "'score' 2 is '2'; give a number"),
        ({"score": [True, 2]}, "'score' 1 is True; give a number"),
        ({"score": [1, float("nan")]}, "'score' 2 is nan; give a number"),
        ({"response": ["A.", 3]}, "'response 2' is 3; give a string"),
        ({"response": ["A.", ""]}, "'response 2' is empty"),
        ({"query": ""}, "'query' is empty"),
    ],
)
def test_score_errors_name_the_line(tmp_path, tokenizer, change, error):
    good = {"query": "Q?", "response": ["A.", "No."], "score": [1, 0]}
    fails(tmp_path, tokenizer, "scored", good, good | change, error)


def test_required_keys(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", {"prompt": "Q?", "answer": 4}, {"prompt": "Q?", "answer": None})
    assert len(Records.load(file, "prompts", tokenizer, Data())) == 2
    with pytest.raises(UserError, match=re.escape(f"{file}:2: no 'answer', which the reward needs; add it")):
        Records.load(file, "prompts", tokenizer, Data(), required=(ANSWER,))
    lists = [["1/2", 0.5], [4]]
    file = write(tmp_path / "lists.jsonl", *({"prompt": "Q?", "answer": answer} for answer in lists))
    assert len(Records.load(file, "prompts", tokenizer, Data(), required=(ANSWER,))) == 2
    for answer, says in {"[]": "no 'answer'", '[""]': "is ['']", "[[4]]": "is [[4]]", "[null]": "is [None]"}.items():
        file = write(tmp_path / "wrong.jsonl", f'{{"prompt": "Q?", "answer": {answer}}}')
        with pytest.raises(UserError, match=re.escape(says) + ".* the reward needs"):
            Records.load(file, "prompts", tokenizer, Data(), required=(ANSWER,))
    file = write(
        tmp_path / "b.jsonl",
        {"eval_func": "math_rule", "prompt": "Q?", "answer": 4},
        {"eval_func": "code", "prompt": "Q?", "answer": 4},
    )
    assert len(Records.load(file, "prompts", tokenizer, Data())) == 2
    with pytest.raises(
        UserError, match=re.escape(f"{file}:2: 'eval_func' is 'code', but the reward verifies 'math_rule'; set another")
    ):
        Records.load(file, "prompts", tokenizer, Data(), required=(ANSWER,))


def test_invalid_lines_are_skipped(tmp_path, tokenizer, monkeypatch):
    """They are counted, and the first reason is kept in the cache, too. Files that are missing are no lines."""
    bad = ["{", "[3]", {"text": "?"}, {"prompt": ""}, {"prompt": [OTHER]}, {"prompt": [USER, {**USER, "content": " "}]}]
    good = [{"prompt": f"number {n}"} for n in range(5)]
    file = write(tmp_path / "a.jsonl", *good, *bad, *good)
    with pytest.raises(UserError, match=re.escape(f"{file}:6: not JSON")):
        Records.load(file, "prompts", tokenizer, Data())

    def skip(path, **data):
        data = Data(invalid="skip", **data)
        return Records.load(path, "prompts", tokenizer, data, required=(), cache=tmp_path / "cache")

    first = skip(file)
    assert (len(first), first.counts.skipped) == (10, 6)
    assert [sample.text.row for sample in first.head(0)] == [0, 1, 2, 3, 4, 11, 12, 13, 14, 15]
    said = f"10 records (0 truncated, 0 dropped), 6 invalid lines skipped (37.50%; the first: {file}:6: not JSON"
    assert str(first.counts).startswith(said)
    monkeypatch.setattr(templates, "encode", lambda *_: pytest.fail("tokenized again"))
    assert skip(file).counts == first.counts
    monkeypatch.undo()
    half = write(tmp_path / "half.jsonl", good[0], *bad[:1])
    assert len(skip(half)) == 1
    most = write(tmp_path / "most.jsonl", good[0], *bad[:2])
    with pytest.raises(
        UserError, match=re.escape(f"{most}: 2 of 3 lines are invalid, more than half; the first is {most}:2")
    ):
        skip(most)
    with pytest.raises(UserError, match="2 of 2 lines are invalid, more than half; the first is"):
        skip(write(tmp_path / "all.jsonl", *bad[:2]))
    with pytest.raises(UserError, match="no such file or folder"):
        skip(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=re.escape("a.jsonl:1: prompt of 8 tokens is longer than 1; shorten it")):
        skip(file, max_tokens=1)  # data.overlong decides about these lines
    (tmp_path / "b.json").write_text('[{"prompt": "one"}, {"prompt"')
    with pytest.raises(UserError, match="element 2: the array is not JSON here"):
        skip(tmp_path / "b.json")  # the places of the other elements are unknown
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": b"Q?"}]), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="row 1 has a value of type bytes, which JSON cannot hold"):
        skip(tmp_path / "c.parquet")


@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_a_label_is_no_error_where_it_does_not_matter(tmp_path, tokenizer, label):
    """A prompt has no response that could be bad, and of a pair it is known which one is."""
    for form, row in (("prompts", {"prompt": "Q?"}), ("pairs", {"prompt": "Q?", "chosen": "A.", "rejected": "B."})):
        file = write(tmp_path / f"{form}.jsonl", {**row, label: False})
        assert len(Records.load(file, form, tokenizer, Data())) == 1


def test_a_line_that_the_template_refuses_is_skipped(tmp_path):
    """The tokenizer's own template decides which roles a conversation may have."""
    refuse = "{% for m in messages if m.role == 'bard' %}{{ raise_exception('no role bard') }}{% endfor %}?"
    chatty = Tokenizer.load(write_byte_level(tmp_path / "chatty", template=refuse))
    file = write(tmp_path / "a.jsonl", {"prompt": [USER]}, {"prompt": [{"role": "bard", "content": "?"}]})
    records = Records.load(file, "prompts", chatty, Data(template="tokenizer", invalid="skip"))
    assert (records.counts.kept, records.counts.skipped) == (1, 1)
    assert records.counts.reason.startswith(f"{file}:2: the tokenizer's chat template fails: no role bard")
