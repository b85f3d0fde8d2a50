"""The kinds of parsed answers: a quantity, a list, an interval, an equation and so on. Any other text is Words."""

from typing import NamedTuple, TypeAlias

from rlhf.rewards.polynomials import Quotient
from rlhf.rewards.quantities import Unit


class Words(NamedTuple):
    text: str  # without spaces and case


class Quantity(NamedTuple):
    value: Quotient
    undone: tuple[str, ...] | None  # see Expression
    unit: Unit
    text: str
    fraction: bool  # written as a fraction, which may equal a percentage


class Bracket(NamedTuple):
    """A tuple or an interval."""

    opening: str
    members: "tuple[Node, ...]"
    closing: str


class Several(NamedTuple):
    """Values without an order. A "list" may have equal values. A "set" or "union" of intervals has each value once."""

    kind: str
    members: "tuple[Node, ...]"


class Named(NamedTuple):
    """A value with a name: x = 5, or x in an interval. rule: the same as a relation, if both sides are expressions."""

    name: str
    value: "Node"
    rule: "Relation | None" = None


class Relation(NamedTuple):
    """The difference of two sides is 0 ("="), positive ("<") or not negative ("≤")."""

    sign: str
    difference: Quotient


class Ratio(NamedTuple):
    parts: tuple[Quotient, ...]
    clock: str  # hours and minutes such as "5:30" if it can be a time of day, else ""
    half: str  # "am", "pm" or ""


class Choice(NamedTuple):
    letter: str
    content: "Node | None"


class Matrix(NamedTuple):
    bars: str  # the LaTeX environment of a matrix between bars, else ""
    rows: "tuple[tuple[Node, ...], ...]"


class Congruence(NamedTuple):
    name: str
    rest: Quotient
    modulus: Quotient


Node: TypeAlias = Words | Quantity | Bracket | Several | Named | Relation | Ratio | Choice | Matrix | Congruence


EMPTY = Several("set", ())
