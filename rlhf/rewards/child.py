"""The program of a worker process: import one reward function, then answer (prompt, response, record) with (value, error) until the
other end of the connection is gone. Imports little, so that it starts in a blink; worker.py starts it.
"""

import fcntl
import importlib
import importlib.util
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

LONGEST_ERROR = 4000  # characters: the end of a traceback says most

Function = Callable[[str, str, dict], float]


class Attempt:
    """Around code of the user: whatever it raises is kept as text for the other process to report, and goes no further."""

    def __init__(self) -> None:
        self.error = ""  # the traceback; empty: all went well

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = "".join(traceback.format_exception(error))[-LONGEST_ERROR:] if error else ""
        return True


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a scheduler signals every process of a job; the rank finishes its step, and needs rewards
    connection = Connection(int(sys.argv[1]))
    die_with_parent(lifeline=int(sys.argv[2]))
    sys.path[:], place, name, memory = connection.recv()
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    sys.path.append(os.getcwd())  # last, so that no file there stands in for a module that something else imports
    from rlhf import output

    output.secure()
    with Attempt() as attempt:
        function = load(place, name)
    connection.send((0.0, attempt.error))
    while not attempt.error:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(call(function, *item))


def die_with_parent(lifeline: int) -> None:
    """Have the kernel kill this process and its children when the parent, however it ends, lets go of the pipe: a thread that watches
    would never run while the function hangs inside C code that holds the interpreter's lock, as a regular expression does.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)


def load(place: str, name: str) -> Function:
    """The function called name in a module or in a .py file."""
    module = load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is {function!r:.80}, not a function")
    return function


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("user_reward", path)  # not after the file, which may be called like another module
    assert spec is not None, f"no way to load {path}"
    assert spec.loader is not None, f"no way to load {path}"
    sys.path.append(str(path.resolve().parent))  # the file may import its neighbours
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call(function: Function, prompt: str, response: str, record: dict) -> tuple[float, str]:
    """(value, ""), or (0.0, what went wrong)."""
    with Attempt() as attempt:
        value = function(prompt, response, record)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"the reward must be a finite number, but is {value!r:.80}")
        return float(value), ""
    return 0.0, attempt.error


if __name__ == "__main__":
    main()
