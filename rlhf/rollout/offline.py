"""Where a run's samples come from, and the source that needs no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rlhf.config import Config
from rlhf.contracts import Sample, Sums
from rlhf.data.records import Records

Weights = Mapping[str, Tensor]


class Source(Protocol):
    """Samples for the steps of a run."""

    def take(self, step: int) -> tuple[list[Sample], Sums]:
        """The samples of a step, counted from 0, identical on every rank, with metrics."""
        ...

    def offer(self, weights: Weights, version: int, check: bool = False) -> None:
        """The policy's weights after `version` steps. With check, prove that samples will be drawn with them."""
        ...

    def describe(self, samples: list[Sample]) -> Sums:
        """Metrics of samples whose streams and rewards are complete."""
        ...

    def remarks(self) -> list[str]:
        """What a person should know of it when a run starts."""
        ...

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must keep for the next step to be the same, identical on every rank; None: nothing. Every rank calls it."""
        ...

    def resume(self, step: int, state: dict[str, Any] | None) -> None:
        """Go on after so many steps, from what state() gave."""
        ...


@dataclass(slots=True)
class DataSource:
    """The records themselves are the samples."""

    config: Config
    records: Records

    def take(self, step: int) -> tuple[list[Sample], Sums]:
        return self.records.draw(step, self.config.batch.prompts, self.config.seed), {}

    def offer(self, weights: Weights, version: int, check: bool = False) -> None:
        pass

    def describe(self, samples: list[Sample]) -> Sums:
        return {}

    def remarks(self) -> list[str]:
        return []

    def state(self) -> dict[str, Any] | None:
        return None

    def resume(self, step: int, state: dict[str, Any] | None) -> None:
        pass
