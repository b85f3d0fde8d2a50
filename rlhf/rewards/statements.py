"""What an answer can say: a quantity, a list, an interval, an equation and so on. Anything else is words."""

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
    fraction: bool  # written as one: a percentage may equal it


class Bracket(NamedTuple):
    """A tuple or an interval."""

    opening: str
    members: "tuple[Node, ...]"
    closing: str


class Several(NamedTuple):
    """Values without an order: a "list" may hold one twice, a "set" or a "union" of intervals holds it once."""

    kind: str
    members: "tuple[Node, ...]"


class Named(NamedTuple):
    """x = 5, or x in an interval. rule: the same as a relation, where both sides are expressions."""

    name: str
    value: "Node"
    rule: "Relation | None" = None


class Relation(NamedTuple):
    """The difference of two sides is 0 ("="), positive ("<") or not negative ("≤")."""

    sign: str
    difference: Quotient


class Ratio(NamedTuple):
    parts: tuple[Quotient, ...]
    clock: str  # "5:30 pm" where it can be a time of day
    half: str  # "am", "pm" or nothing


class Choice(NamedTuple):
    letter: str
    content: "Node | None"


class Matrix(NamedTuple):
    bars: str  # the kind of matrix if it stands between bars
    rows: "tuple[tuple[Node, ...], ...]"


class Congruence(NamedTuple):
    name: str
    rest: Quotient
    modulus: Quotient


Node: TypeAlias = Words | Quantity | Bracket | Several | Named | Relation | Ratio | Choice | Matrix | Congruence


EMPTY = Several("set", ())
