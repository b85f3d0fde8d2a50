"""The forms that a line of a data set may have, and what each says: one or several conversations and what they are worth.

An algorithm names the table that its lines are read by (Algorithm.form). A line is of the first form in it whose keys it has; whatever
other keys it has are left to rewards. Texts and messages (objects with role and content, as trl writes them) may stand for one another: a
text in the place of a prompt is what the user says, and in the place of a response what the assistant says. Responses in a list of scored
ones are texts.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

from rlhf import texts
from rlhf.contracts import Form
from rlhf.data import templates
from rlhf.data.templates import Message
from rlhf.errors import UserError

Row = dict[str, Any]
Keys = tuple[str, ...]
Told = list[tuple[list[Message], float]]  # conversations and what their last responses are worth; several are siblings of one group
Parse = Callable[[Row, Keys], Told]


def read(line: bytes, form: Form, required: Keys = ()) -> Told:
    """The conversations of a line by the first of the forms that fits it.

    required: further keys that the line must have, such as the answer that a reward compares with. Raises UserError.
    """
    row, forms = parse(line), FORMS[form]
    keys = next((keys for keys in forms if all(key in row for key in keys)), None)
    if keys is None:
        wanted = ", or ".join(" and ".join(map(repr, keys)) for keys in forms)
        raise UserError(f"has the keys {', '.join(map(repr, row)) or 'none'}; give it {wanted}")
    for key in required:
        if row.get(key) in (None, ""):
            raise UserError(f"no {key!r}, which the reward needs; add it, or set another reward.function or a model as reward.load")
        if not _stated(row[key]):
            raise UserError(
                f"{key!r} is {row[key]!r:.80}, but the reward needs a text or a number; give one, or set another reward.function"
            )
    if "answer" in required and row.get("eval_func", "math_rule") != "math_rule":
        raise UserError(f"'eval_func' is {row['eval_func']!r:.80}, but the reward verifies 'math_rule'; set another reward.function")
    return forms[keys](row, keys)


def _stated(value: object) -> bool:
    """Whether it can be compared with what a response says."""
    return bool(value.strip()) if isinstance(value, str) else type(value) in (int, float) and abs(value) < math.inf  # type: ignore[arg-type]


def parse(line: bytes) -> Row:
    """The object of a line. Raises UserError if it is none."""
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
    """A conversation as a prompt: a last turn of the assistant is left out, for the policy is to say another."""
    messages = templates.validate(row[keys[0]])
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError(f"{keys[0]!r} has no turn of the user before the assistant's last; add one")
    return [(messages, 0.0)]


def _exchange(row: Row, keys: Keys) -> Told:
    return [(_continued(_turns(row, keys[0]), row, keys[1]), 0.0)]


def _conversation(row: Row, keys: Keys) -> Told:
    messages = templates.validate(row[keys[0]])
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{keys[0]!r} ends with {messages[-1]['role']!r}; end it with the assistant, whose turns are learned")
    return [(messages, 0.0)]


def _scored(row: Row, keys: Keys) -> Told:
    prompt, (_, responses, scores) = _turns(row, keys[0]), keys
    for key in (responses, scores):
        if not isinstance(row[key], list):
            raise UserError(f"{key!r} is {row[key]!r:.80}; give a list with one entry per response")
    if len(row[responses]) != len(row[scores]):
        raise UserError(f"{responses!r} has {len(row[responses])} entries and {scores!r} {len(row[scores])}; give every response a score")
    if len(row[responses]) < 2:
        raise UserError(f"{responses!r} has {len(row[responses])} entries; give two or more to compare, or remove the line")
    told = []
    for i, (response, score) in enumerate(zip(row[responses], row[scores], strict=True), 1):
        if type(score) not in (int, float) or not abs(score) <= sys.float_info.max:  # nan is not
            raise UserError(f"{scores!r} {i} is {score!r:.80}; give a number")
        told.append(([*prompt, _said(response, f"{responses} {i}")], float(score)))
    return told


def _pair(row: Row, keys: Keys) -> Told:
    """The better response is worth 1 and the other 0. Both must answer the same turns."""
    *prompt, chosen, rejected = keys
    turns = _turns(row, prompt[0]) if prompt else []
    told = [(_continued(turns, row, chosen), 1.0), (_continued(turns, row, rejected), 0.0)]
    if told[0][0][:-1] != told[1][0][:-1]:
        raise UserError(f"{chosen!r} and {rejected!r} differ before their last turns, so they answer different prompts; remove the line")
    return told


def _turns(row: Row, key: str) -> list[Message]:
    """The conversation up to a response."""
    if not isinstance(row[key], list):
        return [{"role": "user", "content": _text(row[key], key)}]
    messages = templates.validate(row[key])
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{key!r} ends with the assistant, who is to answer it; end it with the user")
    return messages


def _continued(prompt: list[Message], row: Row, key: str) -> list[Message]:
    """The prompt and what a text says to it, or a list of messages, which may repeat the prompt (or be all there is of it)."""
    if not isinstance(row[key], list):
        if not prompt:
            raise UserError(
                f"{key!r} without a 'prompt' is {row[key]!r:.80}; add the prompt, or give messages (tools/prepare_data.py splits HH)"
            )
        return [*prompt, _said(row[key], key)]
    messages = templates.validate(row[key])
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{key!r} ends with {messages[-1]['role']!r}; end it with the assistant")
    if messages[: len(prompt)] != prompt:
        messages = [*prompt, *messages]
    if len(messages) == 1:
        raise UserError(f"{key!r} is a response to nothing; add a 'prompt', or begin the messages with the user")
    return messages


def _said(text: object, name: str) -> Message:
    return {"role": "assistant", "content": _text(text, name)}


def _text(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{name!r} is {text!r:.80}; give a string")
    if not text.strip():
        raise UserError(f"{name!r} is empty; give it a text or remove the line")
    return text


_PROMPTS: dict[Keys, Parse] = {("prompt",): _prompt, ("query",): _prompt, ("question",): _prompt, ("messages",): _unanswered}
_PAIRS: dict[Keys, Parse] = {("prompt", "chosen", "rejected"): _pair, ("query", "chosen", "rejected"): _pair, ("chosen", "rejected"): _pair}
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
COMPARED: tuple[Form, ...] = ("scored", "pairs")  # they compare the last responses of siblings, and learn nothing but them
