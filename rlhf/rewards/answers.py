"""Verifies the answer of a response to a mathematical problem.

extraction.py finds the answer in the response, spelling.py normalizes it, and reader.py parses it. This module compares
two parsed answers. Values are compared exactly, and nothing is evaluated as code. docs/verifier.md lists the rules.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from rlhf.rewards.extraction import extract
from rlhf.rewards.polynomials import Algebra, Quotient, UnreadableError, number
from rlhf.rewards.quantities import ratio
from rlhf.rewards.reader import Reader
from rlhf.rewards.spelling import plain
from rlhf.rewards.statements import (
    Bracket,
    Choice,
    Congruence,
    Matrix,
    Named,
    Node,
    Quantity,
    Ratio,
    Relation,
    Several,
    Words,
)
from rlhf.rewards.strings import LONGEST, words

DECIMAL = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
MOST_PAIRS = 400  # largest number of comparisons of members of two lists

__all__ = ["equal", "extract", "verify"]


def verify(response: str, answer: str) -> float:
    r"""Return 1.0 if the response states the right answer, else 0.0.

    `answer` is the answer alone (`42`, `\frac{1}{2}`) or a whole solution that states it.
    """
    given = extract(response)
    return float(given is not None and equal(given, extract(answer) or answer))


def equal(a: str, b: str) -> bool:
    """Return whether two answers have the same value. It takes milliseconds for any text."""
    if max(len(a), len(b)) > LONGEST:
        return a.strip() == b.strip() != ""
    if DECIMAL.fullmatch(a) and DECIMAL.fullmatch(b):  # most answers are plain numbers, so this saves time
        return Fraction(a.replace(",", "")) == Fraction(b.replace(",", ""))
    a, b = plain(a), plain(b)
    if not a or not b or a == b:
        return a == b != ""
    comparison = Comparison()
    try:
        return comparison.same(comparison.read(a), comparison.read(b))
    except UnreadableError:  # the limit of work was reached
        return words(a) == words(b)


class Comparison:
    """Compares two answers. Both share one limit of work."""

    def __init__(self) -> None:
        self.algebra = Algebra()
        self.reader = Reader(self.algebra)
        self.pairs = MOST_PAIRS

    def read(self, text: str) -> Node:
        return self.reader.read(text, top=True)

    def same(self, a: Node, b: Node) -> bool:
        if a is b or a == b:
            return True
        if type(a) is type(b):
            return SAME[type(a)](self, a, b)
        for first, second, compare in MIXED:
            for one, other in ((a, b), (b, a)):
                if isinstance(one, first) and isinstance(other, second):
                    return compare(self, one, other)
        return False

    def values(self, a: Quotient, b: Quotient) -> bool:
        return self.algebra.equal(a, b)

    def quantities(self, a: Quantity, b: Quantity) -> bool:
        """Quantities are equal if value and unit are equal. A unit that only one side has is ignored.

        A percentage equals its number. It also equals the number of hundredths, if the other side is a fraction.
        """
        if a.undone != b.undone:
            return False
        size = ratio(a.unit, b.unit)
        if size is None:
            return False
        if self.values(self.algebra.times(a.value, number(size)), b.value):
            return True
        for percent, other in ((a, b), (b, a)):
            if percent.unit.kind == "percent" and not other.unit.kind and other.fraction:
                return self.values(percent.value, self.algebra.times(other.value, number(100)))
        return False

    def brackets(self, a: Bracket, b: Bracket) -> bool:
        return (a.opening, a.closing) == (b.opening, b.closing) and self.in_order(a.members, b.members)

    def in_order(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        return len(a) == len(b) and all(map(self.same, a, b))

    def in_any_order(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        """Return whether each member of a equals another member of b."""
        if len(a) != len(b):
            return False
        rest = list(b)
        for member in a:
            for at, other in enumerate(rest):
                self.pairs -= 1
                if self.pairs < 0:
                    raise UnreadableError("too many members")
                if self.same(member, other):
                    del rest[at]
                    break
            else:
                return False
        return True

    def several(self, a: Several, b: Several) -> bool:
        if "union" in (a.kind, b.kind) and a.kind != b.kind:
            return False
        a_names, b_names = _names(a), _names(b)
        if a.kind == b.kind == "list" and (a_names is None) != (b_names is None):
            return self.by_names_and_bare(a, b) if a_names else self.by_names_and_bare(b, a)
        if a.kind == b.kind != "list":
            return self.in_any_order(self.distinct(a), self.distinct(b))
        return self.in_any_order(a.members, b.members)

    def by_names_and_bare(self, named: Several, bare: Several) -> bool:
        """x = 1, y = 2 equals 1, 2 in this order. x_1 = 1, x_2 = 2 are two values of x, in any order."""
        values = [member.value for member in named.members if isinstance(member, Named)]
        if len({name[0] for name in _names(named) or ()}) == 1:
            return self.in_any_order(values, bare.members)
        return self.in_order(values, bare.members)

    def distinct(self, several: Several) -> list[Node]:
        members: list[Node] = []
        for member in several.members:
            self.pairs -= len(members)
            if self.pairs < 0:
                raise UnreadableError("too many members")
            if not any(self.same(member, other) for other in members):
                members.append(member)
        return members

    def named(self, a: Named, b: Named) -> bool:
        if a.name == b.name and self.same(a.value, b.value):
            return True
        return a.rule is not None and b.rule is not None and self.relations(a.rule, b.rule)

    def proportional(self, a: Quotient, b: Quotient, positive: bool = False) -> bool:
        """Return whether a is a rational multiple of b, so that both are the same equation.

        For the same inequality, the factor must be positive.
        """
        if not a.above or not b.above or a.below != b.below:
            return not a.above and not b.above
        product = next(iter(a.above))
        factor = b.above.get(product, Fraction(0)) / a.above[product]
        if not factor or (positive and factor < 0):
            return False
        return {product: c * factor for product, c in a.above.items()} == b.above

    def relations(self, a: Relation, b: Relation) -> bool:
        return a.sign == b.sign and self.proportional(a.difference, b.difference, positive=a.sign != "=")

    def ratios(self, a: Ratio, b: Ratio) -> bool:
        """Times of day are compared as text, other ratios by their proportion."""
        if a.half or b.half or (a.clock and b.clock):
            return (a.clock, a.half) == (b.clock, b.half)
        if len(a.parts) != len(b.parts):
            return False
        first_a, first_b = a.parts[0], b.parts[0]
        pairs = zip(a.parts, b.parts, strict=True)
        return all(self.values(self.algebra.times(x, first_b), self.algebra.times(y, first_a)) for x, y in pairs)

    def choices(self, a: Choice, b: Choice) -> bool:
        if a.letter != b.letter:
            return False
        return a.content is None or b.content is None or self.same(a.content, b.content)

    def matrices(self, a: Matrix, b: Matrix) -> bool:
        return a.bars == b.bars and len(a.rows) == len(b.rows) and all(map(self.in_order, a.rows, b.rows))

    def congruences(self, a: Congruence, b: Congruence) -> bool:
        return a.name == b.name and self.values(a.rest, b.rest) and self.values(a.modulus, b.modulus)

    def words_and_quantity(self, text: Words, quantity: Quantity) -> bool:
        """A short word such as "Yes" may have been parsed as a product of letters."""
        return quantity.text.isalpha() and text == words(quantity.text)

    def choice_and_other(self, choice: Choice, other: Node) -> bool:
        if isinstance(other, Quantity | Words) and len(other.text) == 1 and other.text.isalpha():
            return other.text.casefold() == choice.letter
        return choice.content is not None and self.same(choice.content, other)

    def named_and_other(self, named: Named, other: Node) -> bool:
        """The name of a value may be missing. y = 2x + 3 may be written as any equivalent equation."""
        if isinstance(other, Relation):
            return named.rule is not None and self.relations(named.rule, other)
        return self.same(named.value, other)

    def list_and_tuple(self, several: Several, bracket: Bracket) -> bool:
        """1, 2 and x = 1, y = 2 equal the tuple (1, 2), in this order."""
        if several.kind != "list" or (bracket.opening, bracket.closing) != ("(", ")"):
            return False
        values = [member.value if isinstance(member, Named) else member for member in several.members]
        return self.in_order(values, bracket.members)

    def column_and_tuple(self, matrix: Matrix, bracket: Bracket) -> bool:
        if matrix.bars or (bracket.opening, bracket.closing) != ("(", ")") or any(len(row) != 1 for row in matrix.rows):
            return False
        return self.in_order([row[0] for row in matrix.rows], bracket.members)

    def set_and_other(self, several: Several, other: Node) -> bool:
        """A set of one value equals this value."""
        return several.kind == "set" and len(several.members) == 1 and self.same(several.members[0], other)

    def ratio_and_fraction(self, given: Ratio, other: Quantity) -> bool:
        """3:2 equals the fraction 3/2."""
        if len(given.parts) != 2 or given.half or not other.fraction or other.undone or other.unit.kind:
            return False
        return self.values(given.parts[0], self.algebra.times(given.parts[1], other.value))


SAME: dict[type, Callable] = {
    Words: lambda _, a, b: a == b,
    Quantity: Comparison.quantities,
    Bracket: Comparison.brackets,
    Several: Comparison.several,
    Named: Comparison.named,
    Relation: Comparison.relations,
    Ratio: Comparison.ratios,
    Choice: Comparison.choices,
    Matrix: Comparison.matrices,
    Congruence: Comparison.congruences,
}


# How to compare two different kinds. The first pair of types that fits is used.
MIXED: tuple[tuple[type, type, Callable], ...] = (
    (Words, Quantity, Comparison.words_and_quantity),
    (Choice, object, Comparison.choice_and_other),
    (Named, object, Comparison.named_and_other),
    (Several, Bracket, Comparison.list_and_tuple),
    (Matrix, Bracket, Comparison.column_and_tuple),
    (Ratio, Quantity, Comparison.ratio_and_fraction),
    (Several, object, Comparison.set_and_other),
)


def _names(several: Several) -> list[str] | None:
    """Return the names of the members; None if a member has no name."""
    names = [member.name for member in several.members if isinstance(member, Named)]
    return names if len(names) == len(several.members) else None
