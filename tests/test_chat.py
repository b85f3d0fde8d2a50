"""Chat templates are programs of a model's folder: they run with limits, and cannot access anything else."""

from __future__ import annotations

import pickle
import re
import resource
import signal
import time

import pytest
from vocabularies import CHATML, write_byte_level

from rlhf.data.chat import variables
from rlhf.data.templates import encode, num_cue, reply
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it takes more than 0.5 s"),
        (
            "{% set n = namespace(x='x') %}{% for a in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "it takes more than 64 MB",
        ),
        ("{{ 'x' * 9999999999 }}", "it takes more than 64 MB"),
        ("{{ 'x'|center(9999999999) }}", "it takes more than 64 MB"),
        ("{{ '%9999999999d' % 1 }}", "it takes more than 64 MB"),
        ("{{ 10 ** 1000000000 }}", "a number has more than 4096 bits"),
        (
            "{% set n = namespace(x=10) %}{% for a in range(50) %}{% set n.x = n.x * n.x %}{% endfor %}",
            "a number has more than 4096 bits",
        ),
    ],
)
def test_chat_template_is_bounded(tmp_path, monkeypatch, template, said):
    """Time, memory and numbers are limited. The limits of the process are restored afterwards."""
    monkeypatch.setattr("rlhf.data.chat.MEMORY", 64 << 20)
    if said.endswith(" s"):
        monkeypatch.setattr("rlhf.data.chat.SECONDS", 0.5)
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)
    folder = write_byte_level(tmp_path, template=template)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"chat template fails: {said}; change"):
        Tokenizer.load(folder).render(MESSAGES, True)
    assert time.monotonic() - start < 8
    assert (resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)) == before


def test_chat_template_cannot_reach_the_machine(tmp_path):
    folder = write_byte_level(tmp_path, template="{{ messages.__class__.__base__.__subclasses__() }}")
    with pytest.raises(UserError, match="chat template fails"):
        Tokenizer.load(folder).chat(MESSAGES, True)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("enable_thinking=false", False),
        ("date_string=26 Jul 2024", "26 Jul 2024"),
        ("day=2024-07-26", "2024-07-26"),
        ("effort=high", "high"),
        ('effort="high"', "high"),
        ("budget=12", 12),
        ("names=[1, 2]", [1, 2]),
        ("text=a=b", "a=b"),
        ("text=", ""),
        ("nothing=null", None),
    ],
)
def test_values_of_variables(assignment, value):
    assert variables([assignment]) == {assignment.partition("=")[0]: value}


@pytest.mark.parametrize(
    ("assignments", "error"),
    [
        (["enable_thinking"], "data.template_variables has 'enable_thinking'; write name=value, such as"),
        (["=3"], "has '=3'; write name=value"),
        (["a b=3"], "has 'a b=3'; write name=value"),
        (["tools=[]"], "has 'tools=[]', but tools comes from the data; remove it"),
        (["messages=x"], "but messages comes from the data; remove it"),
        (["add_generation_prompt=true"], "but add_generation_prompt comes from the data; remove it"),
        (["a=1", "a=2"], "has 'a=2', the second value of a; remove one"),
        (["enable_thinking=False"], "has 'enable_thinking=False'; write enable_thinking=false"),
    ],
)
def test_what_is_no_variable(assignments, error):
    with pytest.raises(UserError, match=re.escape(error)):
        variables(assignments)


def test_variables_reach_the_template_everywhere(tmp_path):
    """They are in prompts, responses, cues and answers of environments, also in processes that tokenize."""
    from transformers import AutoTokenizer

    template = CHATML.replace("assistant\\n", "assistant\\n' + mood + '")
    folder = write_byte_level(tmp_path, template=template)
    found = variables(["mood=calm"])
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False, **found
    )
    first = Tokenizer.load(folder, variables=found)
    for tokenizer in (first, pickle.loads(pickle.dumps(first))):
        cue = tokenizer.encode("<|im_start|>assistant\ncalm", control=True)
        assert encode(tokenizer, "tokenizer", MESSAGES)[0] == theirs
        assert theirs[-num_cue(tokenizer, "tokenizer") :] == cue
        assert reply(tokenizer, "tokenizer", [tokenizer.eos], MESSAGES)[-len(cue) :] == cue
    assert first.chats.reads == {"messages", "add_generation_prompt", "mood"}
