"""Measures how long calls take on machines that are busy with other work."""

import time
from collections.abc import Callable


def shortest(call: Callable[[], object], times: int = 3) -> float:
    """The CPU seconds of the shortest of several calls: a pause of the machine or of the garbage collector does not hit all of them."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)
