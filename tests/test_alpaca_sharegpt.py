"""Lines in the forms of Alpaca and ShareGPT: system texts, inputs, histories and tools."""

import json

import pytest
from rows import ASSISTANT, GPT, HUMAN, SYSTEM, USER, learned, write

from rlhf.config import Data
from rlhf.data import forms
from rlhf.data.records import Records


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("demonstrations", {"instruction": "Q?", "output": "A.", "system": "S."}),
        ("demonstrations", {"system_prompt": "S.", "question": "Q?", "response": "A."}),
        ("demonstrations", {"conversations": [HUMAN, GPT], "system": "S."}),
        ("demonstrations", {"conversations": [{"from": "system", "value": "S."}, HUMAN, GPT], "system": "S."}),
        ("demonstrations", {"messages": [SYSTEM, USER, ASSISTANT], "system": " \n", "system_prompt": ""}),
        ("demonstrations", {"messages": [USER, ASSISTANT], "system": "", "system_prompt": "S."}),
        ("pairs", {"system": "S.", "question": "Q?", "chosen": "A.", "rejected": "No."}),
        ("scored", {"system": "S.", "query": "Q?", "response": ["A.", "No."], "score": [1, 0]}),
        ("prompts", {"system": "S.", "prompt": "Q?"}),
        ("prompts", {"system": "S.", "messages": [USER, ASSISTANT]}),
    ],
)
def test_the_system_text_of_a_line(tmp_path, llama3, form, row):
    """The key `system` begins every conversation of a line. The messages may begin with the same text."""
    samples = Records.load(write(tmp_path / "a.jsonl", row), form, llama3, Data(template="human")).head(0)
    for sample in samples:
        assert sample.text.prompt == "S.\n\nHuman: Q?\n\nAssistant:"


@pytest.mark.parametrize(
    ("key", "form"), [("input", "demonstrations"), ("context", "demonstrations"), ("input", "pairs")]
)
def test_an_instruction_has_an_input_and_a_history(tmp_path, llama3, key, form):
    """They are joined as in LLaMA-Factory: the input follows in the next line, and the history precedes both."""
    row = {
        "instruction": "Add.",
        key: "1 + 1",
        "output": "2",
        "chosen": "2",
        "rejected": "3",
        "history": [["Q?", "A."]],
    }
    samples = Records.load(write(tmp_path / "a.jsonl", row), form, llama3, Data(template="human", learn="last"))
    said = "\n\nHuman: Q?\n\nAssistant: A.\n\nHuman: Add.\n1 + 1\n\nAssistant:"
    assert {sample.text.prompt for sample in samples.head(0)} == {said}
    assert learned(llama3, samples.head(0)[0]) == " 2<|endoftext|>"


def test_what_tools_say_is_a_message_of_their_own():
    called = {"from": "observation", "value": "4", "id": 7}
    row = {"conversations": [HUMAN, GPT, called, {"from": "tool", "value": "5"}, GPT]}
    [(messages, _)] = forms.read(json.dumps(row).encode(), "demonstrations").told
    tools = [{"id": 7, "role": "tool", "content": "4"}, {"role": "tool", "content": "5"}]
    assert messages == [USER, ASSISTANT, *tools, ASSISTANT]
