"""Prompts and responses in the text of a tokenizer's own chat template, which may edit what messages say.

Templates of reasoning models remove thoughts from responses (DeepSeek-R1), add empty ones (Qwen3), or begin a thought
in the cue of the assistant's turn. What is learned contains the whole message, after the prompt that generation has.
"""

from collections.abc import Callable

from rlhf.data.chat import Message
from rlhf.errors import UserError

Render = Callable[[list[Message], bool], str]  # messages, whether to add the cue -> text
MARK = "the content of this message"
TEXTS = ("content", "reasoning_content", "reasoning", "thinking")  # keys of what a message says

CHANGED = "the tokenizer's chat template changes the text of earlier messages when an answer follows"
NO_CUE = "the tokenizer's chat template does not begin this turn with its generation prompt, which ends with"
OTHER = "choose another data.template"


def exchange(render: Render, messages: list[Message]) -> tuple[str, str]:
    """Return the prompt of the last message, which is the assistant's, and the response, which ends the turn.

    The response is what the template adds to the prompt. If this lacks a part of the content, the response is the
    content as it is, and the end of the turn as the template has it. Raises UserError if there is no such response.
    """
    message = messages[-1]
    prompt, answered = render(messages[:-1], True), render(messages, False)
    if answered.startswith(prompt) and not _lost(message, answered[len(prompt) :]):
        return prompt, answered[len(prompt) :]
    before = render(messages[:-1], False)
    if not answered.startswith(before):
        raise UserError(f"{CHANGED}; {OTHER}")
    if answered.startswith(prompt) and not _lost(message, answered[len(before) :]):
        return prompt, answered[len(prompt) :]  # the cue has the beginning of the content
    if lost := _lost({**message, "content": ""}, answered[len(before) :]):
        raise UserError(f"the tokenizer's chat template does not write {lost}; move it to 'content', or remove it")
    return prompt, _restored(render, messages, prompt, answered.startswith(prompt))


def _restored(render: Render, messages: list[Message], prompt: str, begun: bool) -> str:
    """Return the content of the last message, without what the cue has of it, and the end of its turn.

    begun: whether the template begins this turn with the cue.
    """
    content = messages[-1].get("content") or ""
    before, found, end = render([*messages[:-1], {**messages[-1], "content": MARK}], False).rpartition(MARK)
    if not found:
        raise UserError(f"the tokenizer's chat template does not write this content; remove it, or {OTHER}")
    if before.startswith(prompt) and begun:
        return before[len(prompt) :] + content + end
    opened = prompt[len(before) :] if prompt.startswith(before) else ""
    tag = opened.strip()
    if not tag:
        raise UserError(f"{NO_CUE} {prompt[-40:]!r}; set or remove data.template_variables, or {OTHER}")
    if tag not in content and tag.replace("<", "</", 1) in content:
        return content + end  # it continues the cue
    if not content.lstrip().startswith(tag):
        begin = f"begin the content with {tag!r}, for example with an empty thought"
        cue = f"the generation prompt of the tokenizer's chat template ends with {opened!r}"
        raise UserError(f"{cue}; {begin}, or {OTHER}")
    rest = content.lstrip().removeprefix(tag)
    return rest.removeprefix(opened[len(opened.rstrip()) :]) + end


def reply(render: Render, messages: list[Message]) -> tuple[str, str]:
    """Return the text that ends a turn of the assistant, and the text up to its next turn, if the messages answer it.

    The turn keeps its own text, even if the template would change it when messages follow.
    """
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    end = _behind_mark(render(turn, False))
    behind = _behind_mark(render([*turn, *messages], True))
    return (end, behind.removeprefix(end)) if behind.startswith(end) else ("", behind)


def _behind_mark(text: str) -> str:
    _, found, behind = text.rpartition(MARK)
    if not found:
        raise UserError(f"the tokenizer's chat template does not write earlier turns of the assistant; {OTHER}")
    return behind


def _lost(message: Message, text: str) -> str:
    """Return the name of the first part of a message that the text lacks, or "". White space is not compared."""
    calls = message.get("tool_calls") or []
    functions = [call.get("function", call) for call in calls]
    parts = [(f"'{key}'", message[key]) for key in TEXTS if isinstance(message.get(key), str)]
    parts += [(f"the call of {function.get('name')!r:.80}", function.get("name")) for function in functions]
    said = "".join(text.split())
    return next((what for what, part in parts if "".join(str(part or "").split()) not in said), "")
