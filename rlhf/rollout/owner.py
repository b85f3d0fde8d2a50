"""The owner of the engine, which wakes it, publishes weights to it, generates with it and puts it to sleep.

No other file calls the methods of an engine.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from rlhf import progress
from rlhf.contracts import Completion, Engine, Request
from rlhf.model import operations
from rlhf.phases import Kind, Phase
from rlhf.residence import Residence
from rlhf.weights.publish import Publisher

AWAKE = frozenset({Kind.WEIGHTS, Kind.CACHE})


class EngineOwner:
    """Generates with the weights that were offered last.

    An engine loses its weights when it sleeps. The owner publishes them again before the engine generates.
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
        """With a publisher, the engine sleeps until weights are offered. verify: compare checksums after every publish.

        Without a publisher, the engine has loaded its weights itself, or fill(parameters) writes them.
        """
        self.engine, self._residence, self._publisher, self._verify = engine, residence, publisher, verify
        self._weights: Mapping[str, Tensor] = {}
        self._resident, self._fresh = AWAKE, publisher is None
        self._waiting = 0  # unfinished requests of the current stream
        self.version = 0  # version of the current weights: the number of steps they were trained
        residence.add_engine(self)
        if publisher:
            self.leave(())
        if fill:
            fill(engine.parameters())

    def sound(self) -> bool:
        """Return whether the weights of the engine are finite and not too large to compute with."""
        return operations.sound(self.engine.parameters().values())

    def offer(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Generate with these weights from now on: the learner's own shards by the names of megatron-core."""
        self._weights, self.version = weights, version
        self._publish()

    def stream(self, requests: list[Request]) -> Generator[list[tuple[int, Completion]], None, None]:
        """Yield the requests that each step of the engine completes, as (key, completion), until all are complete.

        This includes requests that are submitted meanwhile. A caller that stops earlier must call withdraw().
        """
        if not self._fresh:
            self._publish()
        self._waiting = 0
        self.submit(requests)
        with uncollected():
            while self._waiting:
                found = self.engine.advance()
                progress.move()
                self._waiting -= len(found)
                yield found

    def submit(self, requests: list[Request]) -> None:
        """Add requests to the current stream."""
        self.engine.submit(requests)
        self._waiting += len(requests)

    @property
    def idle(self) -> bool:
        """Return whether the engine has completed all requests."""
        return not self._waiting

    def withdraw(self) -> list[tuple[int, Completion]]:
        """Remove all unfinished requests from the engine. Return their tokens so far, as (key, completion)."""
        return self.engine.withdraw()

    def volume(self) -> tuple[int, int]:
        """Return the bytes of a publish that stay on this rank, and the bytes that it receives from other ranks."""
        assert self._publisher, "this engine has loaded its weights itself and has no publisher"
        return self._publisher.volume()

    def leave(self, keep: Collection[Kind]) -> None:
        """Put the engine to sleep if it has a kind on the device that is not in `keep`. It can only sleep as a whole.

        Only the residence calls this method and come().
        """
        if self._resident - set(keep):
            self.engine.sleep()
            self._resident, self._fresh = frozenset(), False

    def come(self, needed: Collection[Kind]) -> None:
        """Allocate these kinds on the device."""
        missing = set(needed) - self._resident
        if Kind.WEIGHTS in missing:
            self.engine.wake_weights()
        if Kind.CACHE in missing:
            self.engine.wake()
        self._resident |= missing

    def _publish(self) -> None:
        assert self._publisher, "an engine without a publisher cannot get its weights back after it has slept"
        self._residence.enter(Phase.PUBLISH)
        held = self.engine.parameters()
        self._publisher.publish(self._weights, held)
        if self._verify:
            self._publisher.verify(self._weights, held)
        self._residence.enter(Phase.ROLLOUT)  # moves the policy's weights off the device before the cache is allocated
        self._fresh = True


@contextmanager
def uncollected() -> Iterator[None]:
    """Disable Python's garbage collector. It took 15 % of a rollout's time, as vLLM's scheduler makes many objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
