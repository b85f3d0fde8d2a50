"""Judges of tests: a function over a list of samples, and none at all."""

from __future__ import annotations

from collections.abc import Callable

from rlhf.contracts import Sample


class Judging:
    """Calls a function with all samples that were given, when they are to be judged at last."""

    def __init__(self, call: Callable[[list[Sample]], object]):
        self.call, self.given = call, list[Sample]()

    def give(self, sample: Sample) -> None:
        self.given.append(sample)

    def collect(self, block: bool = False) -> None:
        if block:
            given, self.given = sorted(self.given, key=lambda s: s.group), []
            self.call(given)


FREE = Judging(lambda samples: None)  # everything is worth 0
