"""The program of a worker process: import a reward function or an environment, then answer items with (value, error) until the other end
of the connection is gone. Imports little, so that it starts in a blink; worker.py starts it.
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

LONGEST_ERROR = 4000  # characters: the end of a traceback says most

Function = Callable[[str, str, dict], float]
Message = dict[str, str]  # role and content


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
    sys.path[:], place, name, kind, memory = connection.recv()
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with suppress(FileNotFoundError):  # the current folder has been deleted
        sys.path.append(os.getcwd())  # last, so that no file there stands in for a module that something else imports
    from rlhf import output

    output.secure()
    with Attempt() as loading:
        answer = KINDS[kind](load(place, name))
    connection.send((None, loading.error))
    while not loading.error:
        try:
            item = connection.recv()
        except EOFError:
            return
        value = None
        with Attempt() as attempt:
            value = answer(*item)
        connection.send((value, attempt.error))


def die_with_parent(lifeline: int) -> None:
    """Have the kernel kill this process and its children when the parent, however it ends, lets go of the pipe: a thread that watches
    would never run while the function hangs inside C code that holds the interpreter's lock, as a regular expression does.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)


def load(place: str, name: str) -> Any:
    """What is called name in a module or in a .py file."""
    module = load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    return getattr(module, name)


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("user_reward", path)  # not after the file, which may be called like another module
    assert spec is not None, f"no way to load {path}"
    assert spec.loader is not None, f"no way to load {path}"
    sys.path.append(str(path.resolve().parent))  # the file may import its neighbours
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Reward:
    """A function that says what a response is worth."""

    def __init__(self, function: Function):
        if not callable(function):
            raise TypeError(f"it is {function!r:.80}, not a function")
        self.function = function

    def __call__(self, prompt: str, response: str, record: dict) -> float:
        return finite(self.function(prompt, response, record))


class Dialogues:
    """Environments by key, one for each dialogue, and the turns of the model that each has been told."""

    def __init__(self, make: Callable[[], Any]):
        if not callable(getattr(make, "reset", None)) or not callable(getattr(make, "step", None)):
            raise TypeError(f"it is {make!r:.80}, not a class with the methods reset(record) and step(text)")
        self.make = make
        self.held: dict[Hashable, tuple[Any, dict, list[str]]] = {}

    def __call__(self, key: Hashable, record: dict, texts: list[str], ended: Collection[Hashable]) -> tuple[list[Message] | None, float]:
        """What the environment says to the last of the texts, None at the end, and the reward of that; of no texts, what reset() says.

        An environment that has been told all texts but the last is only told that one. Otherwise it is made anew, and told all. Those of
        the ended dialogues are dropped.
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
                raise RuntimeError(f"told the same as before, the environment ended after turn {i} and not after turn {len(texts)}")
            reply = checked(environment.step(texts[i]))
        if reply[0] is not None or not texts:
            self.held[key] = environment, record, texts
        return reply


KINDS: dict[str, Callable[[Any], Callable]] = {"function": Reward, "environment": Dialogues}


def checked(reply: Any) -> tuple[list[Message] | None, float]:
    """What step() has returned, if it may."""
    if not isinstance(reply, tuple) or len(reply) != 2:
        raise TypeError(f"step() must return (messages or None, reward), but returned {reply!r:.80}")
    if any(message["role"] == "assistant" for message in messages(reply[0]) or ()):
        raise ValueError("step() must not speak for the assistant")
    return messages(reply[0]), finite(reply[1])


def messages(said: Any) -> list[Message] | None:
    """What an environment says, if it may be said."""
    if said is None:
        return None
    if not isinstance(said, list) or not said:
        raise TypeError(f"an environment must say a list of messages or None, but said {said!r:.80}")
    for message in said:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise TypeError(f"a message must have the strings 'role' and 'content', but is {message!r:.80}")
    return [{"role": message["role"], "content": message["content"]} for message in said]


def finite(value: Any) -> float:
    """A reward, if it is one."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"the reward must be a finite number, but is {value!r:.80}")
    return float(value)


if __name__ == "__main__":
    main()
