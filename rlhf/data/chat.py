"""The jinja environment for chat templates, and limits on the time and memory of a template, which is untrusted."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import jinja2

SECONDS, MEMORY = 10.0, 1 << 30  # largest time and memory (bytes) for rendering one conversation
LONGEST = 4096  # largest number of bits of an integer in a template


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
