"""Runs environments of the user, which answer the turns of responses."""

from collections import deque
from collections.abc import Hashable, Set
from typing import Any, NamedTuple

from rlhf.config import Reward
from rlhf.rewards.child import Message
from rlhf.rewards.worker import Job, Pool, Worker

Turn = tuple[Hashable, dict[str, Any], list[str]]  # key of the dialogue, record, texts of the model's turns so far


class Reply(NamedTuple):
    """The answer of an environment to a turn."""

    messages: list[Message] | None  # None: the dialogue has ended
    value: float  # reward of the turn
    failed: bool  # the environment failed twice; the dialogue has ended


class Environments(Pool[Turn, Reply]):
    """An environment, with one instance per dialogue. The time limit holds for one call of a method.

    A dialogue stays in the process that it began in. If that process ends or a turn fails, a new instance gets all
    turns of the dialogue again.
    """

    kind = "environment"

    def __init__(self, spec: str, limits: Reward):
        super().__init__([spec], limits)
        self._homes: dict[Hashable, Worker] = {}

    def give(self, key: int, turn: Turn) -> None:
        """Add a turn. take() returns its reply under this key."""
        self._add(self.specs[0], key, turn)

    def take(self, block: bool | Set[int] = False) -> dict[int, Reply]:
        """Return the finished replies, see Pool._take()."""
        return self._take(block)

    def end(self, key: Hashable) -> None:
        """Mark a dialogue as ended, so that its environment can be dropped."""
        if worker := self._homes.pop(key, None):
            worker.ended.append(key)

    def _hand(self, worker: Worker, waiting: deque[Job], flush: bool) -> None:
        """Give an idle process the oldest turn of a dialogue that it already has, or that no process has."""
        if worker.calls:
            return
        self._homes = {key: home for key, home in self._homes.items() if not home.connection.closed}
        for job in waiting:
            key, record, texts = job.item
            if self._homes.get(key, worker) is worker:
                waiting.remove(job)
                begun = key in self._homes and not job.error  # child.py drops an instance that has failed
                self._homes[key] = worker
                calls = 1 if begun else len(texts) + 1
                worker.give([job], [(key, record, texts, worker.ended)], calls * self.limits.timeout)
                worker.ended = []
                return

    def _result(self, value: Any, failed: bool) -> Reply:
        messages, reward = (None, 0.0) if failed else value
        return Reply(messages, reward, failed)
