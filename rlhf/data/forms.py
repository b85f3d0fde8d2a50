"""The forms of a data set's lines. A line has one or several conversations, each with a reward.

Algorithm.form chooses the table of forms for a mode. A line has the first form in the table whose keys it has. Reward
functions may use the other keys. A prompt or response may be a text or a list of messages (objects with role and
content, as in TRL). The text of a prompt becomes a user message, and the text of a response becomes an assistant
message. In lists of scored responses, each response must be a text. A line of messages may describe `tools`.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf import texts
from rlhf.contracts import Form
from rlhf.data import templates
from rlhf.data.chat import Message
from rlhf.errors import UserError

Row = dict[str, Any]
Keys = tuple[str, ...]
Told = list[tuple[list[Message], float]]  # conversations of one group, each with the reward of its last response
Parse = Callable[[Row, Keys], Told]


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a line."""

    told: Told
    is_text: bool  # prompt and responses are texts, not messages
    tools: object  # the value of `tools`


def read(line: bytes, form: Form, required: Keys = ()) -> Content:
    """Return the content of a line, read by the first form that fits it. Raises UserError.

    required: further keys that the line must have, such as the answer for a reward function.
    """
    row, forms = parse(line), FORMS[form]
    keys = next((keys for keys in forms if all(key in row for key in keys)), None)
    if keys is None:
        wanted = ", or ".join(" and ".join(map(repr, keys)) for keys in forms)
        raise UserError(f"the line has the keys {', '.join(map(repr, row)) or 'none'}; give it {wanted}")
    for key in required:
        if row.get(key) in (None, ""):
            remedy = "add it, or set another reward.function, or set reward.load"
            raise UserError(f"no {key!r}, which the reward needs; {remedy}")
        if not _stated(row[key]):
            given = f"{key!r} is {row[key]!r:.80}, but the reward needs a text or a number"
            raise UserError(f"{given}; give one, or set another reward.function")
    if "answer" in required and row.get("eval_func", "math_rule") != "math_rule":
        raise UserError(
            f"'eval_func' is {row['eval_func']!r:.80}, but the reward verifies 'math_rule'; set another reward.function"
        )
    is_text = not any(_is_messages(row[key]) for key in keys)
    return Content(forms[keys](row, keys), is_text, row.get("tools"))


def _is_messages(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and isinstance(next(iter(value), None), dict))


def _stated(value: object) -> bool:
    """Return whether a value can be compared with an answer: a text that is not blank, or a finite number."""
    return bool(value.strip()) if isinstance(value, str) else type(value) in (int, float) and abs(value) < math.inf  # type: ignore[arg-type]


def parse(line: bytes) -> Row:
    """Return the JSON object of a line. Raises UserError if it is not one."""
    try:
        row = texts.parse(line)
    except ValueError as error:
        raise UserError(f"not JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"not an object but {row!r:.80}; write one object per line")
    return row


def _prompt(row: Row, keys: Keys) -> Told:
    return [(_turns(row, keys[0]), 0.0)]


def _unanswered(row: Row, keys: Keys) -> Told:
    """Return a conversation as a prompt. A last message of the assistant is dropped, because the policy replaces it."""
    messages = templates.validate(row[keys[0]])
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError(f"{keys[0]!r} has no user message before the last assistant message; add one")
    return [(messages, 0.0)]


def _exchange(row: Row, keys: Keys) -> Told:
    return [(_continued(_turns(row, keys[0]), row, keys[1]), 0.0)]


def _conversation(row: Row, keys: Keys) -> Told:
    messages = templates.validate(row[keys[0]])
    if messages[-1]["role"] != "assistant":
        last = messages[-1]["role"]
        raise UserError(f"{keys[0]!r} ends with {last!r}; end it with the assistant, whose messages are learned")
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
    if not isinstance(row[key], list):
        return [{"role": "user", "content": _text(row[key], key)}]
    messages = templates.validate(row[key])
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{key!r} ends with the assistant; end it with the user")
    return messages


def _continued(prompt: list[Message], row: Row, key: str) -> list[Message]:
    """Return the prompt and the response under `key`: a text, or a list of messages.

    The list may begin with the messages of the prompt. With an empty `prompt`, it must contain the whole conversation.
    """
    if not isinstance(row[key], list):
        if not prompt:
            remedy = f"add 'prompt', or give {key!r} as messages (tools/prepare_data.py converts HH data)"
            raise UserError(f"{key!r} is {row[key]!r:.80}, and there is no 'prompt'; {remedy}")
        return [*prompt, _said(row[key], key)]
    messages = templates.validate(row[key])
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{key!r} ends with {messages[-1]['role']!r}; end it with the assistant")
    if messages[: len(prompt)] != prompt:
        messages = [*prompt, *messages]
    if len(messages) == 1:
        raise UserError(f"{key!r} is a response without a prompt; add a 'prompt', or begin the messages with the user")
    return messages


def _said(text: object, name: str) -> Message:
    return {"role": "assistant", "content": _text(text, name)}


def _text(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{name!r} is {text!r:.80}; give a string")
    if not text.strip():
        raise UserError(f"{name!r} is empty; give it a text or remove the line")
    return text


_PROMPTS: dict[Keys, Parse] = {
    ("prompt",): _prompt,
    ("query",): _prompt,
    ("question",): _prompt,
    ("messages",): _unanswered,
}
_PAIRS: dict[Keys, Parse] = {
    ("prompt", "chosen", "rejected"): _pair,
    ("query", "chosen", "rejected"): _pair,
    ("chosen", "rejected"): _pair,
}
FORMS: dict[Form, dict[Keys, Parse]] = {
    "demonstrations": {
        ("messages",): _conversation,
        ("prompt", "response"): _exchange,
        ("prompt", "completion"): _exchange,
        ("query", "response"): _exchange,
        ("question", "answer"): _exchange,
    },
    "scored": {("query", "response", "score"): _scored, ("prompt", "response", "score"): _scored, **_PAIRS},
    "pairs": _PAIRS,
    "prompts": _PROMPTS,
}
COMPARED: tuple[Form, ...] = ("scored", "pairs")  # forms that compare last responses; only these responses are learned
