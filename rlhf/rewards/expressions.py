r"""Parses expressions by recursive descent into quotients of sums (polynomials.py). Nothing is evaluated as code.

    sum     = ["-" | "+"] product {("+" | "-") product}
    product = power {["*"] power} ["/" power {"*" power}]     only one "/": 1/2/3 is text
    power   = atom {"!"} ["^" power]
    atom    = decimal | mixed number | symbol | "√" atom | "\frac" atom atom | function power
            | "|" sum "|" | "(" sum ")" | "{" sum "}"

The text must have the spelling of spelling.py.
"""

import math
import re
from collections.abc import Hashable
from fractions import Fraction

from rlhf.rewards.polynomials import Algebra, Quotient, UnreadableError, number, symbol


def each(names: str) -> frozenset[str]:
    return frozenset(names.split())


DEEPEST = 30  # largest nesting of brackets, roots and powers
LARGEST_FACTORIAL = 300
FUNCTIONS = each(
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln lg exp gcd lcm arg det max min Gamma Re Im"
)
SYMBOLS = each(  # LaTeX commands that are letters
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon"
    " phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell hbar"
)
OPENING = {"(": ")", "{": "}", "|": "|"}
NUMBERS = {"π", "e", "i", "∞"}  # symbols that are numbers
CALLED = "fghFGP"  # before a bracket, these letters are functions, not factors

TOKEN = re.compile(
    r"\\[A-Za-z]+|[-+*/^()π√∞|!{}\[\]]"
    r"|[0-9]*\.[0-9]*\\overline\s?\{?[0-9]+\}?"
    r"|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z.]))?"
    r"|[A-Za-z]+|_|'|,|\s"
)
REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\s?\{?([0-9]+)\}?")


class Expression:
    """Parses a text and computes its value. Raises UnreadableError unless the whole text is one expression.

    undone: the sorted tokens of the text if it contains a sum or product of plain numbers that is not evaluated, such
    as `3 * 6`; else None. Such a text equals only texts with the same tokens. Powers, factorials and mixed numbers
    (also `2 + 1/3`) count as evaluated.
    """

    def __init__(self, text: str, algebra: Algebra):
        tokens = TOKEN.findall(text)
        if "".join(tokens) != text:
            raise UnreadableError("other characters")
        self.algebra = algebra
        self.stack = [" " if token.isspace() else token for token in reversed(tokens)]
        self.depth = 0
        self.inside_bars = self.letters = self.left = self.spaced = self.behind_factorial = False
        self.value = self._sum()
        if self._next():
            raise UnreadableError(self._next())
        self.undone = (
            tuple(sorted(token for token in tokens if not token.isspace())) if self.left and not self.letters else None
        )

    def _next(self) -> str:
        """Return the next token that is not a space, without removing it; "" at the end.

        This sets self.spaced if there is a space before the token.
        """
        while self.stack and self.stack[-1] == " ":
            self.stack.pop()
            self.spaced = True
        return self.stack[-1] if self.stack else ""

    def _take(self, expected: str = "") -> str:
        token = self._next()
        if not token or (expected and token != expected):
            raise UnreadableError(f"{expected or 'something'} is missing")
        self.spaced = False
        self.behind_factorial = token == "!"
        return self.stack.pop()

    def _sum(self) -> Quotient:
        sign = self._take() if self._next() in ("+", "-") else "+"
        terms = []
        while True:
            term = self._product()
            terms.append(self.algebra.negative(term) if sign == "-" else term)
            if self._next() not in ("+", "-"):
                break
            sign = self._take()
        total = number(0)
        for term in terms:
            total = self.algebra.plus(total, term)
        if len(total.above) < sum(len(term.above) for term in terms) and not _is_mixed(terms):
            self.left = True  # like terms that were not added
        return total

    def _product(self) -> Quotient:
        value, kind = self._power(signed=True)
        kinds = [kind]
        divided = False
        while True:
            token = self._next()
            if token == "/" and not divided:
                divided = True
                self._take()
                below, kind = self._power(signed=True)
                value = self.algebra.over(value, below)
                juxtaposed = kind == "number"  # 3/4 x is 3x/4, but 1/2x is ambiguous
                continue
            if token == "*":
                self._take()
            elif token[:1].isdigit() and self.behind_factorial:  # 2!3!
                pass
            elif not self._starts_factor(token) or (divided and not (juxtaposed and self.spaced)):
                break
            factor, kind = self._power(signed=token == "*")
            kinds.append(kind)
            value = self.algebra.times(value, factor)
        if kinds.count("number") > 1 and "power" not in kinds:
            self.left = True
        return value

    def _starts_factor(self, token: str) -> bool:
        return bool(token) and (token[0].isalpha() or token[0] in "\\√∞({" or (token == "|" and not self.inside_bars))

    def _power(self, signed: bool = False) -> tuple[Quotient, str]:
        """Return a value and its kind: "number" (rational), "power" (rational result of a power) or "other"."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise UnreadableError("too deep")
        if signed and self._next() == "-":
            self._take()
            value, kind = self._power()
            self.depth -= 1
            return self.algebra.negative(value), kind
        value, kind = self._atom(), "number"
        while self._next() == "!":
            self._take()
            value, kind = _factorial(value), "power"
        if self._next() == "^":
            self._take()
            exponent, _ = self._power(signed=True)
            value, kind = self.algebra.power(value, exponent), "power"
        self.depth -= 1
        return value, kind if value.rational is not None else "other"

    def _atom(self) -> Quotient:
        token = self._take()
        if token in OPENING:
            outside, self.inside_bars = self.inside_bars, token == "|"
            value = self._sum()
            self._take(OPENING[token])
            self.inside_bars = outside
            return self.algebra.absolute(value) if token == "|" else value
        if token == "√":
            degree = number(2)
            if self._next() == "[":
                self._take()
                degree = self._sum()
                self._take("]")
            return self.algebra.power(self._shallow(), self.algebra.over(number(1), degree))
        if token == "\\frac":
            above = self._shallow()
            return self.algebra.over(above, self._shallow())
        if token == "\\binom":
            return _binomial(self._shallow(), self._shallow())
        if token[0].isdigit() or token[0] == ".":
            return self._number(token)
        return self._symbol(token)

    def _shallow(self) -> Quotient:
        """Return the next atom, as one level of nesting."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise UnreadableError("too deep")
        value = self._atom()
        self.depth -= 1
        return value

    def _number(self, token: str) -> Quotient:
        repeating = REPEATING.fullmatch(token)
        if repeating:
            whole, head, tail = repeating.groups()
            nines = (10 ** len(tail) - 1) * 10 ** len(head)
            return number(Fraction(int((whole or "0") + head)) / 10 ** len(head) + Fraction(int(tail), nines))
        value = Fraction(token)
        if self.stack and self.stack[-1] == "_" and token.isdigit():
            self._take()
            return symbol(("base", token, self._subscript()))
        part: Fraction | None = None
        if token.isdigit() and self._next() == "\\frac":  # a mixed number if the fraction is rational
            before = list(self.stack)
            part = self._atom().rational
            if part is None:
                self.stack = before
        elif (
            token.isdigit()
            and self.spaced
            and self._next().isdigit()
            and self.stack[-2:-1] == ["/"]
            and self.stack[-3:-2] != [" "]
        ):
            above, _, below = self._take(), self._take(), self._take()
            part = Fraction(int(above), int(below)) if below.isdigit() and int(below) else Fraction(-1)
        if part is not None and not 0 < part < 1:
            raise UnreadableError("no mixed number")
        return number(value + (part or 0))

    def _symbol(self, token: str) -> Quotient:
        name = token.removeprefix("\\")
        if name in FUNCTIONS and not (token == name and name in ("Re", "Im")):
            return self._function(name)
        if token[0] == "\\":
            if name in ("overline", "vec", "angle", "triangle", "hat"):
                name = f"{name} {self._subscript()}"
            elif name not in SYMBOLS:
                raise UnreadableError(token)
        elif len(token) > 1:
            if len(token) > 3 or not (token.islower() or token.isupper()):
                raise UnreadableError("a word")
            if token.islower():  # abc is a product; a name in capitals, such as ABC, is one symbol
                self.stack.append(token[1:])
                name = token[0]
        elif token not in NUMBERS and not token.isalpha():
            raise UnreadableError(token)
        if self.stack and self.stack[-1] == "_":
            self._take()
            name += f"_{self._subscript()}"
        while self.stack and self.stack[-1] == "'":
            name += self._take()
        self.letters = self.letters or name not in NUMBERS
        if name[0] in CALLED and self.stack and self.stack[-1] == "(":
            return symbol((name, self._shallow().key))
        return symbol(name)

    def _subscript(self) -> str:
        """Return a subscript: one token, or the text of a group in braces."""
        token = self._take()
        if token != "{":
            return token
        parts: list[str] = []
        depth = 1
        while True:
            token = self._take()
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return "".join(parts)
            parts.append(token)

    def _function(self, name: str) -> Quotient:
        exponent, base = number(1), ""
        for _ in range(2):
            if self._next() == "^":
                self._take()
                exponent, _kind = self._power(signed=True)
            elif self._next() == "_":
                self._take()
                base = self._subscript()
        if exponent.rational == -1 and name in ("sin", "cos", "tan"):
            name, exponent = f"arc{name}", number(1)
        if self._next() in OPENING:
            argument = self._shallow()
        else:
            argument, _kind = self._power(signed=True)
            while self._starts_factor(self._next()) and self._next().removeprefix("\\") not in FUNCTIONS:  # sin 2x
                factor, _kind = self._power()
                argument = self.algebra.times(argument, factor)
        return self.algebra.power(self._applied(name, base, argument), exponent)

    def _applied(self, name: str, base: str, argument: Quotient) -> Quotient:
        """Return the value of a function. tan, cot, sec and csc become quotients of sin and cos, others a symbol."""
        if name == "exp":
            return self.algebra.power(symbol("e"), argument)
        base, name = ("10", "log") if name == "lg" else (base, name)
        key: Hashable = argument.key
        sine, cosine = symbol(("sin", "", key)), symbol(("cos", "", key))
        quotients = {"tan": (sine, cosine), "cot": (cosine, sine), "sec": (number(1), cosine), "csc": (number(1), sine)}
        if name in quotients:
            return self.algebra.over(*quotients[name])
        return symbol((name, base, key))


def _is_mixed(terms: list[Quotient]) -> bool:
    """Return whether a sum consists of a whole number and a proper fraction of the same sign."""
    if len(terms) != 2:
        return False
    whole, part = terms[0].rational or Fraction(0), terms[1].rational or Fraction(0)
    return whole.denominator == 1 and 0 < abs(part) < 1 and whole * part > 0


def _factorial(value: Quotient) -> Quotient:
    n = value.rational
    if n is None:
        return symbol(("factorial", value.key))
    if n.denominator != 1 or not 0 <= n <= LARGEST_FACTORIAL:
        raise UnreadableError("no small factorial")
    return number(math.factorial(n.numerator))


def _binomial(above: Quotient, below: Quotient) -> Quotient:
    n, k = above.rational, below.rational
    if n is None or k is None:
        return symbol(("binomial", above.key, below.key))
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= LARGEST_FACTORIAL:
        raise UnreadableError("no small binomial coefficient")
    return number(math.comb(n.numerator, k.numerator))
