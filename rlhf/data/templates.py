"""Conversations to token ids, with a mark on every token that the policy learns to say: the assistant's words and their eos.

A conversation that ends with the user is a prompt: nothing of it is learned, and it gets the cue that the assistant speaks next.
Everything between two learned responses is tokenized in one piece, as an engine that is given the text would do it; a learned
response always starts a new piece, so that training sees the tokens of a prompt just as generation does.
"""

from collections.abc import Callable
from typing import Any

from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

Message = dict[str, Any]  # role and content are strings; other keys are for the tokenizer's own template
Places = frozenset[int]  # of the messages that are learned


class Script:
    """Token ids of a conversation as it is written down, and which of them are learned."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.learn: list[bool] = []
        self.fresh = True  # at the start of a text: nothing, or only a bos, stands before it

    def begin(self) -> None:
        if self.tokenizer.bos is not None:
            self._append([self.tokenizer.bos], False)
        self.fresh = True

    def write(self, text: str, learn: bool = False, control: bool = False) -> None:
        """control: special tokens spelled in the text are meant as such."""
        ids = self.tokenizer.encode(text, continues=not self.fresh, control=control)
        if self.fresh and self.ids and ids[:1] == [self.tokenizer.bos]:
            ids = ids[1:]  # the text spells the bos that begin() has written
        self._append(ids, learn)
        self.fresh = False

    def end(self, learn: bool) -> None:
        """End the assistant's turn with eos, unless the turn spells it."""
        if self.ids[-1:] != [self.tokenizer.eos]:
            self._append([self.tokenizer.eos], learn)

    def _append(self, ids: list[int], learn: bool) -> None:
        self.ids += ids
        self.learn += [learn] * len(ids)


def _plain(script: Script, messages: list[Message], learned: Places) -> None:
    """The texts alone. They are written exactly as the model should read them, special tokens included."""
    script.begin()
    for i, message in enumerate(messages):
        script.write(message["content"], learn=i in learned, control=True)
        if message["role"] == "assistant":
            script.end(i in learned)


def _human(script: Script, messages: list[Message], learned: Places) -> None:
    """The dialogues of Anthropic's HH-RLHF data (2204.05862); a system text stands before the first of them.

    Tokens are those of the dialogue as one text, as the files of that data have it under template plain: an eos ends the dialogue alone.
    """
    script.begin()
    text = ""
    for i, message in enumerate(messages):
        if message["content"].startswith("\n\nHuman:"):
            raise UserError("the text has '\\n\\nHuman:' in it already and data.template=human would add another; set data.template=plain")
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
    """Llama 2 chat (2307.09288): every exchange is a text of its own from bos to eos; the system text is in the first."""
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
    """<|im_start|>role, newline, content, <|im_end|>, newline. Where <|im_end|> is not the eos, the eos follows it."""
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
    """The tokenizer's own chat template. Each learned response is what its rendering adds to the prompt before it.

    What follows the stop token of a response is not learned. A last response without one gets the eos.
    Raises UserError where the template renders a turn otherwise once more turns follow, so that no prefix can be told apart.
    """
    tokenizer = script.tokenizer
    stops = set(tokenizer.stop_ids)
    done = ""  # the text written so far
    for i in sorted(learned):
        prompt, answered = tokenizer.render(messages[:i], cue=True), tokenizer.render(messages[: i + 1], cue=False)
        if not prompt.startswith(done) or not answered.startswith(prompt):
            raise UserError(f"message {i + 1}: {UNSTABLE}")
        script.write(prompt[len(done) :], control=True)
        start = len(script.ids)
        script.write(answered[len(prompt) :], learn=True, control=True)
        ends = [t for t in range(start, len(script.ids)) if script.ids[t] in stops]
        if ends:
            script.learn[ends[-1] + 1 :] = [False] * (len(script.ids) - ends[-1] - 1)
        elif i == len(messages) - 1:
            script.end(True)
        done = answered
    if messages[-1]["role"] != "assistant":
        prompt = tokenizer.render(messages, cue=True)
        if not prompt.startswith(done):
            raise UserError(f"message {len(messages)}: {UNSTABLE}")
        script.write(prompt[len(done) :], control=True)


TEMPLATES: dict[str, Callable[[Script, list[Message], Places], None]] = {
    "plain": _plain,
    "human": _human,
    "llama2": _llama2,
    "chatml": _chatml,
    "tokenizer": _own,
}

UNSTABLE = "the tokenizer's chat template rewrites the turns before it, so what was learned there is lost; choose another data.template"

CUES = {"plain": "", "human": "\n\nAssistant:", "llama2": " [/INST]", "chatml": "<|im_start|>assistant\n"}


def validate(messages: object) -> list[Message]:
    """The messages of a conversation, if they are such. Raises UserError naming the message."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages are {messages!r:.80}; give a list of objects with 'role' and 'content'")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(f"message {i} is {message!r:.80}; give an object with the strings 'role' and 'content'")
        if not message["content"].strip():
            raise UserError(f"message {i} ({message['role']}) is empty; give it a content or remove the line")
    return messages


def encode(tokenizer: Tokenizer, template: str, messages: list[Message], learn: str = "all") -> tuple[list[int], list[bool]]:
    """Token ids of a validated conversation, and for each whether it is learned.

    learn: "all" responses of a conversation that ends with the assistant, or the "last" alone; of a prompt, none.
    Raises UserError where the roles are not an optional system, then user and assistant in turns (template "tokenizer": where
    the chat template itself refuses them).
    """
    if template != "tokenizer":
        _check_roles(messages)
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answered = messages[-1]["role"] == "assistant"
    learned = frozenset(spoken if learn == "all" else spoken[-1:]) if answered else frozenset()
    script = Script(tokenizer)
    TEMPLATES[template](script, messages, learned)
    return script.ids, script.learn


def reply(tokenizer: Tokenizer, template: str, turn: list[int], messages: list[Message]) -> list[int]:
    """The tokens between a sampled turn of the assistant, of these tokens, and its next one, where messages answer it.

    First whatever the turn lacks of the tokens that end it, as where a stop string has ended it. Raises UserError where the messages do not
    fit the template, or where its turns have no end.
    """
    if template == "human":
        raise UserError("data.template=human does not end the assistant's turns, so nothing can answer them; choose another")
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
    talk = [*before, *validate(messages)]
    if template != "tokenizer":
        _check_roles(talk)
    said, behind = _parted(tokenizer, template, talk)
    other, _ = _parted(tokenizer, template, [before[0], {"role": "assistant", "content": "!"}, *messages])
    differ = (n for n in range(min(len(said), len(other))) if said[-1 - n] != other[-1 - n])
    end = said[len(said) - next(differ, len(said)) :]  # what is the same whatever is said
    held = max(n for n in range(len(end) + 1) if turn[len(turn) - n :] == end[:n])
    if not held and turn[-1:] == end[-1:]:
        held = len(end)  # it has skipped the rest
    return end[held:] + behind


def _parted(tokenizer: Tokenizer, template: str, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Tokens of the second message, which is learned, and those behind it."""
    script = Script(tokenizer)
    TEMPLATES[template](script, messages, frozenset({1}))
    start, end = script.learn.index(True), len(script.learn) - script.learn[::-1].index(True)
    return script.ids[start:end], script.ids[end:]


def num_cue(tokenizer: Tokenizer, template: str) -> int:
    """Tokens at the end of every prompt that say the assistant speaks next: cutting a prompt from the left must spare them."""
    if template == "tokenizer":
        user = [{"role": "user", "content": "?"}]
        cue = tokenizer.render(user, cue=True).removeprefix(tokenizer.render(user, cue=False))
    else:
        cue = CUES[template]
    return len(tokenizer.encode(cue, continues=True, control=True))


def _check_roles(messages: list[Message]) -> None:
    first = 1 if messages[0]["role"] == "system" else 0
    if first == len(messages):
        raise UserError("the conversation is a system message alone; add a user message")
    for i, message in enumerate(messages[first:]):
        due = ("user", "assistant")[i % 2]
        if message["role"] != due:
            got = f"message {first + i + 1} has role {message['role']!r}, expected {due!r}"
            raise UserError(f"{got}; user and assistant take turns, after at most one system")
