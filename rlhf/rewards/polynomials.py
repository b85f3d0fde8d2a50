"""Exact arithmetic: quotients of sums of products of rational powers, in a normal form.

A sum maps each product to its rational coefficient. A product is a set of (atom, exponent). An atom is a prime number,
a symbol, a function with its argument, a power whose exponent contains a symbol, or a sum under a root. With prime
atoms, roots are comparable: sqrt(12) = 2 * 3^(1/2). Exponents of primes are in [0, 1), because their whole part is in
the coefficient. i^2 is -1. Products are multiplied out. So two sums are equal if their dicts are equal, and two
quotients if their cross products are.

Roots of primes are independent over the rational numbers, so unequal values never compare equal. Some equal values with
nested roots, logarithms and similar functions compare unequal.
"""

import math
from collections.abc import Hashable
from fractions import Fraction
from typing import NamedTuple

WORK = 1000  # largest number of products of two terms in one comparison: about 10 ms
MOST_BITS = 4000  # largest number of bits of a numerator or denominator
MOST_BITS_OF_ROOT = 128  # largest number of bits of an integer that is factored
PRIMES = [n for n in range(2, 1000) if all(n % d for d in range(2, math.isqrt(n) + 1))]

Product = frozenset[tuple[Hashable, Fraction]]
Sum = dict[Product, Fraction]
NOTHING: Product = frozenset()
UNIT: Sum = {NOTHING: Fraction(1)}


class UnreadableError(ValueError):
    """A text is not a known expression, or takes too much work. The answer is then compared as text."""


class Quotient(NamedTuple):
    """A sum divided by another sum, which has several terms or is 1."""

    above: Sum
    below: Sum

    @property
    def rational(self) -> Fraction | None:
        """The value if it is a rational number."""
        if self.below != UNIT or not self.above.keys() <= {NOTHING}:
            return None
        return self.above.get(NOTHING, Fraction(0))

    @property
    def key(self) -> Hashable:
        """Equal keys mean equal values. Without division by a sum, equal values have equal keys."""
        return frozenset(self.above.items()), frozenset(self.below.items())


def number(value: Fraction | int) -> Quotient:
    return Quotient({NOTHING: Fraction(value)} if value else {}, UNIT)


def symbol(atom: Hashable) -> Quotient:
    return Quotient({frozenset({(atom, Fraction(1))}): Fraction(1)}, UNIT)


class Algebra:
    """Operations on quotients. They share one limit of work, and raise UnreadableError above it."""

    def __init__(self) -> None:
        self.work = WORK

    def equal(self, a: Quotient, b: Quotient) -> bool:
        if a.key == b.key:
            return True
        if a.below == b.below == UNIT:
            return False
        return self.times_sums(a.above, b.below) == self.times_sums(b.above, a.below)

    def plus(self, a: Quotient, b: Quotient) -> Quotient:
        if a.below == b.below:
            return self._reduced(self._plus_sums(a.above, b.above), a.below)
        above = self._plus_sums(self.times_sums(a.above, b.below), self.times_sums(b.above, a.below))
        return self._reduced(above, self.times_sums(a.below, b.below))

    def minus(self, a: Quotient, b: Quotient) -> Quotient:
        return self.plus(a, self.negative(b))

    def negative(self, a: Quotient) -> Quotient:
        return Quotient({product: -c for product, c in a.above.items()}, a.below)

    def times(self, a: Quotient, b: Quotient) -> Quotient:
        return self._reduced(self.times_sums(a.above, b.above), self.times_sums(a.below, b.below))

    def over(self, a: Quotient, b: Quotient) -> Quotient:
        return self._reduced(self.times_sums(a.above, b.below), self.times_sums(a.below, b.above))

    def power(self, base: Quotient, exponent: Quotient) -> Quotient:
        rational = exponent.rational
        if rational is None:
            return self._symbolic_power(base, exponent)
        if rational.denominator == 1:
            return self._whole_power(base, rational.numerator)
        if rational < 0:
            return self.over(number(1), self.power(base, number(-rational)))
        return self.over(self._root(base.above, rational), self._root(base.below, rational))

    def absolute(self, value: Quotient) -> Quotient:
        rational = value.rational
        if rational is not None:
            return number(abs(rational))
        return symbol(("abs", frozenset({value.key, self.negative(value).key})))

    def times_sums(self, a: Sum, b: Sum) -> Sum:
        if a == UNIT or b == UNIT:
            return b if a == UNIT else a
        self.work -= len(a) * len(b)
        if self.work < 0:
            raise UnreadableError("too many terms")
        total: Sum = {}
        for p, x in a.items():
            for q, y in b.items():
                for product, c in self._times_products(p, q, x * y).items():
                    _add(total, product, c)
        return total

    def _times_products(self, p: Product, q: Product, coefficient: Fraction) -> Sum:
        if coefficient.numerator.bit_length() + coefficient.denominator.bit_length() > MOST_BITS:
            raise UnreadableError("too large")
        if not p or not q:
            return {p or q: coefficient}
        exponents = dict(p)
        for atom, exponent in q:
            exponents[atom] = exponents.get(atom, Fraction(0)) + exponent
        coefficient, product, roots = _normal(exponents, coefficient)
        value: Sum = {product: coefficient}
        for root in roots:  # sqrt(x + 1)^2 is x + 1 again
            value = self.times_sums(value, root)
        return value

    def _plus_sums(self, a: Sum, b: Sum) -> Sum:
        total = dict(a)
        for product, c in b.items():
            _add(total, product, c)
        return total

    def _reduced(self, above: Sum, below: Sum) -> Quotient:
        """Return above / below. A denominator of one term becomes negative exponents.

        Common factors are not cancelled, because comparisons do not need that.
        """
        if not below:
            raise UnreadableError("division by zero")
        if len(below) > 1 or below == UNIT:
            return Quotient(above, below)
        [(product, coefficient)] = below.items()
        inverse, kept, _ = _normal({atom: -exponent for atom, exponent in product}, 1 / coefficient)
        return Quotient(self.times_sums(above, {kept: inverse}), UNIT)

    def _whole_power(self, base: Quotient, exponent: int) -> Quotient:
        if exponent < 0:
            return self.over(number(1), self._whole_power(base, -exponent))
        largest = max((c.numerator.bit_length() + c.denominator.bit_length() for c in base.above.values()), default=0)
        if exponent > MOST_BITS or largest * exponent > MOST_BITS:
            raise UnreadableError("too large")
        if base.rational is not None:
            return number(base.rational**exponent)
        value = number(1)
        for bit in f"{exponent:b}":
            value = self.times(value, value)
            if bit == "1":
                value = self.times(value, base)
        return value

    def _root(self, base: Sum, exponent: Fraction) -> Quotient:
        """Return base to the power of a positive exponent that is not an integer."""
        if not base:
            return number(0)
        content, rest = _content(base)
        value = number(1)
        if len(rest) == 1:
            [(product, sign)] = rest.items()
            if sign < 0 and exponent.denominator == 2:
                value = self._whole_power(symbol("i"), exponent.numerator)
            elif sign < 0 and exponent.denominator % 2 == 0:
                raise UnreadableError("an even root of a negative number")
            elif sign < 0:
                value = number((-1) ** exponent.numerator)
            factors = _prime_factors(content.numerator) | {
                p: -n for p, n in _prime_factors(content.denominator).items()
            }
            for atom, n in product:
                if atom == "i":
                    raise UnreadableError("a root of i")
                if isinstance(atom, str) and atom not in "πe" and n != 1:  # sqrt(x^2) is not x
                    atom, n = ("sum", frozenset({(frozenset({(atom, n)}), Fraction(1))})), Fraction(1)
                factors[atom] = factors.get(atom, Fraction(0)) + n
        else:
            factors = _prime_factors(content.numerator) | {
                p: -n for p, n in _prime_factors(content.denominator).items()
            }
            factors[("sum", frozenset(rest.items()))] = Fraction(1)
        coefficient, product, roots = _normal({atom: n * exponent for atom, n in factors.items()}, Fraction(1))
        value = self.times(value, Quotient({product: coefficient}, UNIT))
        for root in roots:
            value = self.times(value, Quotient(root, UNIT))
        return value

    def _symbolic_power(self, base: Quotient, exponent: Quotient) -> Quotient:
        """Return base to the power of an exponent with symbols. 2^(n+1) is 2 * (2^n)^1.

        There is one atom per term of the exponent. The coefficient of the term is the exponent of its atom.
        """
        if exponent.below != UNIT or base.below != UNIT or not base.above:
            raise UnreadableError("a power of quotients")
        value = number(1)
        content, rest = _content(base.above)
        atoms: dict[Hashable, Fraction] = dict(_prime_factors(content.numerator))
        for prime, n in _prime_factors(content.denominator).items():
            atoms[prime] = -n
        if len(rest) > 1:
            atoms[("sum", frozenset(rest.items()))] = Fraction(1)
        else:
            [(product, sign)] = rest.items()
            atoms |= {atom: atoms.get(atom, Fraction(0)) + n for atom, n in product}
            if sign < 0:
                atoms[-1] = Fraction(1)
        for term, c in exponent.above.items():
            if term == NOTHING:
                value = self.times(value, self.power(base, number(c)))
                continue
            powers = frozenset((("power", atom, term), n * c) for atom, n in atoms.items())
            value = self.times(value, Quotient({powers: Fraction(1)}, UNIT))
        return value


def _add(total: Sum, product: Product, coefficient: Fraction) -> None:
    coefficient += total.get(product, 0)
    if coefficient:
        total[product] = coefficient
    else:
        total.pop(product, None)


def _normal(exponents: dict[Hashable, Fraction], coefficient: Fraction) -> tuple[Fraction, Product, list[Sum]]:
    """Return the coefficient and the product in normal form, and the sums whose roots have become whole powers."""
    kept, roots = [], []
    for atom, exponent in exponents.items():
        whole = math.floor(exponent)
        if abs(whole) > 1 and atom != "i" and not isinstance(atom, str) and abs(whole) * _bits(atom) > MOST_BITS:
            raise UnreadableError("too large")
        if isinstance(atom, int) and atom > 0 and whole:
            coefficient *= Fraction(atom) ** whole
            exponent -= whole
        elif atom == "i":
            coefficient *= -1 if exponent % 4 in (2, 3) else 1
            exponent %= 2
        elif isinstance(atom, tuple) and atom[0] == "sum" and whole > 0:
            roots += [dict(atom[1])] * whole
            exponent -= whole
        if exponent:
            kept.append((atom, exponent))
    return coefficient, frozenset(kept), roots


def _bits(atom: Hashable) -> int:
    """Return the bits of a prime; 100 for other atoms, as an estimate of the work for a power of a sum."""
    return atom.bit_length() if isinstance(atom, int) else 100


def _content(value: Sum) -> tuple[Fraction, Sum]:
    """Return the largest positive rational factor of a sum, and the sum divided by it."""
    above = math.gcd(*(c.numerator for c in value.values()))
    below = math.lcm(*(c.denominator for c in value.values()))
    content = Fraction(above, below)
    return content, {product: c / content for product, c in value.items()}


def _prime_factors(value: int) -> dict[Hashable, Fraction]:
    """Return prime -> exponent. A factor without divisors below 1000 counts as prime.

    So some equal roots may compare unequal, but never the reverse.
    """
    if value.bit_length() > MOST_BITS_OF_ROOT:
        raise UnreadableError("the root of a large number")
    factors: dict[Hashable, Fraction] = {}
    for prime in PRIMES:
        if prime * prime > value:
            break
        while value % prime == 0:
            value //= prime
            factors[prime] = factors.get(prime, Fraction(0)) + 1
    root = math.isqrt(value)
    if value > 1 and root * root == value:
        factors[root] = factors.get(root, Fraction(0)) + 2
    elif value > 1:
        factors[value] = factors.get(value, Fraction(0)) + 1
    return factors
