"""Measures the duration of calls on busy machines."""

import time
from collections.abc import Callable


def shortest(call: Callable[[], object], times: int = 3) -> float:
    """Return the CPU seconds of the shortest of several calls.

    A pause of the machine or of the garbage collector does not affect all of them.
    """
    seconds = []
    for _ in range(times):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)
