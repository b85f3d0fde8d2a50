"""Responses of several turns: an environment answers what the model says, at a step of the engine that does not depend on time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf.config import Config
from rlhf.contracts import Sample
from rlhf.data import templates
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.rewards import Environments, Reply
from rlhf.rollout.flight import Group, Response

DELAY = 8  # steps of the engine between the end of a turn and its answer: for so long nobody waits for an environment
Place = tuple[Group, int]  # a response of a group


class Dialogues:
    """Gives an environment the turns of one engine's responses, and adds its answers to them.

    All ranks of the engine make the same calls, and each asks its environments about a portion of the responses. Which answers are due
    depends on the engine's steps alone, so every rank knows, and where one of them is late, all wait.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, environments: Environments, gather: Callable[[Any], list[Any]]):
        """gather: everybody's value, by rank of the engine."""
        self.config, self.tokenizer, self.environments, self.gather = config, tokenizer, environments, gather
        self._asked: dict[int, tuple[int, Place]] = {}  # by number: the step at which the answer is due, and the response that awaits it
        self._mine: set[int] = set()  # of these numbers, those that this rank has asked about
        self._replies: dict[int, Reply] = {}  # to those, as far as they are here
        self._count = self._step = 0

    def open(self, groups: list[Group], mine: Callable[[Group, int], bool]) -> str:
        """Give the groups the prompts that their environments begin with. What is wrong with one of them; empty: nothing."""
        for group in groups:
            self._ask((group, 0), mine(group, 0))
        for (group, _), reply in self._answers(list(self._asked)):
            if reply.messages:
                try:
                    group.prompt = self._prompt(group.prompt, reply.messages)
                except UserError as error:
                    return f"rollout.environment: reset() of line {group.prompt.text.row + 1}: {error}"
        return ""

    def ask(self, group: Group, k: int, mine: bool) -> None:
        """Have a turn that has ended answered."""
        group.responses[k].finish = ""
        self._ask((group, k), mine)

    @property
    def pending(self) -> bool:
        """Whether an answer is still to come."""
        return bool(self._asked)

    def advance(self, idle: bool) -> list[Place]:
        """The responses whose answers are due after one more step of the engine; where it is idle, the next ones. They are answered."""
        self._replies |= self.environments.take()
        self._step += 1
        if idle and self._asked:
            self._step = max(self._step, min(due for due, _ in self._asked.values()))
        return self._answer([n for n, (due, _) in self._asked.items() if due <= self._step])

    def end(self, group: Group, k: int) -> None:
        """A response is complete without another answer."""
        self.environments.end((*group.key, k))

    def finish(self) -> list[Place]:
        """All that are still to be answered: they are now."""
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
        """What environments say to these responses, on every rank of the engine."""
        if not due:
            return []
        mine = self._mine.intersection(due)
        self._mine -= mine
        self._replies |= self.environments.take(mine - self._replies.keys())
        known = {n: reply for part in self.gather({n: self._replies.pop(n) for n in mine}) for n, reply in part.items()}
        return [(self._asked.pop(n)[1], known[n]) for n in due]

    def _add(self, prompt: Sample, response: Response, reply: Reply) -> None:
        """Have the response go on behind a reply, or end with it."""
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
                tokens = templates.reply(self.tokenizer, self.config.data.template, response.turn, reply.messages)
            except UserError as error:
                self.environments.failure = self.environments.failure or f"step() returned what no template can write: {error}"
                response.fail()
            else:
                self._append(prompt, response, tokens, reply)

    def _append(self, prompt: Sample, response: Response, tokens: list[int], reply: Reply) -> None:
        """Tokens behind a turn, where there is room for another one behind them."""
        length = len(response.tokens) + len(tokens)
        if length < self.config.rollout.max_tokens and len(prompt.tokens) + length < self.config.data.max_tokens:
            response.observe(tokens)
            response.turns += reply.messages or ()
        else:
            response.finish = "length"

    def _prompt(self, prompt: Sample, messages: list[templates.Message]) -> Sample:
        """The prompt in other words."""
        ids, learned = templates.encode(self.tokenizer, self.config.data.template, templates.validate(messages))
        limit = self.config.data.max_tokens - self.config.rollout.max_tokens
        if any(learned):
            raise UserError("the messages end with the assistant, who is to answer them; end them with the user")
        if len(ids) > limit:
            raise UserError(f"a prompt of {len(ids)} tokens is longer than data.max_tokens - rollout.max_tokens={limit}; shorten it")
        text = self.tokenizer.decode(ids[1:] if ids[0] == self.tokenizer.bos else ids, skip_special=False)
        tokens = np.array(ids, np.int32)
        return replace(prompt, tokens=tokens, mask=np.zeros(len(tokens) - 1, bool), text=replace(prompt.text, prompt=text))
