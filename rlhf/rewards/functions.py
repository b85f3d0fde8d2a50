"""Computes rewards of responses with reward functions: those of the package, and those of the user."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from rlhf.config import JUDGE, Judge, Reward
from rlhf.judge.client import longest
from rlhf.rewards.rules import REWARDS
from rlhf.rewards.worker import Job, Pool, Worker, called

Item = tuple[str, str, dict[str, Any]]  # prompt, response, record
Value = float | dict[str, float] | None  # the result of one function: a number, or its named parts; None: it has failed


class Score(NamedTuple):
    """The reward of one response."""

    value: float  # weighted sum of the parts; 0 if a function has failed
    failed: bool  # a function failed twice: it raised, timed out, ended its process or returned no finite number
    parts: Mapping[str, float]  # by name, without their weights


class Rewards(Pool[Item, Value]):
    """The sum of one or several reward functions. The time limit holds for each call of a function.

    A part of the reward has the name of its function. If a function returns a dict, each key is a part; with several
    functions its name is FUNCTION/KEY. A weight NAME of limits.weights holds for the part of this name, and for all
    parts NAME/... that have no weight of their own. All other weights are 1. The function JUDGE has one process, and
    the limits of `judge` in place of those of `limits`.
    """

    kind = "function"

    def __init__(self, specs: Sequence[str], limits: Reward, judge: Judge | None = None):
        super().__init__(specs, limits)
        if judge and JUDGE in self.specs:
            self._judges[JUDGE] = judge
            waits = replace(limits, concurrency=judge.concurrency, timeout=longest(judge))
            self._limits[JUDGE] = replace(waits, workers=1, memory=0.0)  # these two are for the code of the user
        self.names: set[str] = set()  # of the parts so far
        self._values: dict[int, dict[str, Value]] = {}  # unfinished responses: key -> function -> result

    def give(self, key: int, item: Item) -> None:
        """Add a response. take() returns its score under this key."""
        self._values[key] = {}
        for spec in self.specs:
            self._add(spec, (key, spec), item)

    def take(self, block: bool = False) -> dict[int, Score]:
        """Return the scores that are finished. With block, wait for all. Raises UserError, as Pool._take() does."""
        for (key, spec), value in self._take(block).items():
            self._values[key][spec] = value
        done = [key for key, values in self._values.items() if len(values) == len(self.specs)]
        return {key: self._score(self._values.pop(key)) for key in done}

    def score(self, items: list[Item]) -> list[Score]:
        """Return one score per response, in order."""
        for key, item in enumerate(items):
            self.give(key, item)
        scores = self.take(block=True)
        return [scores[key] for key in range(len(items))]

    def forget(self) -> None:
        super().forget()
        self._values.clear()

    def _score(self, values: Mapping[str, Value]) -> Score:
        parts: dict[str, float] = {}
        for spec in self.specs:
            name, value = called(spec), values[spec]
            if value is None:
                return Score(0.0, failed=True, parts={})
            if isinstance(value, dict):
                before = f"{name}/" if len(self.specs) > 1 else ""
                parts |= {f"{before}{key}": part for key, part in value.items()}
            else:
                parts[name] = value
        self.names |= parts.keys()
        value = sum(self.limits.weights.get(self._weighed_as(name), 1.0) * part for name, part in parts.items())
        return Score(value, failed=False, parts=parts)

    @property
    def unused(self) -> list[str]:
        """The names of the weights that fit none of the parts so far."""
        return sorted(self.limits.weights.keys() - set(map(self._weighed_as, self.names)))

    def _weighed_as(self, name: str) -> str:
        """Return the name of the weight of a part, which may not be set."""
        return name if name in self.limits.weights else name.partition("/")[0]

    def _at_once(self) -> dict[Any, Value]:
        found: dict[Any, Value] = {}
        for spec, waiting in self._waiting.items():
            if spec in REWARDS:
                found |= {job.key: REWARDS[spec](*job.item) for job in waiting}
                waiting.clear()
        return found

    def _hand(self, worker: Worker, waiting: deque[Job], flush: bool) -> None:
        """Give a process as many calls as it can work on.

        A call of many responses gets the next `concurrency` ones, and the last call the rest. So its responses do not
        depend on time.
        """
        size = worker.limits.concurrency if worker.form.many else 1
        room = worker.limits.concurrency if worker.form.waits else size
        while len(held := worker.jobs) + size <= room and not any(job.alone for job in held):
            # Only a process that may work on several items can have failed with several.
            alone = next((job for job in waiting if job.alone), None) if room > 1 and not held else None
            jobs = [alone] if alone else list(islice((job for job in waiting if not job.alone), size))
            if not jobs or (len(jobs) < size and not flush and not alone):
                return
            for job in jobs:
                waiting.remove(job)
            worker.give(jobs, [job.item for job in jobs], worker.limits.timeout)

    def _result(self, value: Any, failed: bool) -> Value:
        return None if failed else value
