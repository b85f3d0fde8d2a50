r"""Parses answers in plain spelling (spelling.py) into statements (statements.py).

Each parsing method takes a text and returns a node, or None if the text has another form. If no method returns a node,
the answer is `Words`.
"""

import re

from rlhf.rewards import quantities
from rlhf.rewards.expressions import Expression
from rlhf.rewards.polynomials import Algebra, Quotient, UnreadableError, number, symbol
from rlhf.rewards.quantities import BARE, Unit
from rlhf.rewards.spelling import REALS
from rlhf.rewards.statements import (
    EMPTY,
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
)
from rlhf.rewards.strings import LONGEST, SIGNS, divided, enclosed, split, split_signs, squeezed, words

DEEPEST = 20  # largest number of opening brackets
MOST_MEMBERS = 50  # largest number of members of a list

INFINITY = symbol("∞")
GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|phi|omega|Delta|Omega|angle|triangle|overline)"
LETTER = rf"(?:{GREEK}|[A-Za-z])"
NAME = re.compile(
    rf"{LETTER}(?:_(?:\w+|\{{[^{{}}]*\}}))?'*"  # x, x_1, \theta
    rf"|[A-Za-z](?:\^\{{?-1\}}?|'*)\((?:[A-Za-z]|[0-9]+)(?:,\s?[a-z])*\)|[fghFGPE]\([^()]*\)"  # f(x), P(A), f(12)
    rf"|\|\s?[A-Za-z]+\s?\||m?\s?(?:\\(?:angle|triangle|overline)\s?)?\{{?[A-Z]{{1,5}}\}}?"  # |AB|, \angle ABC, AB
    r"|\\frac\{[A-Z]{2}\}\{[A-Z]{2}\}"  # AB/CD
    r"|(?:[A-Z]\w*|[A-Z]_\{?\w+\}?)\s?:\s?(?:[A-Z]\w*|[A-Z]_\{?\w+\}?)"  # V_1 : V_2
    r"|[A-Za-z][a-z]{3,}(?:\s[A-Za-z]+){0,3}"  # Area, Total cost
)
TUPLE_OF_NAMES = re.compile(r"\(\s?[A-Za-z]\w?(?:\s?,\s?[A-Za-z]\w?)+\s?\)")
FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice)\s)?"
    r"(?:\(\s?([A-Ja-e])\s?\)(?:\s?[:.]?(?:\s|(?=[0-9\\$-]))(.*))?|([A-J])\s?\)\s?(.*)|([A-J])\s?[:.]\s(.*)|([A-J])[.:]?)"
)
CLOCK = re.compile(r"0?([0-9]{1,2})\s?:\s?([0-5][0-9])\s?(am|pm)?", re.IGNORECASE)
MATRIX = re.compile(r"\\begin\s?\{((?:[pbvBV]|small)?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\s?\{\1\}")
NO_SOLUTION = re.compile(
    r"(?:there (?:is|are) )?no (?:real |integer |such )?(?:solutions?|roots?|values?|numbers?)(?: exists?)?|∅",
    re.IGNORECASE,
)
ALL_REALS = re.compile(rf"{REALS}|all real numbers|all reals", re.IGNORECASE)


class Reader:
    """Parses the two answers of one comparison. Both share one limit of work."""

    def __init__(self, algebra: Algebra):
        self.algebra = algebra

    def read(self, text: str, top: bool = False) -> Node:
        """Return the node of a text. top: the text is a whole answer, which may be a letter of a multiple choice."""
        text = text.strip()
        if len(text) > LONGEST or sum(map(text.count, "([{⦃")) > DEEPEST:
            return words(text)
        if top:
            while enclosed(text) and text[0] == "{" and "," not in text:
                text = text[1:-1].strip()
            choice = self._choice(text)
            if choice:
                return choice
        if NO_SOLUTION.fullmatch(text):
            return EMPTY
        if ALL_REALS.fullmatch(text):
            return Bracket("(", (self._infinity(-1), self._infinity(1)), ")")
        for reader in (
            self._matrix,
            self._list,
            self._congruence,
            self._relation,
            self._union,
            self._ratio,
            self._bracket,
            self._quantity,
        ):
            node = reader(text)
            if node is not None:
                return node
        return words(text)

    def _infinity(self, sign: int) -> Quantity:
        value = INFINITY if sign > 0 else self.algebra.negative(INFINITY)
        return Quantity(value, None, BARE, "", False)

    def expression(self, text: str) -> Quotient | None:
        """Return the value of an expression without a unit; None if the text is not an expression."""
        try:
            return Expression(text, self.algebra).value
        except UnreadableError:
            return None

    def _choice(self, text: str) -> Choice | None:
        match = CHOICE.fullmatch(text)
        if not match:
            return None
        letter = match[1] or match[3] or match[5] or match[7]
        content = (match[2] or match[4] or match[6] or "").strip()
        return Choice(letter.casefold(), self.read(content) if content else None)

    def _matrix(self, text: str) -> Matrix | None:
        match = MATRIX.fullmatch(text[1:-1].strip() if enclosed(text) and text[0] in "([" else text)
        if not match or "\\begin" in match[2]:
            return None
        rows = [row.strip() for row in re.split(r"¦(?:\s?\[[^\[\]]*\])?", match[2].replace("\\hline", ""))]
        while rows and not rows[-1]:
            rows.pop()
        bars = match[1] if match[1] in ("vmatrix", "Vmatrix") else ""  # of a determinant or norm
        return Matrix(bars, tuple(tuple(self.read(cell) for cell in row.split("&")) for row in rows))

    def _list(self, text: str) -> Node | None:
        separator = ";" if len(split(text, ";")) > 1 else ","
        parts = [part for part in split(text, separator) if part]
        if len(parts) == 1 and parts[0] == text:
            return self._two_signs(text)
        if len(parts) > MOST_MEMBERS:
            return words(text)
        members: list[Node] = []
        for part in parts:
            node = self.read(part)
            members += node.members if isinstance(node, Several) and node.kind == "list" and "±" in part else [node]
        return gathered(members)

    def _two_signs(self, text: str) -> Node | None:
        """Parse a text with one ±: ±2 is a list of 2 and -2."""
        if text.count("±") != 1 or enclosed(text):
            return None
        sign = SIGNS.search(text)
        if sign and sign.start() < text.index("±"):
            return None  # x = ±2 is parsed as a relation first
        upper, lower = text.replace("±", "+").replace("∓", "-"), text.replace("±", "-").replace("∓", "+")
        return gathered([self.read(upper), self.read(lower)])

    def _congruence(self, text: str) -> Congruence | None:
        match = re.fullmatch(r"([^≡]*)≡([^≡]*?)\(?\s?mod\s?\{?([0-9a-z]+)\}?\s?\)?", text)
        if not match:
            return None
        rest, modulus = self.expression(match[2].strip(" (")), self.expression(match[3])
        if rest is None or modulus is None:
            return None
        if rest.rational is not None and modulus.rational:
            rest = number(rest.rational % modulus.rational)
        return Congruence(squeezed(match[1]), rest, modulus)

    def _relation(self, text: str) -> Node | None:
        sides, signs = split_signs(text)
        if not signs:
            return None
        if "⇒" in signs or ("≈" in signs and signs != ["≈"]):
            at = max(i for i, sign in enumerate(signs) if sign in "⇒≈")
            return (
                self.read(text[text.rindex("⇒") + 1 :] if "⇒" in signs else text[: text.index("≈")])
                if at >= 0
                else None
            )
        if signs == ["≈"]:  # 11/36 ≈ 0.306 states 11/36; x ≈ 3.14 states 3.14
            return Named(squeezed(sides[0]), self.read(sides[1])) if NAME.fullmatch(sides[0]) else self.read(sides[0])
        if signs == ["∈"]:
            return Named(squeezed(sides[0]), self.read(sides[1]))
        if set(signs) == {"="}:
            return self._equation(sides)
        if set(signs) <= FLIPPED.keys():
            return self._inequality(sides, signs)
        if signs == ["≠"] and NAME.fullmatch(sides[0]):
            value = self.read(sides[1])
            below, above = self._infinity(-1), self._infinity(1)
            return Named(
                squeezed(sides[0]),
                Several("union", (Bracket("(", (below, value), ")"), Bracket("(", (value, above), ")"))),
            )
        return None

    def _equation(self, sides: list[str]) -> Node | None:
        """Parse an equation. x = 5 and 5 = x name a value, and x = 2 + 3 = 5 names the last one.

        2 + 3 = 5 is a number if the equation is true.
        """
        first, last = sides[0], sides[-1]
        if TUPLE_OF_NAMES.fullmatch(first) and len(sides) == 2:
            values = self.read(last)
            names = split(first[1:-1], ",")
            if isinstance(values, Bracket) and len(values.members) == len(names):
                return Several("list", tuple(Named(squeezed(n), v) for n, v in zip(names, values.members, strict=True)))
            return Named(squeezed(first), values)
        named = bool(NAME.fullmatch(first))
        if not named and len(sides) == 2 and NAME.fullmatch(last):
            first, last, named = last, first, True
        rule = self._rule("=", first, last)
        if named:
            return Named(squeezed(first), self.read(last), rule)
        if rule is None:
            return None
        if not rule.difference.above and all(self._rule("=", side, last) == rule for side in sides):
            return self.read(last)
        return rule if len(sides) == 2 else None

    def _rule(self, sign: str, left: str, right: str) -> Relation | None:
        a, b = self.expression(left), self.expression(right)
        return Relation(sign, self.algebra.minus(b, a)) if a is not None and b is not None else None

    def _inequality(self, sides: list[str], signs: list[str]) -> Node | None:
        """Parse an inequality. 2 < x and 1 < x <= 2 are intervals of x. Others become a relation."""
        if signs[0] in ">≥":
            sides, signs = sides[::-1], [FLIPPED[sign] for sign in signs[::-1]]
        if set(signs) - {"<", "≤"}:
            return None
        names = [bool(NAME.fullmatch(side)) for side in sides]
        rule = self._rule(signs[0], *sides) if len(sides) == 2 else None
        if names == [False, True, False]:
            low, name, high = sides
            ends: tuple[Node, Node] = self.read(low), self.read(high)
        elif names == [True, False]:
            name, high = sides
            ends, signs = (self._infinity(-1), self.read(high)), ["<", *signs]
        elif names == [False, True]:
            low, name = sides
            ends, signs = (self.read(low), self._infinity(1)), [*signs, "<"]
        else:
            return rule
        return Named(
            squeezed(name), Bracket("(" if signs[0] == "<" else "[", ends, ")" if signs[1] == "<" else "]"), rule
        )

    def _union(self, text: str) -> Several | None:
        parts = split(text, "∪")
        return Several("union", tuple(map(self.read, parts))) if len(parts) > 1 else None

    def _ratio(self, text: str) -> Ratio | None:
        parts = re.split(r"\s?:\s?", re.sub(r"(?<=[0-9])\sto\s(?=[0-9])", ":", text))
        clock = CLOCK.fullmatch(text)
        half = (clock[3] or "").lower() if clock else ""
        values = [self.expression(part.removesuffix(half)) for part in parts]
        if len(parts) < 2 or None in values:
            return None
        return Ratio(
            tuple(value for value in values if value is not None), f"{clock[1]}:{clock[2]}" if clock else "", half
        )

    def _bracket(self, text: str) -> Node | None:
        if re.fullmatch(r"[\[\]][^\[\]]*[\[\]]", text) and "," in text:  # French notation: [2, 3[ is [2, 3)
            text = ("(" if text[0] == "]" else text[0]) + text[1:-1] + (")" if text[-1] == "[" else text[-1])
        if not enclosed(text):
            return None
        inner, opening, closing = text[1:-1].strip(), text[0], text[-1]
        separator = ";" if len(split(inner, ";")) > 1 else ","
        parts = split(inner, separator)
        if opening == "⦃" and len(parts) == 1:
            for bar in ":|":
                name, _, condition = inner.partition(bar)
                if condition and NAME.fullmatch(name.partition("∈")[0].strip()):
                    return self.read(condition)
        if opening in "⦃{" and (len(parts) > 1 or opening == "⦃"):
            node = self._list(inner) or self.read(inner)
            members = node.members if isinstance(node, Several) and node.kind == "list" else (node,)
            return Several("set", tuple(members))
        if len(parts) == 1:
            return self.read(inner) if not self._quantity(text) else None
        return Bracket(opening, tuple(map(self.read, parts)), closing) if len(parts) <= MOST_MEMBERS else None

    def _quantity(self, text: str) -> Quantity | None:
        spelled = text
        currency = quantities.CURRENCY.match(text)
        unit = BARE
        if currency:
            unit = (
                quantities.unit(currency[2].rstrip("."), False)
                or quantities.unit(currency[2].rstrip("."), True)
                or BARE
            )
            text = currency[1] + currency[3] + text[currency.end() :].strip()
        words_ = quantities.in_words(text)
        if words_ is not None:
            return Quantity(number(words_), None, unit, spelled, False)
        for head, tail, spaced in divided(text):
            factor, rest = quantities.scaled(tail) if spaced else (1, tail)
            behind = quantities.unit(rest, spaced) if rest.strip() else BARE
            if behind is None or (currency and behind.kind):
                continue
            try:
                expression = Expression(head, self.algebra)
            except UnreadableError:
                continue
            if len(rest.strip()) == 1 and rest.strip().isalpha() and expression.letters:  # in \pi r h, h is not hours
                continue
            value = self.algebra.times(expression.value, number(factor))
            both = Unit(unit.kind, unit.size, behind.per, behind.per_size) if currency else behind
            return Quantity(value, expression.undone, both, spelled, "/" in head or "\\frac" in head)
        return None


def gathered(members: list[Node]) -> Node:
    """Return a list of members.

    The whole list gets a name if all members have this name (x = 1 or x = 2), or if only the first member has a name
    (n = 1, 2, 3). Unbounded intervals of one name form a union.
    """
    names = [member.name for member in members if isinstance(member, Named)]
    if (
        names
        and isinstance(members[0], Named)
        and (len(names) == 1 or (len(names) == len(members) and len(set(names)) == 1))
    ):
        values: list[Node] = []
        for member in members:
            value = member.value if isinstance(member, Named) else member
            values += value.members if isinstance(value, Several) and value.kind in ("list", "union") else [value]
        intervals = len(names) == len(members) and all(isinstance(value, Bracket) for value in values)
        unbounded = intervals and all("∞" in str(value) for value in values)
        return Named(names[0], Several("union" if unbounded else "list", tuple(values)))
    return Several("list", tuple(members))
