"""Explains in words how the verifier parses and compares an answer and a response."""

from fractions import Fraction

from rlhf.rewards.answers import Comparison, equal, extract
from rlhf.rewards.polynomials import UNIT, Quotient, Sum, UnreadableError
from rlhf.rewards.quantities import Unit
from rlhf.rewards.spelling import plain
from rlhf.rewards.statements import Bracket, Choice, Congruence, Matrix, Named, Node, Quantity, Ratio, Relation, Several
from rlhf.rewards.strings import LONGEST

SIGNS = {"=": "is 0", "<": "is positive", "≤": "is not negative"}


def explain(response: str, answer: str) -> list[str]:
    """Return lines with the extracted answers, their parsed forms and the result. The last starts with the score."""
    given, right = extract(response), extract(answer) or answer
    lines = [f"answer:   {right!r}", f"          {reading(right)}"]
    if given is None:
        return [
            *lines,
            "response: states no answer: no box, no ####, no <answer>, no 'answer is'",
            "0: nothing was stated",
        ]
    lines += [f"response: {given!r}", f"          {reading(given)}"]
    if equal(given, right):
        return [*lines, "1: both have the same value"]
    return [*lines, f"0: {_difference(given, right)}"]


def reading(text: str) -> str:
    """Return a description of the parsed form of an answer."""
    if len(text) > LONGEST:
        return f"text of more than {LONGEST} characters, which equals only the same text"
    try:
        return described(Comparison().read(plain(text)))
    except UnreadableError as error:
        return f"text, because an expression in it cannot be worked out: {error}"


def _difference(given: str, right: str) -> str:
    if max(len(given), len(right)) > LONGEST:
        return "the texts differ"
    comparison = Comparison()
    try:
        a, b = (comparison.read(plain(text)) for text in (given, right))
    except UnreadableError:
        return "the texts differ"
    if isinstance(a, Quantity) and isinstance(b, Quantity):
        if a.undone != b.undone:
            return "work was left undone on one side"
        if a.unit != b.unit and a.unit.kind and b.unit.kind:
            return f"{_unit(a.unit)} against {_unit(b.unit)}"
    return (
        "the values differ" if type(a) is type(b) else f"{type(a).__name__.lower()} against {type(b).__name__.lower()}"
    )


def described(node: Node) -> str:
    match node:
        case Quantity():
            undone = ", with work left undone" if node.undone else ""
            return f"{_quotient(node.value)}{undone}" + (f" of the unit {_unit(node.unit)}" if node.unit.kind else "")
        case Bracket():
            return f"{node.opening}{'; '.join(map(described, node.members))}{node.closing}"
        case Several():
            return f"{node.kind} of {len(node.members)}: {'; '.join(map(described, node.members))}"
        case Named():
            return f"{node.name}, which is {described(node.value)}"
        case Relation():
            return f"a relation: {_quotient(node.difference)} {SIGNS[node.sign]}"
        case Ratio():
            return (
                f"time of day {node.clock} {node.half} or " if node.clock else ""
            ) + f"ratio {' : '.join(map(_quotient, node.parts))}"
        case Choice():
            return f"choice {node.letter.upper()}" + (f", which is {described(node.content)}" if node.content else "")
        case Matrix():
            return f"matrix {[[described(cell) for cell in row] for row in node.rows]}"
        case Congruence():
            return f"{node.name}, which is {_quotient(node.rest)} modulo {_quotient(node.modulus)}"
    return f"text {node.text!r}"


def _unit(unit: Unit) -> str:
    """Return a description of a unit. Sizes count the smallest unit of a kind: a metre is 1000 of length."""
    above, below = (
        kind + (f" * {size}" if size != 1 else "") for kind, size in ((unit.kind, unit.size), (unit.per, unit.per_size))
    )
    return f"{above} per {below}" if below else above


def _quotient(value: Quotient) -> str:
    return _sum(value.above) if value.below == UNIT else f"({_sum(value.above)}) / ({_sum(value.below)})"


def _sum(value: Sum) -> str:
    return " + ".join(sorted(_term(product, coefficient) for product, coefficient in value.items())) or "0"


def _term(product: frozenset, coefficient: Fraction) -> str:
    factors = sorted(_atom(atom) + ("" if exponent == 1 else f"^({exponent})") for atom, exponent in product)
    if not factors:
        return str(coefficient)
    return "*".join(factors if coefficient == 1 else [f"({coefficient})", *factors])


def _atom(atom: object) -> str:
    if not isinstance(atom, tuple):
        return str(atom)
    if atom[0] == "sum":
        return f"({_sum(dict(atom[1]))})"
    if atom[0] == "power":
        return f"({_atom(atom[1])}^({_term(atom[2], Fraction(1))}))"
    return f"{atom[0]}(...)" if atom[0] != "base" else f"{atom[1]} in base {atom[2]}"
