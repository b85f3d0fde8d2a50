"""The program of a worker process, which worker.py starts.

It imports a reward function or an environment, then answers each call until the connection closes. A call is a number
and a list of items. Its answer is the number and an outcome, (value, error), for each item. This program imports few
modules, so that it starts quickly.
"""

import fcntl
import importlib
import importlib.util
import inspect
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Hashable
from contextlib import suppress
from copy import deepcopy
from decimal import Decimal
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

LONGEST_ERROR = 4000  # characters that are kept of a traceback, from its end
LATE = "no result within the time limit"
SEVERAL = ["prompts", "responses", "records"]  # the parameters of a function that gets many responses in one call

Message = dict[str, str]  # role and content
Outcome = tuple[Any, str]  # value and error of an item; "" if there is no error


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
    sys.path[:] = connection.recv()  # first, because the next message may have objects of the package
    place, name, kind, arguments, memory, timeout = connection.recv()
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with suppress(FileNotFoundError):  # the current folder has been deleted
        sys.path.append(os.getcwd())  # last, so that no file there hides a module that other code imports
    from rlhf import output

    output.secure()
    with Attempt() as loading:
        given = load(place, name)
        code = KINDS[kind](given if arguments is None else given(*arguments))
    connection.send((() if loading.error else tuple(code.form), loading.error))
    if loading.error:
        return
    if code.form.waits:
        import asyncio

        asyncio.run(serve(connection, code, timeout))
    while True:
        number, items = connection.recv()
        with Attempt() as attempt:
            outcomes = code.call(items)
        connection.send((number, [(None, attempt.error)] * len(items) if attempt.error else outcomes))


async def serve(connection: Connection, code: "Reward", timeout: float) -> None:
    """Answer calls of an async function, many at a time, until the connection closes."""
    import asyncio

    loop, ended, tasks = asyncio.get_running_loop(), asyncio.Event(), set[asyncio.Task[None]]()

    async def answer(number: int, items: list[tuple]) -> None:
        limit = asyncio.timeout(timeout)
        with Attempt() as attempt:
            async with limit:
                outcomes = await code.wait(items)
        error = LATE if limit.expired() else attempt.error
        connection.send((number, [(None, error)] * len(items) if error else outcomes))

    def receive() -> None:
        try:
            task = loop.create_task(answer(*connection.recv()))
        except (EOFError, OSError):  # the parent has ended
            loop.remove_reader(connection.fileno())
            ended.set()
        else:
            tasks.add(task)  # the loop itself keeps no reference
            task.add_done_callback(tasks.discard)

    loop.add_reader(connection.fileno(), receive)
    await ended.wait()
    os._exit(0)  # no time for calls whose results nobody reads


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


class Form(NamedTuple):
    """How the user's code is called."""

    many: bool = False  # one call gets many items
    waits: bool = False  # it is async, so one process works on many calls at a time
    once: bool = False  # a call that has failed is not repeated, unless its process has ended


class Reward:
    """Calls a reward function and checks its results."""

    def __init__(self, function: Callable):
        if not callable(function):
            raise TypeError(f"it is {function!r:.80}, not a function")
        self.function, many = function, False
        with suppress(ValueError):  # some functions written in C have no signature
            signature = inspect.signature(function)
            many = list(signature.parameters)[:3] == SEVERAL
            try:
                signature.bind("", "", {})
            except TypeError:
                wanted = f"(prompt, response, record) or ({', '.join(SEVERAL)})"
                raise TypeError(f"its parameters are {signature}, but it is called with {wanted}") from None
        waits = any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004
        self.form = Form(many, waits, getattr(function, "once", False))

    def call(self, items: list[tuple]) -> list[Outcome]:
        """Return the outcome of each item."""
        return self._outcomes(items, self.function(*self._arguments(items)))

    async def wait(self, items: list[tuple]) -> list[Outcome]:
        """Return the outcome of each item. The function is async."""
        return self._outcomes(items, await self.function(*self._arguments(items)))

    def _arguments(self, items: list[tuple]) -> Collection:
        return [list(values) for values in zip(*items, strict=True)] if self.form.many else items[0]

    def _outcomes(self, items: list[tuple], found: Any) -> list[Outcome]:
        outcomes = []
        for value in several(found, len(items)) if self.form.many else [found]:
            checked = None
            with Attempt() as attempt:
                checked = reward(value)
            outcomes.append((checked, attempt.error))
        return outcomes


class Dialogues:
    """The environments by key, one per dialogue. Each entry also has the turns of the model given to it so far."""

    form = Form()

    def __init__(self, make: Callable[[], Any]):
        if not callable(getattr(make, "reset", None)) or not callable(getattr(make, "step", None)):
            raise TypeError(f"it is {make!r:.80}, not a class with the methods reset(record) and step(text)")
        self.make = make
        self.held: dict[Hashable, tuple[Any, dict, list[str]]] = {}

    def call(self, items: list[tuple]) -> list[Outcome]:
        """Return the outcome of the only item, which is a turn."""
        return [(self.answer(*item), "") for item in items]

    def answer(
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


KINDS: dict[str, Callable[[Any], Any]] = {"function": Reward, "environment": Dialogues}


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


def several(found: Any, count: int) -> list:
    """Return the rewards of one call for `count` responses: a list, an array or a tensor. Raises TypeError."""
    if isinstance(found, (str, bytes, dict, set, frozenset)) or not hasattr(found, "__len__") or len(found) != count:
        raise TypeError(f"the function must return {count} rewards, one per response, but returned {found!r:.80}")
    return list(found)


def reward(value: Any) -> float | dict[str, float]:
    """Return a reward if it is a finite number, or named parts that are. Raises ValueError."""
    if not isinstance(value, dict):
        return finite(value)
    if not value or not all(isinstance(name, str) and name and name.isprintable() for name in value):
        what = "names that are texts without control characters"  # they become names of metrics
        raise ValueError(f"the parts of a reward must have {what}, but it is {value!r:.80}")
    return {name: finite(part, f"the part {name!r} of the reward") for name, part in value.items()}


def finite(value: Any, what: str = "the reward") -> float:
    """Return a number as a float. A scalar of numpy, or an array or tensor without dimensions, is a number.

    Raises ValueError if it is not finite, or not a number.
    """
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(number, (Real, Decimal)) or not abs(float(number)) < math.inf:  # false for nan, too
        raise ValueError(f"{what} must be a finite number, but is {value!r:.80}")
    return float(number)


if __name__ == "__main__":
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended
        main()
