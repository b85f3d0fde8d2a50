"""The engine's one owner: it wakes it, gives it weights, lets it generate and puts it to sleep. No other file calls an engine's methods."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from rlhf.contracts import Completion, Engine, Request
from rlhf.model import operations
from rlhf.phases import Kind, Phase
from rlhf.residence import Residence
from rlhf.weights.publish import Publisher

AWAKE = frozenset({Kind.WEIGHTS, Kind.CACHE})


class EngineOwner:
    """Generates with the weights that were offered last, whatever the device was used for since.

    An engine loses its weights when it sleeps, so it gets them again before it generates.
    """

    def __init__(
        self,
        engine: Engine,
        residence: Residence,
        *,
        publisher: Publisher | None = None,
        verify: bool = False,
        fill: Callable[[dict[str, Tensor]], None] | None = None,
    ):
        """An engine with a publisher sleeps until weights are offered. One without has loaded its own, or fill(parameters) writes them.

        verify: compare checksums after every publish.
        """
        self.engine, self._residence, self._publisher, self._verify = engine, residence, publisher, verify
        self._weights: Mapping[str, Tensor] = {}
        self._resident, self._fresh = AWAKE, publisher is None
        self._waiting = 0  # requests of a stream that are not complete
        self.version = 0  # steps after which the weights that it generates with were offered
        residence.add_engine(self)
        if publisher:
            self.leave(())
        if fill:
            fill(engine.parameters())

    def sound(self) -> bool:
        """Whether the weights that the engine has loaded can be computed with."""
        return operations.sound(self.engine.parameters().values())

    def offer(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Generate with these weights from now on: the learner's live shards, by megatron-core's names."""
        self._weights, self.version = weights, version
        self._publish()

    def stream(self, requests: list[Request]) -> Generator[list[tuple[int, Completion]], None, None]:
        """After every step of the engine what it has completed, by the requests' keys, until all are complete, also those that were
        submitted meanwhile. Whoever stops earlier withdraws the rest.
        """
        if not self._fresh:
            self._publish()
        self._waiting = 0
        self.submit(requests)
        with uncollected():
            while self._waiting:
                found = self.engine.advance()
                self._waiting -= len(found)
                yield found

    def submit(self, requests: list[Request]) -> None:
        """More requests for the stream at hand."""
        self.engine.submit(requests)
        self._waiting += len(requests)

    @property
    def idle(self) -> bool:
        """Whether the engine has completed all requests."""
        return not self._waiting

    def withdraw(self) -> list[tuple[int, Completion]]:
        """Whatever is not complete, by the requests' keys, as far as it is. The engine holds nothing afterwards."""
        return self.engine.withdraw()

    def volume(self) -> tuple[int, int]:
        """Bytes of a publish that this rank keeps, and that it receives from others."""
        assert self._publisher, "an engine that loaded its own weights is never published to"
        return self._publisher.volume()

    def leave(self, keep: Collection[Kind]) -> None:
        """Give back the memory of all kinds but these. It goes as a whole. For the residence, as is come()."""
        if self._resident - set(keep):
            self.engine.sleep()
            self._resident, self._fresh = frozenset(), False

    def come(self, needed: Collection[Kind]) -> None:
        """Have these kinds on the device."""
        missing = set(needed) - self._resident
        if Kind.WEIGHTS in missing:
            self.engine.wake_weights()
        if Kind.CACHE in missing:
            self.engine.wake()
        self._resident |= missing

    def _publish(self) -> None:
        assert self._publisher, "an engine that loaded its own weights cannot get them back after it slept"
        self._residence.enter(Phase.PUBLISH)
        held = self.engine.parameters()
        self._publisher.publish(self._weights, held)
        if self._verify:
            self._publisher.verify(self._weights, held)
        self._residence.enter(Phase.ROLLOUT)  # the policy's weights leave before the cache comes
        self._fresh = True


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's garbage collector away: vLLM's scheduler makes so many short-lived objects that it took 15 % of a rollout's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
