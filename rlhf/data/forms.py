"""The forms of a data set's lines. A line has one or several conversations, each with a reward.

Algorithm.form chooses the table of forms for a mode. A line has the first form in the table whose keys it has. Reward
functions may use the other keys. A prompt or response may be a text or a list of messages (objects with role and
content, as in TRL, or with from and value, as in ShareGPT). The text of a prompt becomes a user message, and the text
of a response becomes an assistant message. In lists of scored responses, each response must be a text. The text under
`system` becomes the system message of every form. Alpaca's lines are read as in LLaMA-Factory. A line of messages may
describe `tools`.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf import texts
from rlhf.contracts import Form
from rlhf.data import templates
from rlhf.data.chat import Message
from rlhf.errors import UserError

Row = dict[str, Any]
Keys = tuple[str, ...]
Told = list[tuple[list[Message], float]]  # conversations of one group, each with the reward of its last response
Parse = Callable[[Row, Keys], Told]


class Need(NamedTuple):
    """What a reward function needs of a line: at least one of these keys."""

    keys: Keys
    remedy: str  # what to do if lines do not have them
    verified: bool = False  # its value is compared with the answer of a response, so it is a text or a number


ANSWER = Need(("answer",), "set another reward.function", verified=True)


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a line."""

    told: Told
    is_text: bool  # prompt and responses are texts, not messages, an instruction or a question
    tools: object  # the value of `tools`


def read(line: bytes, form: Form, required: Sequence[Need] = ()) -> Content:
    """Return the content of a line, read by the first form that fits it. Raises UserError.

    required: further keys that the line must have, such as the answer for a reward function.
    """
    row = parse(line)
    keys = _form(row, form)
    for need in required:
        _check_need(row, need)
    told = [(under_system(row, messages), reward) for messages, reward in FORMS[form][keys](row, keys)]
    is_text = not {"instruction", "turns"} & {*keys} and not any(_is_messages(row[key]) for key in keys)
    return Content(told, is_text, row.get("tools"))


def _check_need(row: Row, need: Need) -> None:
    """Raise UserError unless a line has what a reward function needs."""
    key = next((key for key in need.keys if row.get(key) not in (None, "", [])), None)
    if key is None:
        raise UserError(f"no {' or '.join(map(repr, need.keys))}, which the reward needs; add it, or {need.remedy}")
    if need.verified and not _stated(row[key]):
        given = f"{key!r} is {row[key]!r:.80}, but the reward needs a text or a number, or a list of them"
        raise UserError(f"{given}; give one, or {need.remedy}")
    if need.verified and row.get("eval_func", "math_rule") != "math_rule":
        raise UserError(f"'eval_func' is {row['eval_func']!r:.80}, but the reward verifies 'math_rule'; {need.remedy}")


def _is_messages(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and isinstance(next(iter(value), None), dict))


def _form(row: Row, form: Form) -> Keys:
    """Return the keys of the first form that fits a line. Forms whose keys are null come last."""
    label = next((key for key in ("label", "kto_tag") if type(row.get(key)) is bool), None)
    if label and form != "prompts" and "chosen" not in row:
        one = f"{label!r} is {row[label]}, but lines that label one response (KTO) are not read"
        raise UserError(
            f"{one}; give pairs with 'chosen' and 'rejected', or for sft the good responses without the key"
        )
    fitting = [keys for keys in FORMS[form] if all(key in row for key in keys)]
    if not fitting:
        wanted = ", or ".join(" and ".join(map(repr, keys)) for keys in FORMS[form])
        raise UserError(f"the line has the keys {', '.join(map(repr, row)) or 'none'}; give it {wanted}")
    return next((keys for keys in fitting if all(row[key] is not None for key in keys)), fitting[0])


def under_system(row: Row, messages: list[Message]) -> list[Message]:
    """Return the messages with the system text of the line before them. Raises UserError if there are two texts."""
    found = {repr(key): _text(row[key], key) for key in SYSTEM if _given(row, key)}
    if messages[0]["role"] == "system":
        found["the first message"] = messages[0]["content"] or ""
    if len(set(found.values())) > 1:
        raise UserError(f"{' and '.join(found)} are different system texts; remove one of them")
    if not found or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": next(iter(found.values()))}, *messages]


def _given(row: Row, key: str) -> bool:
    """Return whether a line has a value that is not null and not a blank text."""
    value = row.get(key)
    return bool(value.strip()) if isinstance(value, str) else value is not None


def _stated(value: object) -> bool:
    """Return whether a value can be compared with an answer: a text that is not blank, or a finite number.

    In a list of such values, any of them is right.
    """
    if isinstance(value, list):
        return all(not isinstance(each, list) and _stated(each) for each in value)
    return bool(value.strip()) if isinstance(value, str) else type(value) in (int, float) and abs(value) < math.inf  # type: ignore[arg-type]


def parse(line: bytes) -> Row:
    """Return the JSON object of a line. Raises UserError if it is not one."""
    try:
        row = texts.parse(line)
    except ValueError as error:
        raise UserError(f"not JSON ({error}); write one object per line, or an array of objects") from None
    if not isinstance(row, dict):
        raise UserError(f"not an object but {row!r:.80}; write one object per line, or an array of objects")
    return row


def _prompt(row: Row, keys: Keys) -> Told:
    return [(_turns(row, keys[0]), 0.0)]


def _question(row: Row, keys: Keys) -> Told:
    """Return the first turn of a question, as a prompt. The others follow its answer."""
    turns = row[keys[0]] if isinstance(row[keys[0]], list) else []
    return [([_asked(next(iter(turns), None), f"{keys[0]} 1")], 0.0)]


def _unanswered(row: Row, keys: Keys) -> Told:
    """Return a conversation as a prompt. A last message of the assistant is dropped, because the policy replaces it."""
    messages = _messages(row[keys[0]])
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError(f"{keys[0]!r} has no user message before the last assistant message; add one")
    return [(messages, 0.0)]


def _exchange(row: Row, keys: Keys) -> Told:
    return [(_continued(_turns(row, keys[0]), row, keys[1]), 0.0)]


def _conversation(row: Row, keys: Keys) -> Told:
    messages = _messages(row[keys[0]])
    if messages[-1]["role"] != "assistant":
        last = messages[-1]["role"]
        raise UserError(f"{keys[0]!r} ends with {last!r}; end it with the assistant, whose messages are learned")
    for i, message in enumerate(messages, 1):
        if message["role"] == "assistant" and message.get("weight") == 0:
            given = f"message {i} has weight 0, but single messages cannot be left out"
            raise UserError(f"{given}; remove the key (data.learn=last learns the last message only)")
    return [(messages, 0.0)]


def _scored(row: Row, keys: Keys) -> Told:
    prompt, (_, responses, scores) = _turns(row, keys[0]), keys
    for key in (responses, scores):
        if not isinstance(row[key], list):
            raise UserError(f"{key!r} is {row[key]!r:.80}; give a list with one entry per response")
    if len(row[responses]) != len(row[scores]):
        lengths = f"{responses!r} has {len(row[responses])} entries and {scores!r} {len(row[scores])}"
        raise UserError(f"{lengths}; give every response a score")
    if len(row[responses]) < 2:
        raise UserError(
            f"{responses!r} has {len(row[responses])} entries; give two or more to compare, or remove the line"
        )
    told = []
    for i, (response, score) in enumerate(zip(row[responses], row[scores], strict=True), 1):
        if type(score) not in (int, float) or not abs(score) <= sys.float_info.max:  # nan is not
            raise UserError(f"{scores!r} {i} is {score!r:.80}; give a number")
        told.append(([*prompt, _said(response, f"{responses} {i}")], float(score)))
    return told


def _pair(row: Row, keys: Keys) -> Told:
    """Return a pair: the chosen response has reward 1, the rejected one 0. Both must answer the same prompt."""
    *prompt, chosen, rejected = keys
    turns = _turns(row, prompt[0]) if prompt else []
    told = [(_continued(turns, row, chosen), 1.0), (_continued(turns, row, rejected), 0.0)]
    if told[0][0][:-1] != told[1][0][:-1]:
        both = f"{chosen!r} and {rejected!r}"
        raise UserError(f"{both} differ before their last messages, so they answer different prompts; remove the line")
    return told


def _turns(row: Row, key: str) -> list[Message]:
    """Return the messages of a prompt."""
    if key == "instruction":
        return _instruction(row)
    if not isinstance(row[key], list):
        return [_asked(row[key], key)]
    messages = _messages(row[key])
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{key!r} ends with the assistant; end it with the user")
    return messages


def _instruction(row: Row) -> list[Message]:
    """Return the prompt of Alpaca's form: the pairs of `history`, then the instruction and its input, if it has any."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"'history' is {history!r:.80}; give a list of pairs of an instruction and its response")
    messages = []
    for i, (asked, said) in enumerate(history, 1):
        messages += [_asked(asked, f"history {i}"), _said(said, f"history {i}")]
    parts = [(key, row[key]) for key in ("instruction", *INPUTS) if _given(row, key)]
    if not parts:
        raise UserError("'instruction' is empty; give it a text or remove the line")
    return [*messages, _asked("\n".join(_text(text, key) for key, text in parts), "instruction")]


def _messages(value: object) -> list[Message]:
    """Return the messages of a list, or of one message. Raises UserError with the number of the message."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        value = [_message(turn, i) if isinstance(turn, dict) else turn for i, turn in enumerate(value, 1)]
    return templates.validate(value)


def _message(turn: Row, number: int) -> Row:
    """Return a message with role and content. Those of ShareGPT have from and value instead."""
    if "role" in turn or not {"from", "value"} <= turn.keys():
        return turn
    speaker, content = turn["from"], turn["value"]
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise UserError(f"message {number} is from {speaker!r:.80}; it must be from one of {', '.join(SPEAKERS)}")
    if speaker == CALL:
        return {**rest, "role": "assistant", "content": None, "tool_calls": _calls(content, number)}
    return {**rest, "role": SPEAKERS[speaker], "content": content}


def _calls(content: object, number: int) -> list[Row]:
    """Return the tool calls of a ShareGPT message: JSON text of an object with name and arguments, or of a list."""
    try:
        found = texts.parse(content) if isinstance(content, str) else content
    except ValueError:
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        given = f"message {number} is from {CALL}, but its value is {content!r:.80}"
        raise UserError(f"{given}; give JSON with the keys 'name' and 'arguments'")
    return [{"type": "function", "function": call} for call in calls]


def _continued(prompt: list[Message], row: Row, key: str) -> list[Message]:
    """Return the prompt and the response under `key`: a text, or a list of messages.

    The list follows the prompt if it begins with the assistant. Otherwise it is the whole conversation and contains the
    prompt. With an empty `prompt`, it must be the whole conversation.
    """
    if not isinstance(row[key], (list, dict)):
        if not prompt:
            remedy = f"add 'prompt', or give {key!r} as messages (tools/prepare_data.py converts HH data)"
            raise UserError(f"{key!r} is {row[key]!r:.80}, and there is no 'prompt'; {remedy}")
        return [*prompt, _said(row[key], key)]
    messages = _messages(row[key])
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{key!r} ends with {messages[-1]['role']!r}; end it with the assistant")
    asked, told = ([(turn["role"], turn["content"]) for turn in turns] for turns in (prompt, messages))
    if messages[0]["role"] == "assistant" and told[: len(asked)] != asked:
        messages = [*prompt, *messages]
    elif not any(told[i : i + len(asked)] == asked for i in range(len(told))):
        raise UserError(
            f"{key!r} does not contain the messages of the prompt; begin it with the assistant, or with them"
        )
    if len(messages) == 1:
        raise UserError(f"{key!r} is a response without a prompt; add a 'prompt', or begin the messages with the user")
    return messages


def _asked(text: object, name: str) -> Message:
    return {"role": "user", "content": _text(text, name)}


def _said(text: object, name: str) -> Message:
    return {"role": "assistant", "content": _text(text, name)}


def _text(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{name!r} is {text!r:.80}; give a string")
    if not text.strip():
        raise UserError(f"{name!r} is empty; give it a text or remove the line")
    return text


SYSTEM = ("system", "system_prompt")  # keys of a system text, in Alpaca's and ShareGPT's lines and in OpenOrca's
INPUTS = ("input", "context")  # keys of the text to which an instruction applies, in Alpaca's lines and in Dolly's
CALL = "function_call"
SPEAKERS = {  # the speakers of ShareGPT's messages -> their roles
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"},
    **{"system": "system", "tool": "tool", "observation": "tool", CALL: "assistant"},
}
_PROMPTS: dict[Keys, Parse] = {
    ("prompt",): _prompt,
    ("query",): _prompt,
    ("question",): _prompt,
    ("problem",): _prompt,
    ("instruction",): _prompt,
    ("messages",): _unanswered,
    ("conversations",): _unanswered,
    ("conversation",): _unanswered,
}
_PAIRS: dict[Keys, Parse] = {
    ("prompt", "chosen", "rejected"): _pair,
    ("query", "chosen", "rejected"): _pair,
    ("question", "chosen", "rejected"): _pair,
    ("instruction", "chosen", "rejected"): _pair,
    ("conversations", "chosen", "rejected"): _pair,
    ("chosen", "rejected"): _pair,
}
FORMS: dict[Form, dict[Keys, Parse]] = {
    "demonstrations": {
        ("messages",): _conversation,
        ("conversations",): _conversation,
        ("conversation",): _conversation,
        ("prompt", "response"): _exchange,
        ("prompt", "completion"): _exchange,
        ("query", "response"): _exchange,
        ("question", "answer"): _exchange,
        ("question", "response"): _exchange,
        ("problem", "solution"): _exchange,
        ("instruction", "output"): _exchange,
        ("instruction", "response"): _exchange,
    },
    "scored": {("query", "response", "score"): _scored, ("prompt", "response", "score"): _scored, **_PAIRS},
    "pairs": _PAIRS,
    "prompts": _PROMPTS,
    "questions": {("turns",): _question},
}
COMPARED: tuple[Form, ...] = ("scored", "pairs")  # forms that compare last responses; only these responses are learned
