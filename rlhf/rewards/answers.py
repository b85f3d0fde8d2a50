"""Whether a response states the right answer of a mathematical problem: extraction.py finds it, spelling.py spells it plainly,
reader.py reads it as a statement, and here two answers are compared.

Values are compared exactly, and nothing is evaluated as code. The rules, one sentence each, are in docs/verifier.md.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from rlhf.rewards.extraction import extract
from rlhf.rewards.polynomials import Algebra, Quotient, UnreadableError, number
from rlhf.rewards.quantities import ratio
from rlhf.rewards.reader import LONGEST, Reader, words
from rlhf.rewards.spelling import plain
from rlhf.rewards.statements import Bracket, Choice, Congruence, Matrix, Named, Node, Quantity, Ratio, Relation, Several, Words

DECIMAL = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
MOST_PAIRS = 400  # comparisons of members of two lists whose members are not equal at sight

__all__ = ["equal", "extract", "verify"]


def verify(response: str, answer: str) -> float:
    r"""1.0 if the response states the right answer, else 0.0. The answer is bare (`42`, `\frac{1}{2}`) or a whole solution stating it."""
    given = extract(response)
    return float(given is not None and equal(given, extract(answer) or answer))


def equal(a: str, b: str) -> bool:
    """Whether two bare answers have the same value. Takes milliseconds for any text."""
    if max(len(a), len(b)) > LONGEST:
        return a.strip() == b.strip() != ""
    if DECIMAL.fullmatch(a) and DECIMAL.fullmatch(b):  # most answers: no need to read them any further
        return Fraction(a.replace(",", "")) == Fraction(b.replace(",", ""))
    a, b = plain(a), plain(b)
    if not a or not b or a == b:
        return a == b != ""
    comparison = Comparison()
    try:
        return comparison.same(comparison.read(a), comparison.read(b))
    except UnreadableError:  # more work than one answer is worth
        return words(a) == words(b)


class Comparison:
    """Two answers that share one limit of work."""

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
        """Of the same unit, or one without; a percentage is so many, or so many hundredths where the other side is a fraction."""
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
        """Whether the members of one can be paired with those of the other."""
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
        """x = 1, y = 2 is 1, 2 in this order; x_1 = 1, x_2 = 2 are two values of x, in any."""
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
        """Whether one is a rational multiple of the other: the same equation, or with a positive factor the same inequality."""
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
        """Times of day by the clock, anything else by proportion."""
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
        """Short words, as "Yes", can be read as products."""
        return quantity.text.isalpha() and text == words(quantity.text)

    def choice_and_other(self, choice: Choice, other: Node) -> bool:
        if isinstance(other, Quantity | Words) and len(other.text) == 1 and other.text.isalpha():
            return other.text.casefold() == choice.letter
        return choice.content is not None and self.same(choice.content, other)

    def named_and_other(self, named: Named, other: Node) -> bool:
        """A name may be dropped; y = 2x + 3 may be written as any other equation."""
        if isinstance(other, Relation):
            return named.rule is not None and self.relations(named.rule, other)
        return self.same(named.value, other)

    def list_and_tuple(self, several: Several, bracket: Bracket) -> bool:
        """1, 2 and x = 1, y = 2 may be the tuple (1, 2), in this order."""
        if several.kind != "list" or (bracket.opening, bracket.closing) != ("(", ")"):
            return False
        values = [member.value if isinstance(member, Named) else member for member in several.members]
        return self.in_order(values, bracket.members)

    def column_and_tuple(self, matrix: Matrix, bracket: Bracket) -> bool:
        if matrix.bars or (bracket.opening, bracket.closing) != ("(", ")") or any(len(row) != 1 for row in matrix.rows):
            return False
        return self.in_order([row[0] for row in matrix.rows], bracket.members)

    def set_and_other(self, several: Several, other: Node) -> bool:
        """A set of one value is this value."""
        return several.kind == "set" and len(several.members) == 1 and self.same(several.members[0], other)

    def ratio_and_fraction(self, given: Ratio, other: Quantity) -> bool:
        """3:2 is the fraction 3/2."""
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


# Two kinds, the first pair that fits counts.
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
    """The names of a list all of whose members have one."""
    names = [member.name for member in several.members if isinstance(member, Named)]
    return names if len(names) == len(several.members) else None
