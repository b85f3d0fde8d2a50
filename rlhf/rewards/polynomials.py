"""Exact arithmetic of answers: quotients of sums of products of rational powers, in a normal form.

A sum maps each product to its rational coefficient. A product is a set of (atom, exponent): an atom is a prime number (so that square roots
of different numbers are comparable: sqrt(12) = 2 * 3^(1/2)), a symbol, a function of something, a power whose exponent holds a symbol, or
a sum under a root. Exponents of primes lie in [0, 1), for their whole part is in the coefficient; i^2 is -1. Products are multiplied out,
so two sums are equal if they are the same dict, and two quotients if what remains after cross-multiplication is empty. Roots of primes are
independent over the rational numbers, so nothing unequal passes; what is missed is between nested roots, logarithms and the like.
"""

import math
from collections.abc import Hashable
from fractions import Fraction
from typing import NamedTuple

WORK = 1000  # products of two terms that one comparison may cost: about 10 ms
MOST_BITS = 4000  # of a numerator or denominator
MOST_BITS_OF_ROOT = 128  # of what is taken apart into primes
PRIMES = [n for n in range(2, 1000) if all(n % d for d in range(2, math.isqrt(n) + 1))]

Product = frozenset[tuple[Hashable, Fraction]]
Sum = dict[Product, Fraction]
NOTHING: Product = frozenset()
UNIT: Sum = {NOTHING: Fraction(1)}


class UnreadableError(ValueError):
    """No expression that we read, or one that costs too much: the answer is compared as text."""


class Quotient(NamedTuple):
    """A sum over another one, which has several terms or is 1."""

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
        """Equal keys are equal values (the reverse holds where nothing is divided by a sum)."""
        return frozenset(self.above.items()), frozenset(self.below.items())


def number(value: Fraction | int) -> Quotient:
    return Quotient({NOTHING: Fraction(value)} if value else {}, UNIT)


def symbol(atom: Hashable) -> Quotient:
    return Quotient({frozenset({(atom, Fraction(1))}): Fraction(1)}, UNIT)


class Algebra:
    """Operations on quotients that share one limit of work; past it they raise UnreadableError."""

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
        """A denominator of one term becomes negative exponents. Common factors stay: comparisons do not need them gone."""
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
        """base to a positive exponent that is no whole number."""
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
            factors = _prime_factors(content.numerator) | {p: -n for p, n in _prime_factors(content.denominator).items()}
            for atom, n in product:
                if atom == "i":
                    raise UnreadableError("a root of i")
                if isinstance(atom, str) and atom not in "πe" and n != 1:  # sqrt(x^2) is not x
                    atom, n = ("sum", frozenset({(frozenset({(atom, n)}), Fraction(1))})), Fraction(1)
                factors[atom] = factors.get(atom, Fraction(0)) + n
        else:
            factors = _prime_factors(content.numerator) | {p: -n for p, n in _prime_factors(content.denominator).items()}
            factors[("sum", frozenset(rest.items()))] = Fraction(1)
        coefficient, product, roots = _normal({atom: n * exponent for atom, n in factors.items()}, Fraction(1))
        value = self.times(value, Quotient({product: coefficient}, UNIT))
        for root in roots:
            value = self.times(value, Quotient(root, UNIT))
        return value

    def _symbolic_power(self, base: Quotient, exponent: Quotient) -> Quotient:
        """2^(n+1) is 2 * (2^n)^1: one atom for each term of the exponent, whose coefficient is the exponent of that atom."""
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
    """Coefficient and product in normal form, and the sums that came out from under their roots."""
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
    """Of a prime; a sum that comes out from under its root that often costs as much as a number of 100 bits."""
    return atom.bit_length() if isinstance(atom, int) else 100


def _content(value: Sum) -> tuple[Fraction, Sum]:
    """The largest positive rational factor, and what remains without it."""
    above = math.gcd(*(c.numerator for c in value.values()))
    below = math.lcm(*(c.denominator for c in value.values()))
    content = Fraction(above, below)
    return content, {product: c / content for product, c in value.items()}


def _prime_factors(value: int) -> dict[Hashable, Fraction]:
    """Prime -> how often it divides. A factor without divisors below 1000 counts as prime: what that misses is never taken for equal."""
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
