"""A line with a wrong form is refused with an error that names file:line."""

import re

import pytest
from rows import AGAIN, ASSISTANT, GPT, HUMAN, OTHER, USER, write

from rlhf.config import Data
from rlhf.data.records import Records
from rlhf.errors import UserError


@pytest.fixture(scope="session")
def tokenizer(llama3):
    return llama3


def fails(folder, tokenizer, form, good, line, error):
    """Check the error for a folder with a file whose second line is blank and whose third line is wrong."""
    file = write(folder / "a.jsonl.gz", good, "", line)
    with pytest.raises(UserError, match=re.escape(error)) as caught:
        Records.load(folder, form, tokenizer, Data(max_tokens=32))
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
        Records.load(file, "prompts", tokenizer, Data(), required=("answer",))
    file = write(
        tmp_path / "b.jsonl",
        {"eval_func": "math_rule", "prompt": "Q?", "answer": 4},
        {"eval_func": "code", "prompt": "Q?", "answer": 4},
    )
    assert len(Records.load(file, "prompts", tokenizer, Data())) == 2
    with pytest.raises(
        UserError, match=re.escape(f"{file}:2: 'eval_func' is 'code', but the reward verifies 'math_rule'; set another")
    ):
        Records.load(file, "prompts", tokenizer, Data(), required=("answer",))
