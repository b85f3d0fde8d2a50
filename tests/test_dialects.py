"""Chat templates that edit messages, and tools: prompts as transformers renders them, and whole responses learned."""

import json
import re

import pytest
from dialects import LLAMA31, MISTRAL, QWEN3, QWEN3_THINKING, R1, R1_OPEN
from test_templates import runs
from vocabularies import CHATML, write_byte_level

from rlhf.data import forms
from rlhf.data.templates import encode, num_cue, read_tools, reply, validate
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

ASKED, SURE = {"role": "user", "content": "What is 2 + 2?"}, {"role": "user", "content": "Sure?"}
EMPTY, TERSE = {"role": "system", "content": ""}, {"role": "system", "content": "Be terse."}
RESULT = {"role": "tool", "name": "add", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
END = "<|im_end|>"
THOUGHT, SHORT = "<think>\nadd\n</think>\n\nfour", "<think>add</think>four"
CALL = '{"name": "add", "arguments": {"a": 2, "b": 2}}'


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


def calls(content=None):
    return says(content, tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}])


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return load(template, variables): the tokenizer here and in transformers."""
    from transformers import AutoTokenizer

    def both(template, variables):
        folder = write_byte_level(tmp_path_factory.mktemp("dialect"), template=template)
        return Tokenizer.load(folder, variables=variables), AutoTokenizer.from_pretrained(folder)

    return both


NO_THINKING = {"enable_thinking": False}
CASES = {  # template, variables, messages, tools, data.learn, learned texts
    "thought": (QWEN3, {}, [ASKED, says(THOUGHT)], None, "all", [THOUGHT]),
    "other white space": (QWEN3, {}, [ASKED, says(SHORT)], None, "all", [THOUGHT]),
    "thought of its own key": (QWEN3, {}, [ASKED, says("four", reasoning_content="add")], None, "all", [THOUGHT]),
    "no thought": (QWEN3, {}, [TERSE, ASKED, says("four")], None, "all", ["<think>\n\n</think>\n\nfour"]),
    "thinking off": (QWEN3, NO_THINKING, [ASKED, says("four")], None, "all", ["four"]),
    "last of two": (QWEN3, {}, [ASKED, says(THOUGHT), SURE, says(THOUGHT)], None, "last", [THOUGHT]),
    "no thinking, last of two": (QWEN3, NO_THINKING, [ASKED, says("four"), SURE, says("yes")], None, "last", ["yes"]),
    "text before a thought": (
        *(QWEN3, {}, [ASKED, says(f"Well. {THOUGHT}")], None, "all"),
        [f"<think>\n\n</think>\n\nWell. {THOUGHT}"],
    ),
    "open, closed by the template": (QWEN3_THINKING, {}, [ASKED, says("4")], None, "all", ["\n</think>\n\n4"]),
    "open, in the content": (QWEN3_THINKING, {}, [ASKED, says(SHORT)], None, "all", ["add\n</think>\n\nfour"]),
    "cut out": (R1, {}, [ASKED, says(THOUGHT)], None, "all", [THOUGHT]),
    "cut out, last of two": (R1, {}, [ASKED, says(THOUGHT), SURE, says(SHORT)], None, "last", [SHORT]),
    "nothing to cut": (R1, {}, [TERSE, ASKED, says("four"), SURE, says("yes")], None, "all", ["four", "yes"]),
    "open and cut out": (R1_OPEN, {}, [ASKED, says(THOUGHT)], None, "all", ["add\n</think>\n\nfour"]),
    "open, continued": (R1_OPEN, {}, [ASKED, says("add</think>four")], None, "all", ["add</think>four"]),
    "open, continued and kept": (
        *(QWEN3_THINKING, {}, [ASKED, says("add</think>four")], None, "all"),
        ["add\n</think>\n\nfour"],
    ),
    "open without a newline": (R1_OPEN, {}, [ASKED, says(SHORT)], None, "all", ["add</think>four"]),
    "calls and thoughts": (
        *(QWEN3, {}, [ASKED, calls("<think>\nask\n</think>\n\n"), RESULT, says(THOUGHT)], TOOLS, "all"),
        [f"<think>\nask\n</think>\n\n\n<tool_call>{CALL}", THOUGHT],
    ),
    "calls without thoughts": (QWEN3, {}, [ASKED, calls(), RESULT, says(THOUGHT)], TOOLS, "last", [THOUGHT]),
    "call at the end": (
        *(QWEN3, {}, [EMPTY, ASKED, calls()], TOOLS, "all"),
        [f"<think>\n\n</think>\n\n\n<tool_call>{CALL}"],
    ),
    "llama": (
        *(LLAMA31, {"date_string": "1 Jan"}, [TERSE, ASKED, calls(), RESULT, says(" four")], TOOLS, "all"),
        ['{"name": "add", "parameters": {"a": 2, "b": 2}}', "four"],
    ),
    "empty system": (LLAMA31, {}, [EMPTY, ASKED, says("four"), SURE, says("yes")], None, "all", ["four", "yes"]),
    "empty result": (LLAMA31, {}, [ASKED, calls(), {**RESULT, "content": ""}, says("?")], TOOLS, "last", ["?"]),
    "mistral": (
        *(MISTRAL, {}, [TERSE, ASKED, calls(), RESULT, says("four")], TOOLS, "all"),
        [f"[CALLS][{CALL}]", " four"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_those_of_transformers_and_responses_are_whole(load, case):
    template, variables, messages, tools, learn, wanted = CASES[case]
    ours, theirs = load(template, variables)
    messages = validate(messages)
    ids, learned = encode(ours, "tokenizer", messages, learn, tools)
    assert runs(ours, ids, learned) == [text + END for text in wanted]

    def prompt(before):
        more = {"tools": tools, "add_generation_prompt": True, "return_dict": False}
        return theirs.apply_chat_template(before, **more, **variables)

    starts = [t for t in range(len(ids)) if learned[t] and not learned[t - 1]]
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for start, i in zip(starts, spoken if learn == "all" else spoken[-1:], strict=True):
        assert ids[:start] == prompt(messages[:i]) == encode(ours, "tokenizer", messages[:i], tools=tools)[0]
        assert num_cue(ours, "tokenizer") <= start


@pytest.mark.parametrize("text", ['{"a": 2, "b": 2}', '{"b":2,"a":2}', "", " {}"])
def test_arguments_may_be_json_text(text):
    """OpenAI's API has the text. The template gets the object, also in a call without `function`."""
    call, wanted = {"name": "add", "arguments": text}, {"name": "add", "arguments": json.loads(text or "{}")}
    [message] = validate([says(None, tool_calls=[{"type": "function", "function": call}, call])])
    assert message["tool_calls"] == [{"type": "function", "function": wanted}, wanted]
    row = {"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": json.dumps(call)}]}
    [(messages, _)] = forms.read(json.dumps(row).encode(), "demonstrations").told
    assert messages[1]["tool_calls"] == [{"type": "function", "function": wanted}]
    assert call["arguments"] == text, "the given message is not changed"


WHOLE = [case for case in CASES if not case.startswith(("cut", "open", "text before", "other"))]


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_not_edited_has_the_tokens_of_transformers(load, case):
    template, variables, messages, tools, learn, _ = CASES[case]
    ours, theirs = load(template, variables)
    ids, _ = encode(ours, "tokenizer", validate(messages), learn, tools)
    if case != "no thinking, last of two":  # the cue has an empty thought, a finished turn has none
        assert ids == theirs.apply_chat_template(messages, tools=tools, return_dict=False, **variables)


LLAMA2 = "{% for m in messages %}{{ '[INST]' if m.role == 'user' else '' }}{{ m.content | trim }}{% endfor %}"
EDITS = "earlier turns when other messages follow; set data.learn=last"


@pytest.mark.parametrize(
    ("template", "variables", "messages", "error"),
    [
        (
            QWEN3,
            {},
            [ASKED, says("four"), SURE, says("yes")],
            f"message 3: the tokenizer's chat template changes {EDITS}",
        ),
        (QWEN3, {}, [ASKED, calls(), RESULT, says("yes")], EDITS),
        (R1, {}, [ASKED, says(THOUGHT), SURE, says("yes")], EDITS),
        (MISTRAL, {}, [TERSE, ASKED, says("four"), SURE, says("yes")], EDITS),
        (
            R1_OPEN,
            {},
            [ASKED, says("four")],
            r"message 2: the generation prompt of the tokenizer's chat template ends with '<think>\n'",
        ),
        (R1_OPEN, {}, [ASKED, says("four")], "begin the content with '<think>', for example with an empty thought, or"),
        (
            QWEN3,
            NO_THINKING,
            [ASKED, says(THOUGHT)],
            "does not begin this turn with its generation prompt, which ends with",
        ),
        (R1, {}, [ASKED, says("four", reasoning_content="add")], "does not write 'reasoning_content'; move it to"),
        (
            QWEN3,
            {},
            [ASKED, says("four", thinking="add")],
            "does not write 'thinking'; move it to 'content', or remove",
        ),
        (LLAMA31, {}, [ASKED, calls("Wait.")], "message 2: the tokenizer's chat template does not write this content"),
        (LLAMA2, {}, [ASKED, calls()], "does not write the call of 'add'; move it to 'content', or remove it"),
        (CHATML, {}, [ASKED, calls()], "the tokenizer's chat template fails"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_its_cause(load, template, variables, messages, error):
    with pytest.raises(UserError, match=re.escape(error)):
        encode(load(template, variables)[0], "tokenizer", validate(messages))


def test_tools_that_a_template_does_not_write(load, qwen):
    for tokenizer, template in ((load(R1, {})[0], "tokenizer"), (qwen, "chatml"), (qwen, "tokenizer")):
        with pytest.raises(UserError, match=f"template {template} does not write 'tools'; remove tools"):
            encode(tokenizer, template, [ASKED, says("four")], tools=TOOLS)


def test_several_named_templates(load):
    """As in transformers, a conversation with tools is written with the template for tools."""
    several = [{"name": "default", "template": R1}, {"name": "tool_use", "template": QWEN3}]
    ours, theirs = load(several, {})
    for tools in (None, TOOLS):
        wanted = theirs.apply_chat_template([ASKED], tools=tools, add_generation_prompt=True, return_dict=False)
        assert encode(ours, "tokenizer", [ASKED], tools=tools)[0] == wanted


@pytest.mark.parametrize("tools", [TOOLS, '[{"type": "function"}]', None, "", []])
def test_tools_of_a_line(tools):
    assert read_tools(tools) == (TOOLS if tools is TOOLS else [{"type": "function"}] if tools else None)


@pytest.mark.parametrize("tools", [["add"], "add", {"name": "add"}, 3, [TOOLS]])
def test_tools_that_are_none(tools):
    with pytest.raises(UserError, match=re.escape(f"'tools' is {tools!r:.80}; give a list of objects")):
        read_tools(tools)


def test_a_turn_that_the_template_does_not_keep_cannot_be_answered(load):
    tokenizer, _ = load("{{ messages[-1].content }}", {})
    with pytest.raises(UserError, match="does not write earlier turns of the assistant; choose another"):
        reply(tokenizer, "tokenizer", [tokenizer.eos], [SURE])


ANSWERS = [(template, answer) for template in (QWEN3, QWEN3_THINKING, LLAMA31, MISTRAL) for answer in (RESULT, SURE)]


@pytest.mark.parametrize(("template", "answer"), [*ANSWERS, (R1_OPEN, SURE)])
def test_a_sampled_turn_keeps_its_text(load, template, answer):
    """The tokens behind it are those of transformers, also if the template would remove its thought."""
    ours, theirs = load(template, {})
    text = theirs.apply_chat_template([ASKED, says("sentinel"), answer], add_generation_prompt=True, tokenize=False)
    behind = ours.encode(text.partition("sentinel")[2], continues=True, control=True)
    turn = ours.encode(THOUGHT, continues=True)
    assert turn + reply(ours, "tokenizer", turn, [answer]) == turn + behind
    assert [*turn, ours.eos, *reply(ours, "tokenizer", [*turn, ours.eos], [answer])] == turn + behind
