"""Final answers of mathematics: where they stand in a text, and whether two of them are equal.

An answer is read into a value, and values are compared exactly: rational numbers, square roots and multiples of pi, tuples, intervals,
sets and unions of these; anything else is text. Nothing is evaluated: `3 * 6` and `2^4` are text, so work left undone earns nothing. A
decimal is what it says (0.33 is not 1/3). Units and currencies are dropped, as the gold answers of GSM8K drop them, and percent is such
a unit: 50% equals 50, never 0.5. A list without brackets is a set, and so is a value with a plus-minus sign.
"""

import math
import re
from collections.abc import Hashable
from fractions import Fraction

READ = 10**5  # characters at the end of a text, where its answer stands
LONGEST = 300  # characters of an answer that is read; a longer one equals only the same text
DEEPEST = 20  # brackets in an answer that is read
LARGEST_RADICAND = 10**6  # under a square root: trial division takes it apart in 0.1 ms

Surd = dict[
    tuple[int, int], Fraction
]  # (square-free radicand, power of pi) -> coefficient, none 0: 1/2 + 3 sqrt(5) is {(1, 0): 1/2, (5, 0): 3}
ONE = (1, 0)


class UnreadableError(ValueError):
    """Not a number of ours: the answer is compared as text."""


def verify(response: str, answer: str) -> float:
    r"""1.0 if the response states the right answer, else 0.0. The answer is bare (`42`, `\frac{1}{2}`) or a whole solution stating it."""
    given = extract(response)
    return float(given is not None and equal(given, extract(answer) or answer))


def extract(text: str) -> str | None:
    r"""The final answer that a text states: behind `####` (GSM8K) or in `\boxed{}` (MATH), whichever comes last; else behind the last
    "answer is" or "answer:", to the end of the sentence. A number that merely stands somewhere is no answer: None.
    """
    text = text[-READ:]
    box, hashes = text.rfind("\\boxed"), text.rfind("####")
    if box > hashes:
        return _braced(text[box + len("\\boxed") :].lstrip())
    if hashes >= 0:
        return _first_line(text[hashes + len("####") :])
    stated = list(re.finditer(r"\banswer[\s*]*(?:is\b|:)", text, re.IGNORECASE))
    if not stated:
        return None
    line = _first_line(text[stated[-1].end() :].lstrip(" :*"))
    return line and re.split(r"\.(?:\s|$)", line, maxsplit=1)[0]


def _first_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else None


def _braced(text: str) -> str | None:
    r"""What stands between the first brace and the one that closes it (None if nothing does), or the first word: \boxed 5."""
    if not text.startswith("{"):
        return re.split(r"[\s$]", text, maxsplit=1)[0] or None
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:at].strip() or None
    return None


def equal(a: str, b: str) -> bool:
    """Whether two bare answers have the same value. Takes milliseconds for any text."""
    value = _value(_clean(a))
    return value != "" and value == _value(_clean(b))


# LaTeX and typography -> one plain spelling, in this order.
SPELLING = {
    "\\\\": "¦",  # a new row of a matrix
    **dict.fromkeys(("\\left", "\\right", "\\displaystyle", "\\!", "\\(", "\\)", "\\[", "\\]", "\\$", "$", "€", "£", "¥", "₹", "¢"), ""),
    **dict.fromkeys(("\\dfrac", "\\tfrac", "\\cfrac"), "\\frac"),
    **dict.fromkeys(("\\cdot", "\\times", "×", "·"), "*"),
    **dict.fromkeys(("\\div", "÷", "⁄"), "/"),
    **dict.fromkeys(("−", "–"), "-"),
    **dict.fromkeys(("~", "\u00a0", "\u202f", "\\quad"), " "),
    **{"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "²": "^2", "³": "^3"},
    **{"{,}": ",", "\\{": "{", "\\}": "}", "\\%": "%", "\\sqrt": "√", "\\infty": "∞", "\\cup": "∪", "\\pi": "π", "\\pm": "±"},
    **dict.fromkeys(("\\emptyset", "\\varnothing"), "∅"),
}
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|boldsymbol|mbox)\s?\{([^{}]*)\}", r" \1 "),
        (r"(?<=[0-9])\\[,;: ](?=[0-9]{3})", ""),  # 10\,000
        (r"\\[,;: ]", " "),
        (r"(?:\^\{\\circ\}|\^?\\circ|°)\s?(?:[CF]\b)?", " "),
        (r"\^\{([0-9A-Za-z])\}", r"^\1"),
        (r"\\frac\s?([0-9])\s?([0-9])", r"\\frac{\1}{\2}"),
        (r"(?<=[0-9.])\s?\*\s?10\s?\^\s?(?:\{\s?)?([+-]?[0-9]{1,2})(?![0-9])(?:\s?\})?", r"e\1"),  # 3 * 10^{8}
        (r"(?<![A-Za-z])pi\b", "π"),
        (r"(?<![A-Za-z])sqrt\s?(?=[({])", "√"),
        (r"\b(?:and|or)\b", ","),
        (r"(^|,)\s*(?:\\?[A-Za-z]\w?|\([a-z](?:,\s?[a-z])+\))\s?(?:=|\\in\b|∈)", r"\1"),  # x = 5, (x, y) = (1, 2)
        (r"^\s?(?:USD|EUR|GBP|Rs\.?|US|CA|AU|NZ)\s?(?=[0-9])", ""),
        (r"\{\s?\}", "∅"),
        (r"\s+", " "),
    )
]


def _clean(text: str) -> str:
    if len(text) > LONGEST:
        return text
    text = re.sub(r"\s+", " ", text)
    for spelling, plain in SPELLING.items():
        text = text.replace(spelling, plain)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.lstrip(" *`:;,").rstrip(" *`:;,.")


def _value(text: str) -> Hashable:
    """Equal values are equal answers: sorted pairs for a number, (open, values, close) for tuples and intervals, frozensets, or text."""
    if len(text) > LONGEST or sum(map(text.count, "([{")) > DEEPEST:
        return text
    parts = _split(text, "∪")
    if len(parts) > 1:
        return "∪", frozenset(map(_value, parts))
    if _is_enclosed(text):
        parts = _members(text[1:-1])
        if len(parts) == 1:
            return _value(parts[0])
        values = tuple(map(_value, parts))
        return frozenset(values) if text[0] == "{" else (text[0], values, text[-1])
    number = _number(text)
    if number is not None:
        return number
    parts = _members(text)
    return frozenset(map(_value, parts)) if len(parts) > 1 else _plain(text)


def _plain(text: str) -> str:
    """Text that is compared as such: without spaces and case, x/3 for a fraction."""
    text = re.sub(r"\s", "", text).casefold()
    text = re.sub(r"\\frac\{(\w+)\}\{(\w+)\}", r"\1/\2", text)
    return re.sub(r"([_^])\{(\w+)\}", r"\1\2", text)


def _members(text: str) -> list[str]:
    """The parts between commas, of which one with a plus-minus sign is two."""
    every = []
    for part in _split(text, ","):
        every += [part.replace("±", "+"), part.replace("±", "-")] if part.count("±") == 1 else [part]
    return every


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, text[start:])]


def _is_enclosed(text: str) -> bool:
    """Whether the first character is a bracket that the last one closes."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return at > 0 and at == len(text) - 1
    return False


TOKEN = re.compile(
    r"\\frac|√(?:\[[2-9]\])?|[-+*/^%()π]"
    r"|[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2}(?![0-9A-Za-z.]))?"
    r"|\s?[A-Za-z]+|\s"
)
_ABBREVIATED = "sq|mm|cm|km|mi|ft|in|yd|mg|kg|oz|lbs?|ml|mL|hrs?|mins?|secs?|mph|kph"
_WORD = rf"(?:{_ABBREVIATED}|[mgshlL]|[A-Za-z]{{3,}})(?:\^[23])?"
# What may follow a number without changing it. Short words count only where they are units: 2x and 2 xy are no numbers.
UNIT = re.compile(rf"\s?%|(?:(?:{_ABBREVIATED})(?:\^[23])?|\s{_WORD})(?:(?:\s?/\s?|\s|\*)(?:{_WORD}|an?|of|to|by|on|at))*")
NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|half|halves|thirds|squared|cubed|plus|minus|times|over)", re.IGNORECASE
)


def _number(text: str) -> tuple | None:
    """Pairs of a surd that is a number with or without a unit, by recursive descent; None if the text is none.

    number  = ["-"] product {("+" | "-") product}      of unlike terms: 1 + sqrt(2), but not 16 - 3
    product = atom {["*"] atom} ["/" atom]             with at most one rational factor
    atom    = decimal | mixed number | "π" | "√" atom | "\\frac" atom atom | "(" number ")"
    """
    text = text.replace("{", "(").replace("}", ")")
    tokens = TOKEN.findall(text)
    if "".join(tokens) != text:
        return None
    stack = [token for token in reversed(tokens) if not token.isspace()]
    try:
        value = _sum(stack)
    except UnreadableError:
        return None
    unit = "".join(reversed(stack))
    if unit and (not UNIT.fullmatch(unit) or NO_UNIT.search(unit)):
        return None
    return tuple(sorted(value.items()))


def _sum(stack: list[str]) -> Surd:
    total: Surd = {}
    sign = stack.pop() if stack and stack[-1] in "+-" else "+"
    while True:
        for radicand, coefficient in _product(stack).items():
            if radicand in total:
                raise UnreadableError("like terms")
            total[radicand] = -coefficient if sign == "-" else coefficient
        if not stack or stack[-1] not in "+-":
            return total
        sign = stack.pop()


def _product(stack: list[str]) -> Surd:
    value = _atom(stack)
    while stack and stack[-1][0] in "*√(\\π":
        if stack[-1] == "*":
            stack.pop()
        value = _times(value, _atom(stack))
    if stack and stack[-1] == "/":
        stack.pop()
        value = _over(value, _atom(stack))
    return value


def _atom(stack: list[str]) -> Surd:
    token = stack.pop() if stack else ""
    if token.startswith("√"):
        return _root(_atom(stack), int(token[2:3] or 2))
    if token == "π":
        return {(1, 1): Fraction(1)}
    if token == "\\frac":
        return _over(_atom(stack), _atom(stack))
    if token == "(":
        value = _sum(stack)
        if not stack or stack.pop() != ")":
            raise UnreadableError("unbalanced")
        return value
    if not token or token[0] not in ".0123456789":
        raise UnreadableError(token)
    number = Fraction(token.replace(",", ""))
    if token.isdigit() and stack and stack[-1] == "\\frac":  # a mixed number if the fraction is rational
        value = _atom(stack)
        return _rational(number + value.get(ONE, 0)) if value.keys() <= {ONE} else _times(_rational(number), value)
    if token.isdigit() and len(stack) > 2 and stack[-1].isdigit() and stack[-2] == "/" and stack[-3].isdigit():
        above, _, below = stack.pop(), stack.pop(), stack.pop()
        return _rational(number + _over(_rational(Fraction(above)), _rational(Fraction(below))).get(ONE, 0))
    return _rational(number)


def _rational(number: Fraction) -> Surd:
    return {ONE: number} if number else {}


def _times(a: Surd, b: Surd) -> Surd:
    if min(len(a), len(b)) != 1 or (a.keys() | b.keys()) == {ONE}:
        raise UnreadableError("arithmetic left undone")
    value: Surd = {}
    for (p, m), x in a.items():
        for (q, n), y in b.items():
            common = math.gcd(p, q)
            value[p * q // common**2, m + n] = x * y * common  # one of the two has one term, so none comes twice
    return value


def _over(a: Surd, b: Surd) -> Surd:
    if len(b) != 1:
        raise UnreadableError("a denominator of none or several terms")
    [((q, n), y)] = b.items()
    value: Surd = {}
    for (p, m), x in a.items():
        common = math.gcd(p, q)
        value[p * q // common**2, m - n] = x * common / (y * q)  # 1 / sqrt(q) = sqrt(q) / q
    return value


def _root(value: Surd, degree: int) -> Surd:
    """A square root, or a root of higher degree that is rational."""
    number = value.get(ONE, Fraction(0))
    radicand, outside = number.numerator * number.denominator, Fraction(1, number.denominator)  # sqrt(p/q) = sqrt(pq) / q
    if not value.keys() <= {ONE} or abs(radicand) > LARGEST_RADICAND or (radicand < 0 and degree % 2 == 0):
        raise UnreadableError("not the root of a small rational number")
    if degree > 2:
        above, below = (round(part ** (1 / degree)) for part in (abs(number.numerator), number.denominator))
        if Fraction(above, below) ** degree != abs(number):
            raise UnreadableError("an irrational root")
        return _rational(Fraction(above, below) * (-1 if number < 0 else 1))
    factor = 2
    while factor**2 <= radicand:
        while radicand % factor**2 == 0:
            radicand //= factor**2
            outside *= factor
        factor += 1
    return {(radicand, 0): outside} if radicand else {}
