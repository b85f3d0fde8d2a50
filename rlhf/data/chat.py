"""The chat templates of a tokenizer, with limits on their time and memory, because a template is untrusted."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf import texts
from rlhf.errors import UserError

if TYPE_CHECKING:
    import jinja2

Message = dict[str, Any]  # role, content and the other keys of the data set, which only a chat template uses
Tools = list[dict[str, Any]] | None  # descriptions of the tools that the assistant may call

SECONDS, MEMORY = 10.0, 1 << 30  # largest time and memory (bytes) for rendering one conversation
LONGEST = 4096  # largest number of bits of an integer in a template
GIVEN = ("messages", "tools", "add_generation_prompt")  # variables that this program sets
WORDS = {"True": "true", "False": "false", "None": "null"}  # Python's spelling -> JSON's


class ChatTemplates:
    """The chat templates of a tokenizer by name: "default", and perhaps "tool_use" for conversations with tools.

    variables: values that all of them get, beside GIVEN.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, Any]) -> None:
        self.sources, self.variables = sources, variables
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def dated(self) -> bool:
        """Whether a text depends on the date."""
        return any("strftime_now" in source for source in self.sources.values())

    def render(self, messages: list[Message], cue: bool, tools: Tools) -> str:
        """Return the text of a conversation. cue: add the header of the assistant's next turn. Raises UserError."""
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        with _limited("change the messages or choose another data.template"):
            if name not in self._compiled:
                self._compiled[name] = environment().from_string(self.sources[name])
            given = {"messages": messages, "tools": tools, "add_generation_prompt": cue}
            return self._compiled[name].render(**{"documents": None, **self.variables, **given})

    @cached_property
    def reads(self) -> frozenset[str]:
        """The names of the variables that the templates read. Raises UserError."""
        import jinja2.meta

        with _limited("choose another data.template"):
            trees = [environment().parse(source) for source in self.sources.values()]
            return frozenset().union(*map(jinja2.meta.find_undeclared_variables, trees))


@contextmanager
def _limited(remedy: str) -> Iterator[None]:
    with texts.Blaming("the tokenizer's chat template fails", remedy), bounded():
        yield


def variables(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the values of data.template_variables by name. A text that is not JSON stands for itself.

    Raises UserError.
    """
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        wrong = f"data.template_variables has {assignment!r:.80}"
        if not equals or not name.isidentifier():
            raise UserError(f"{wrong}; write name=value, such as enable_thinking=false")
        if name in GIVEN:
            raise UserError(f"{wrong}, but {name} comes from the data; remove it")
        if name in found:
            raise UserError(f"{wrong}, the second value of {name}; remove one")
        if text in WORDS:
            raise UserError(f"{wrong}; write {name}={WORDS[text]}")
        try:
            found[name] = texts.parse(text)
        except ValueError:
            found[name] = text
    return found


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the time and memory of the code inside. Raises TimeoutError or MemoryError. For the main thread only."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it takes more than {SECONDS:g} s")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_DATA)
    room = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize() + MEMORY
    if limits[0] == resource.RLIM_INFINITY or room < limits[0]:
        resource.setrlimit(resource.RLIMIT_DATA, (room, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {MEMORY >> 20} MB") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def environment() -> jinja2.Environment:
    """Return an environment with the conventions of transformers' apply_chat_template."""
    import jinja2.ext
    import jinja2.sandbox

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """A sandbox that limits the size of integers, so that powers and products cannot take very long."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                if bits > LONGEST:
                    raise jinja2.TemplateError(f"a number has more than {LONGEST} bits")
            return super().call_binop(context, operator, left, right)

    class Generation(jinja2.ext.Extension):
        """The tag {% generation %} marks assistant text. This extension renders only its body."""

        tags: ClassVar = {"generation"}

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, jinja2.ext.loopcontrols]
    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made
