"""Responses of several turns: an environment answers each turn of the model.

The engine step at which an answer is used does not depend on time, so runs are reproducible.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf.config import Config
from rlhf.contracts import Sample
from rlhf.data import templates
from rlhf.data.chat import Message, Tools
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.rewards import Environments, Reply
from rlhf.rollout.flight import Group, Response

DELAY = 8  # engine steps between the end of a turn and the use of its answer; the environment works meanwhile
Place = tuple[Group, int]  # a response of a group


class Dialogues:
    """Gives the turns of one engine's responses to their environments, and adds the answers to the responses.

    All ranks of the engine make the same calls. Each rank runs the environments of its portion of the responses. Which
    answers are due depends only on the engine's steps, so all ranks agree. If a due answer is late, all ranks wait for
    it.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, environments: Environments, gather: Callable[[Any], list[Any]]
    ):
        """gather: an all-gather of a Python object over the ranks of the engine."""
        self.config, self.tokenizer, self.environments, self.gather = config, tokenizer, environments, gather
        self._asked: dict[int, tuple[int, Place]] = {}  # question number -> (step at which the answer is due, response)
        self._mine: set[int] = set()  # numbers of the open questions whose environments run on this rank
        self._replies: dict[int, Reply] = {}  # question number -> answer, for this rank's answers that are not due yet
        self._count = self._step = 0

    def open(self, groups: list[Group], mine: Callable[[Group, int], bool]) -> str:
        """Replace the prompts of the groups by those that their environments give.

        mine(group, k): whether this rank runs the environment of a response. Return an error message, or "".
        """
        for group in groups:
            self._ask((group, 0), mine(group, 0))
        for (group, _), reply in self._answers(list(self._asked)):
            if reply.messages:
                try:
                    group.prompt = self._prompt(group.prompt, reply.messages)
                except UserError as error:
                    place = f"line {group.prompt.text.row + 1} of data set {group.prompt.text.set}"
                    return f"rollout.environment: reset() of {place}: {error}"
        return ""

    def ask(self, group: Group, k: int, mine: bool) -> None:
        """Give a finished turn to its environment."""
        group.responses[k].finish = ""
        self._ask((group, k), mine)

    @property
    def pending(self) -> bool:
        """Return whether an answer is still missing."""
        return bool(self._asked)

    def advance(self, idle: bool) -> list[Place]:
        """Count one more step of the engine. Add the answers that are now due, and return their responses.

        If the engine is idle, the answers with the earliest step are due at once.
        """
        self._replies |= self.environments.take()
        self._step += 1
        if idle and self._asked:
            self._step = max(self._step, min(due for due, _ in self._asked.values()))
        return self._answer([n for n, (due, _) in self._asked.items() if due <= self._step])

    def end(self, group: Group, k: int) -> None:
        """End the environment of a response that needs no more answers."""
        self.environments.end((*group.key, k))

    def finish(self) -> list[Place]:
        """Add all missing answers, and return their responses."""
        return self._answer(list(self._asked))

    def _ask(self, place: Place, mine: bool) -> None:
        group, k = place
        self._count += 1
        self._asked[self._count] = self._step + DELAY, place
        if mine:
            texts = [turn["content"] for turn in group.responses[k].turns if turn["role"] == "assistant"]
            self.environments.give(self._count, ((*group.key, k), dict(group.prompt.text.record), texts))
            self._mine.add(self._count)

    def _answer(self, due: Collection[int]) -> list[Place]:
        answers = self._answers(due)
        for (group, k), reply in answers:
            self._add(group.prompt, group.responses[k], reply)
            if group.responses[k].finish:
                self.end(group, k)
        return [place for place, _ in answers]

    def _answers(self, due: Collection[int]) -> list[tuple[Place, Reply]]:
        """Return the responses with these numbers and their answers, on every rank of the engine. Wait for them."""
        if not due:
            return []
        mine = self._mine.intersection(due)
        self._mine -= mine
        self._replies |= self.environments.take(mine - self._replies.keys())
        known = {n: reply for part in self.gather({n: self._replies.pop(n) for n in mine}) for n, reply in part.items()}
        return [(self._asked.pop(n)[1], known[n]) for n in due]

    def _add(self, prompt: Sample, response: Response, reply: Reply) -> None:
        """Add an answer to a response, which then continues or is complete."""
        said = sum(turn["role"] == "assistant" for turn in response.turns)
        response.earned += reply.value
        if reply.failed:
            response.fail()
        elif reply.messages is None:
            response.finish = "stop"
        elif said == self.config.rollout.turns:
            response.finish = "length"
        else:
            try:
                template = prompt.text.template
                tools = _tools(prompt, template)
                tokens = templates.reply(self.tokenizer, template, response.turn, reply.messages, tools)
            except UserError as error:
                reason = f"step() returned messages that the template cannot write: {error}"
                self.environments.failure = self.environments.failure or reason
                response.fail()
            else:
                self._append(prompt, response, tokens, reply)

    def _append(self, prompt: Sample, response: Response, tokens: list[int], reply: Reply) -> None:
        """Append the tokens of an answer. If no room is left for another turn, end the response instead."""
        length = len(response.tokens) + len(tokens)
        if length < self.config.rollout.max_tokens and len(prompt.tokens) + length < self.config.data.max_tokens:
            response.observe(tokens)
            response.turns += reply.messages or ()
        else:
            response.finish = "length"

    def _prompt(self, prompt: Sample, messages: list[Message]) -> Sample:
        """Return the prompt with these messages in place of its text. Raises UserError if they are no valid prompt."""
        messages = templates.validate(messages)
        template = templates.choose(self.tokenizer, self.config.data.template, messages, is_text=False)
        ids, learned = templates.encode(self.tokenizer, template, messages, tools=_tools(prompt, template))
        limit = self.config.data.max_tokens - self.config.rollout.max_tokens
        if any(learned):
            raise UserError("the messages end with a turn of the assistant; end them with a turn of the user")
        if len(ids) > limit:
            raise UserError(
                f"a prompt of {len(ids)} tokens is longer than data.max_tokens - rollout.max_tokens={limit}; shorten it"
            )
        written = self.tokenizer.decode(ids[1:] if ids[0] == self.tokenizer.bos else ids, skip_special=False)
        tokens, text = np.array(ids, np.int32), replace(prompt.text, prompt=written, template=template)
        return replace(prompt, tokens=tokens, mask=np.zeros(len(tokens) - 1, bool), text=text)


def _tools(prompt: Sample, template: str) -> Tools:
    """Return the tools of a prompt's line. Only the tokenizer's own template writes them."""
    return templates.read_tools(prompt.text.record.get("tools")) if template == "tokenizer" else None
