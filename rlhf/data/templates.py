"""Converts conversations to token ids, and marks the learned tokens: the assistant's messages and their eos.

A conversation that ends with the user is a prompt. None of its tokens are learned, and the cue that starts the
assistant's turn is added. Text between two learned responses is tokenized in one piece. A learned response always
starts a new piece. So the tokens of a prompt are the same in training and in generation.
"""

from collections.abc import Callable
from typing import Any

from rlhf import texts
from rlhf.data import rendered
from rlhf.data.chat import Message, Tools
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

Places = frozenset[int]  # indices of the learned messages


class Script:
    """The token ids of a conversation that is being written, and which of them are learned."""

    def __init__(self, tokenizer: Tokenizer, tools: Tools = None) -> None:
        self.tokenizer, self.tools = tokenizer, tools
        self.ids: list[int] = []
        self.learn: list[bool] = []
        self.fresh = True  # at the start of a text, or directly after a bos

    def begin(self) -> None:
        if self.tokenizer.bos is not None:
            self._append([self.tokenizer.bos], False)
        self.fresh = True

    def render(self, messages: list[Message], cue: bool) -> str:
        """Return the messages as the tokenizer's own chat template writes them."""
        return self.tokenizer.render(messages, cue, self.tools)

    def write(self, text: str, learn: bool = False, control: bool = False) -> None:
        """Append a text. control: special tokens that are spelled in the text become these tokens."""
        ids = self.tokenizer.encode(text, continues=not self.fresh, control=control)
        if self.fresh and self.ids and ids[:1] == [self.tokenizer.bos]:
            ids = ids[1:]  # the text spells the bos, which begin() has already written
        self._append(ids, learn)
        self.fresh = False

    def end(self, learn: bool) -> None:
        """Append eos to end the assistant's turn, unless the turn already ends with it."""
        if self.ids[-1:] != [self.tokenizer.eos]:
            self._append([self.tokenizer.eos], learn)

    def _append(self, ids: list[int], learn: bool) -> None:
        self.ids += ids
        self.learn += [learn] * len(ids)


def _plain(script: Script, messages: list[Message], learned: Places) -> None:
    """Write the contents of the messages as they are. Special tokens in them are kept. No header is added."""
    script.begin()
    for i, message in enumerate(messages):
        script.write(message["content"], learn=i in learned, control=True)
        if message["role"] == "assistant":
            script.end(i in learned)


def _human(script: Script, messages: list[Message], learned: Places) -> None:
    """Write a dialogue in the format of Anthropic's HH-RLHF data (2204.05862). A system text comes first.

    The tokens are those of the whole dialogue as one text, as in the files of that data with template plain. So only
    the end of the dialogue has an eos.
    """
    script.begin()
    text = ""
    for i, message in enumerate(messages):
        if message["content"].startswith("\n\nHuman:"):
            given = "the text begins with '\\n\\nHuman:', and data.template=human would add another"
            raise UserError(f"{given}; set data.template=plain")
        if message["role"] != "assistant":
            text += message["content"] if message["role"] == "system" else f"\n\nHuman: {message['content']}"
        elif i in learned:
            script.write(text + CUES["human"])
            script.write(" " + message["content"], learn=True)
            text = ""
        else:
            text += f"{CUES['human']} {message['content']}"
    if messages[-1]["role"] == "assistant":
        script.end(True)
    else:
        script.write(text + CUES["human"])


def _llama2(script: Script, messages: list[Message], learned: Places) -> None:
    """Write the Llama 2 chat format (2307.09288). Each exchange has a bos and an eos. The first has the system text."""
    system = ""
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            script.begin()
            script.write(f"[INST] {system}{content}{CUES['llama2']}")
            system = ""
        else:
            script.write(f" {content} ", learn=i in learned)
            script.end(i in learned)


def _chatml(script: Script, messages: list[Message], learned: Places) -> None:
    """Write ChatML: <|im_start|>role, newline, content, <|im_end|>, newline. An eos follows if <|im_end|> is not it."""
    script.begin()
    for i, message in enumerate(messages):
        learn = i in learned
        script.write("<|im_start|>", control=True)
        if message["role"] == "assistant":
            script.write("assistant\n")
            script.write(message["content"], learn)
            script.write("<|im_end|>", learn, control=True)
            script.end(learn)
        else:
            script.write(f"{message['role']}\n{message['content']}")
            script.write("<|im_end|>", control=True)
        script.write("\n")
    if messages[-1]["role"] != "assistant":
        script.write("<|im_start|>", control=True)
        script.write("assistant\n")


def _own(script: Script, messages: list[Message], learned: Places) -> None:
    """Write the tokenizer's own chat template, with the responses of rendered.exchange().

    Tokens after the stop token of a response are not learned. A last response without a stop token gets the eos.
    Raises UserError if later messages change the rendered text of a learned response.
    """
    done = ""  # the text written so far
    for i in sorted(learned):
        try:
            prompt, response = rendered.exchange(script.render, messages[: i + 1])
        except UserError as error:
            raise UserError(f"message {i + 1}: {error}") from None
        if not prompt.startswith(done):
            what = "the tokenizer's chat template changes earlier turns when other messages follow"
            raise UserError(f"message {i}: {what}; set data.learn=last")
        script.write(prompt[len(done) :], control=True)
        start = len(script.ids)
        script.write(response, learn=True, control=True)
        end = start + _stop(script.ids[start:], script.tokenizer)
        if end > start:
            script.learn[end:] = [False] * (len(script.ids) - end)
        elif i == len(messages) - 1:
            script.end(True)
        done = prompt + response
    if messages[-1]["role"] != "assistant":
        script.write(script.render(messages, True), control=True)


def _stop(ids: list[int], tokenizer: Tokenizer) -> int:
    """Return the length up to the last stop token, which is included; 0 if there is none."""
    return max((t + 1 for t, token in enumerate(ids) if token in tokenizer.stop_ids), default=0)


TEMPLATES: dict[str, Callable[[Script, list[Message], Places], None]] = {
    "plain": _plain,
    "human": _human,
    "llama2": _llama2,
    "chatml": _chatml,
    "tokenizer": _own,
}

TOOLS = "remove tools and their messages, or use data.template=tokenizer and a tokenizer whose chat template has tools"

CUES = {"plain": "", "human": "\n\nAssistant:", "llama2": " [/INST]", "chatml": "<|im_start|>assistant\n"}


def choose(tokenizer: Tokenizer, template: str, messages: list[Message], is_text: bool) -> str:
    """Return the key of TEMPLATES that data.template means for a validated conversation.

    is_text: the data set has texts, and not messages. Raises UserError if the template cannot separate the roles.
    """
    roles = [message["role"] for message in messages]
    is_text = is_text and roles in (["user"], ["user", "assistant"])  # not with a system text or earlier exchanges
    several = not is_text and len(set(roles)) > 1
    name = template
    if template == "auto":
        name = "tokenizer" if tokenizer.chats and not is_text else "plain"
    if name == "plain" and several:
        remedy = "set data.template to human, llama2 or chatml, or policy.tokenizer to a folder with a chat template"
        if template == "auto":
            raise UserError(f"the messages have several roles, but the tokenizer has no chat template; {remedy}")
        raise UserError(f"data.template=plain writes no marks between messages of several roles; {remedy}")
    return name


def read_tools(value: object) -> Tools:
    """Return the descriptions of tools in a line: objects, or their JSON text. Raises UserError."""
    try:
        found = texts.parse(value) if isinstance(value, str) else value
    except ValueError:
        found = value
    if found and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise UserError(f"'tools' is {value!r:.80}; give a list of objects that describe functions")
    return found or None  # type: ignore[return-value]


def validate(messages: object) -> list[Message]:
    """Return the messages of a conversation if they are valid, without other keys that are null.

    Raises UserError with the number of the message.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages are {messages!r:.80}; give a list of objects with 'role' and 'content'")
    return [_valid(message, i) for i, message in enumerate(messages, 1)]


def _valid(message: object, i: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"message {i} is {message!r:.80}; give an object with the strings 'role' and 'content'")
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if message.get("function_call"):
        raise UserError(f"message {i} has 'function_call', the older form of a call; write it as 'tool_calls'")
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise UserError(f"message {i} has tool_calls {calls!r:.80}; give a list of objects")
    if not isinstance(content, str) and not (content is None and calls):
        raise UserError(f"message {i} is {message!r:.80}; give an object with the strings 'role' and 'content'")
    if role in ("user", "assistant") and not calls and not (content or "").strip():
        raise UserError(f"message {i} ({role}) is empty; give it content or remove the line")
    kept = {key: value for key, value in message.items() if value is not None}
    if calls:
        kept["tool_calls"] = [_called(call, i) for call in calls]
    return {**kept, "content": content}


def _called(call: dict[str, Any], i: int) -> dict[str, Any]:
    """Return a tool call of message i. If its arguments are JSON text, as in OpenAI's API, they become the object.

    Most chat templates write the arguments as JSON, so that text would be written as a string in quotes.
    """
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise UserError(f"message {i} has a tool call {call!r:.80}; give 'function' as an object")
    if not isinstance(given := function.get("arguments"), str):
        return call
    try:
        arguments = texts.parse(given) if given.strip() else {}
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"message {i} has a tool call with arguments {given!r:.80}; give an object, or its JSON text")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def encode(
    tokenizer: Tokenizer, template: str, messages: list[Message], learn: str = "all", tools: Tools = None
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a validated conversation, and for each id whether it is learned.

    template: a key of TEMPLATES. learn: "all" responses or only the "last" one. In a prompt, which does not end with
    the assistant, none is learned. tools: descriptions of the tools that the assistant may call.
    Raises UserError if the roles are not an optional system message, then user and assistant in turn, or if there are
    tools. Only with template "tokenizer", the chat template itself checks the roles, and writes tools.
    """
    if template != "tokenizer":
        _check_roles(messages)
    if tools and (template != "tokenizer" or (tokenizer.chats and "tools" not in tokenizer.chats.reads)):
        raise UserError(f"template {template} does not write 'tools'; {TOOLS}")
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answered = messages[-1]["role"] == "assistant"
    learned = frozenset(spoken if learn == "all" else spoken[-1:]) if answered else frozenset()
    script = Script(tokenizer, tools)
    TEMPLATES[template](script, messages, learned)
    return script.ids, script.learn


def reply(
    tokenizer: Tokenizer, template: str, turn: list[int], messages: list[Message], tools: Tools = None
) -> list[int]:
    """Return the tokens between a sampled turn of the assistant and the assistant's next turn.

    `turn` has the tokens of the sampled turn, and `messages` answer it. The result starts with the tokens that are
    missing at the end of the turn, for example if a stop string has ended it. Raises UserError if the messages do not
    fit the template, or if the template does not end turns.
    """
    if template == "human":
        unusable = "data.template=human does not mark the end of the assistant's turns"
        raise UserError(f"{unusable}, so environments cannot answer them; choose another data.template")
    ends = _ends_of_own if template == "tokenizer" else _ends
    end, behind = ends(Script(tokenizer, tools), template, validate(messages))
    held = max(n for n in range(len(end) + 1) if turn[len(turn) - n :] == end[:n])
    if not held and turn[-1:] == end[-1:]:
        held = len(end)  # the turn ends with the last of these tokens and has skipped the others
    return end[held:] + behind


def _ends_of_own(script: Script, template: str, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Return the tokens that end a turn of the assistant, and those between it and its next turn."""
    end, behind = (
        script.tokenizer.encode(text, continues=True, control=True) for text in rendered.reply(script.render, messages)
    )
    stop = _stop(end, script.tokenizer) or len(end)
    return end[:stop], end[stop:] + behind


def _ends(script: Script, template: str, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Return the same for another template than the tokenizer's own."""
    talks = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}, *messages] for text in "?!"]
    _check_roles(talks[0])
    (said, behind), (other, _) = (_parted(script.tokenizer, template, talk) for talk in talks)
    differ = (n for n in range(min(len(said), len(other))) if said[-1 - n] != other[-1 - n])
    return said[len(said) - next(differ, len(said)) :], behind


def _parted(tokenizer: Tokenizer, template: str, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Return the tokens of the second message, and all tokens after it."""
    script = Script(tokenizer)
    TEMPLATES[template](script, messages, frozenset({1}))
    start, end = script.learn.index(True), len(script.learn) - script.learn[::-1].index(True)
    return script.ids[start:end], script.ids[end:]


def num_cue(tokenizer: Tokenizer, template: str) -> int:
    """Return the number of tokens of the cue at the end of every prompt. Truncation must keep the cue."""
    if template == "tokenizer":
        user = [{"role": "user", "content": "?"}]
        cue = tokenizer.render(user, cue=True).removeprefix(tokenizer.render(user, cue=False))
    else:
        cue = CUES[template]
    return len(tokenizer.encode(cue, continues=True, control=True))


def _check_roles(messages: list[Message]) -> None:
    """Raise UserError if the built-in templates cannot write these messages."""
    if any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        raise UserError(f"only a tokenizer's own chat template writes the messages of tools; {TOOLS}")
    first = 1 if messages[0]["role"] == "system" else 0
    if first == len(messages):
        raise UserError("the conversation has only a system message; add a user message")
    for i, message in enumerate(messages[first:]):
        due = ("user", "assistant")[i % 2]
        if message["role"] != due:
            got = f"message {first + i + 1} has role {message['role']!r}, expected {due!r}"
            raise UserError(f"{got}; user and assistant must alternate, after at most one system message")
