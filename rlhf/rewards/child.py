"""The program of a worker process, which worker.py starts.

It imports a reward function or an environment, then answers each item with (value, error) until the connection closes.
It imports few modules, so that it starts quickly.
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
from collections.abc import Callable, Collection, Hashable
from contextlib import suppress
from copy import deepcopy
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

LONGEST_ERROR = 4000  # characters that are kept of a traceback, from its end

Function = Callable[[str, str, dict], float]
Message = dict[str, str]  # role and content


class Attempt:
    """Runs code of the user, catches any exception and keeps its traceback as text for the parent process."""

    def __init__(self) -> None:
        self.error = ""  # the traceback; "" if there was no exception

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = "".join(traceback.format_exception(error))[-LONGEST_ERROR:] if error else ""
        return True


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # A scheduler signals all processes of a job, but the rank needs rewards to finish its step.
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    die_with_parent(lifeline=int(sys.argv[2]))
    sys.path[:], place, name, kind, memory = connection.recv()
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with suppress(FileNotFoundError):  # the current folder has been deleted
        sys.path.append(os.getcwd())  # last, so that no file there hides a module that other code imports
    from rlhf import output

    output.secure()
    with Attempt() as loading:
        answer = KINDS[kind](load(place, name))
    connection.send((None, loading.error))
    while not loading.error:
        item = connection.recv()
        value = None
        with Attempt() as attempt:
            value = answer(*item)
        connection.send((value, attempt.error))


def die_with_parent(lifeline: int) -> None:
    """Make the kernel kill this process group when the parent ends, which closes its end of the pipe `lifeline`.

    A thread cannot do this: it would not run while the function hangs in C code that holds the GIL, such as a regular
    expression.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)


def load(place: str, name: str) -> Any:
    """Return the attribute `name` of a module or of a .py file."""
    module = load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    return getattr(module, name)


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("user_reward", path)  # the file may have the name of another module
    assert spec is not None, f"no way to load {path}"
    assert spec.loader is not None, f"no way to load {path}"
    sys.path.append(str(path.resolve().parent))  # the file may import modules from its folder
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Reward:
    """Calls a reward function and checks its result."""

    def __init__(self, function: Function):
        if not callable(function):
            raise TypeError(f"it is {function!r:.80}, not a function")
        self.function = function

    def __call__(self, prompt: str, response: str, record: dict) -> float:
        return finite(self.function(prompt, response, record))


class Dialogues:
    """The environments by key, one per dialogue. Each entry also has the turns of the model given to it so far."""

    def __init__(self, make: Callable[[], Any]):
        if not callable(getattr(make, "reset", None)) or not callable(getattr(make, "step", None)):
            raise TypeError(f"it is {make!r:.80}, not a class with the methods reset(record) and step(text)")
        self.make = make
        self.held: dict[Hashable, tuple[Any, dict, list[str]]] = {}

    def __call__(
        self, key: Hashable, record: dict, texts: list[str], ended: Collection[Hashable]
    ) -> tuple[list[Message] | None, float]:
        """Return the environment's answer (None if the dialogue has ended) and reward for the last text.

        Without texts, return the messages of reset(). If the environment has already got all texts except the last, it
        gets only the last one. Otherwise a new environment is made and gets all texts. Environments of the dialogues
        `ended` are dropped.
        """
        for other in ended:
            self.held.pop(other, None)
        environment, known, told = self.held.pop(key, (None, None, []))
        reply: tuple[list[Message] | None, float] = (None, 0.0)
        if environment is None or known != record or told != texts[:-1] or not texts:
            environment, told = self.make(), []
            reply = messages(environment.reset(deepcopy(record))), 0.0
        for i in range(len(told), len(texts)):
            if i > len(told) and reply[0] is None:
                after = f"ended after turn {i} and not after turn {len(texts)}"
                raise RuntimeError(f"the environment is not deterministic: with the same turns as before, it {after}")
            reply = checked(environment.step(texts[i]))
        if reply[0] is not None or not texts:
            self.held[key] = environment, record, texts
        return reply


KINDS: dict[str, Callable[[Any], Callable]] = {"function": Reward, "environment": Dialogues}


def checked(reply: Any) -> tuple[list[Message] | None, float]:
    """Return the result of step() if it is valid. Raises TypeError or ValueError."""
    if not isinstance(reply, tuple) or len(reply) != 2:
        raise TypeError(f"step() must return (messages or None, reward), but returned {reply!r:.80}")
    if any(message["role"] == "assistant" for message in messages(reply[0]) or ()):
        raise ValueError("step() must not return messages of the assistant")
    return messages(reply[0]), finite(reply[1])


def messages(said: Any) -> list[Message] | None:
    """Return the messages of an environment if they are valid. Raises TypeError."""
    if said is None:
        return None
    if not isinstance(said, list) or not said:
        raise TypeError(f"an environment must return a list of messages or None, but returned {said!r:.80}")
    for message in said:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise TypeError(f"a message must have the strings 'role' and 'content', but is {message!r:.80}")
    return [{"role": message["role"], "content": message["content"]} for message in said]


def finite(value: Any) -> float:
    """Return a reward if it is a finite number. Raises ValueError."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"the reward must be a finite number, but is {value!r:.80}")
    return float(value)


if __name__ == "__main__":
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended
        main()
