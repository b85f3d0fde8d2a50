"""Parses numbers in words, and units after numbers.

A unit has a kind and a size, and may have a second kind that it is divided by, as in "miles per hour". The size counts
the smallest unit of the kind, so that 2 hours equal 120 minutes. A noun that is not a unit of measure is its own kind:
18 eggs do not equal 18 apples.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from rlhf.rewards.expressions import each

TABLES = {  # kind -> names and size of its units
    "length": "mm millimeter millimetre 1, cm centimeter centimetre 10, m meter metre 1000"
    ", km kilometer kilometre 1000000, in inch 25.4, ft foot 304.8, yd yard 914.4, mi mile 1609344",
    "mass": "mg milligram 1, g gram 1000, kg kilogram kilo 1000000"
    ", oz ounce 28349.523125, lb pound 453592.37, ton 907184740",
    "time": "s sec second 1, min minute 60, h hr hour 3600, day 86400, week wk 604800",
    "months": "month 1, yr year 12, decade 120, century 1200",
    "volume": "ml milliliter millilitre 1, l liter litre 1000",
    "cups": "cup 1, pint 2, qt quart 4, gal gallon 16",
    "spoons": "teaspoon tsp 1, tablespoon tbsp 3",
    "money": "cent ¢ 1, dollar $ usd 100",
    "percent": "% percent percentage pct 1",
    "degree": "° degree 1",
    "radian": "rad radian 1",
    "euro": "€ euro eur 1",
    "sterling": "£ gbp 1",
    "yen": "¥ yen 1",
    "rupee": "₹ rs rupee 1",
    "people": "people person 1",
}


def _measures() -> Iterator[tuple[str, tuple[str, Fraction]]]:
    for kind, table in TABLES.items():
        for entry in table.split(", "):
            *names, size = entry.split()
            yield from ((name, (kind, Fraction(size))) for name in names)


MEASURES = dict(_measures())  # name -> kind and size
PLURALS = {
    "feet": "foot",
    "inches": "inch",
    "centuries": "century",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
}
SPEEDS = {"mph": ("mile", "hour"), "kph": ("km", "hour"), "kmh": ("km", "hour")}
DIRECT = each("mm cm km mi ft in yd mg kg oz lb lbs ml mL hr hrs min mins sec secs mph kph sq ° % $ ¢ € £ ¥ ₹")
SHORT = DIRECT | each("m g s h l L")  # the added ones are units only after a space, because 5m may be a product
CURRENCY = re.compile(
    r"^([-+]?)\s?(?:(?:US|CA|AU|NZ|HK)(?=\$))?(\$|€|£|¥|₹|USD|EUR|GBP|Rs\.?)\s?([-+]?)(?=[\s0-9.(\\])"
)

# Words after a number that are not a counted noun. Fractions ("3 quarters", "7 tenths") would change its value.
NO_NOUN = each(
    "half halves third thirds quarter quarters fourths fifths sixths sevenths eighths ninths tenths elevenths twelfths"
    " hundredths thousandths millionths tens hundreds thousands millions billions dozens scores pairs"
    " plus minus times less is was does has equals makes gives means this its thus yes perhaps always errors"
    " cubes squares powers digits not no or and but than more fewer over about maybe wrong only squared cubed"
    " ones twos threes fours fives sixes sevens eights nines scores"
)
LINKS = each(
    "of in for from on at to by left remaining total altogether more old long tall wide high deep each away ago"
)
PER = frozenset(("per", "/", "a", "an", "each", "every"))
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SMALL = {word: n for n, word in enumerate(TEENS.split())} | {word: 10 * n for n, word in enumerate(TENS.split(), 2)}


DEGREES = re.compile(r"°\s?([CF])\b")


class Unit(NamedTuple):
    """The unit of a number.

    kind is for example "length^2" or "noun egg"; "" is no unit. per is the kind that it is divided by; "" is none.
    """

    kind: str
    size: Fraction = Fraction(1)
    per: str = ""
    per_size: Fraction = Fraction(1)


BARE = Unit("")


def ratio(a: Unit, b: Unit) -> Fraction | None:
    """Return how many units b one unit a is; None if their kinds differ.

    A unit that only one of them has is ignored. For money, a missing `per` is ignored, too.
    """
    if a.kind and b.kind and bool(a.per) != bool(b.per) and a.kind != "money":
        return None
    size = Fraction(1)
    for one, other, value in ((a.kind, b.kind, a.size / b.size), (a.per, b.per, b.per_size / a.per_size)):
        if one and other:
            if one != other:
                return None
            size *= value
    return size


def unit(text: str, spaced: bool) -> Unit | None:
    """Return the unit that a text after a number names; None if it is not a unit. spaced: a space precedes the text."""
    text = re.sub(
        r"\^\s?\{?\s?([23])\s?\}?", r"^\1", text.replace("{", "").replace("}", "") if "^" not in text else text
    )
    words = re.findall(r"[A-Za-z]+(?:-[A-Za-z]+)*\.?|\^[23]|[/%°$¢€£¥₹]|\S", DEGREES.sub(_scale, text))
    if not words or len(words) > 10:
        return None
    first = words[0].rstrip(".")
    if not spaced and first not in DIRECT and first not in ("celsius", "fahrenheit"):
        return None
    per = next((at for at, word in enumerate(words) if at and word in PER and at + 1 < len(words)), len(words))
    above = _kind(words[:per])
    if above is None or per == len(words):
        return above
    below = _kind(words[per + 1 :], singular=True)
    return below and Unit(above.kind, above.size, below.kind, below.size)


def _kind(words: list[str], singular: bool = False) -> Unit | None:
    """Return the unit of words such as "square miles", "different ways" or "bags of rice"; None if it is not a unit."""
    words = [word.rstrip(".") for word in words]
    link = next((at for at, word in enumerate(words) if at and word in LINKS), len(words))
    head, rest = words[:link], words[link:]
    if any(word.lower() in NO_NOUN for word in head) or not all(re.fullmatch(r"[A-Za-z-]+", word) for word in rest):
        return None
    if any(word.lower() in NO_NOUN for word in rest if word not in LINKS):
        return None
    power = 1
    if head and head[-1] in ("^2", "^3"):
        power = int(head.pop()[1])
    if head and head[0].lower() in ("square", "sq", "cubic", "cu"):
        power = 2 if head.pop(0).lower().startswith("sq") else 3
    if not head:
        return None
    if head[-1] in SPEEDS:
        above, below = (MEASURES[name] for name in SPEEDS[head[-1]])
        return Unit(*above, *below)
    name = head[-1]
    if not all(re.fullmatch(r"[A-Za-z-]{2,}", word) and word.lower() not in MEASURES for word in head[:-1]):
        return None  # 5 ft 6 in
    if name.lower() in ("unit", "units"):
        return BARE
    measure = MEASURES.get(name) or (MEASURES.get(_singular(name.lower())) if len(name) > 1 else None)
    if measure and (len(name) > 2 or name in SHORT or not name.isalpha()):
        kind, size = measure
        return Unit(kind if power == 1 else f"{kind}^{power}", size**power)
    if name.lower() in ("celsius", "fahrenheit"):
        return Unit(name.lower())
    plural = name.lower() in PLURALS or (len(name) > 3 and re.search(r"[^siu]s$", name))
    if not plural and not singular:
        return None
    return Unit(f"noun {_singular(name.lower())}") if re.fullmatch(r"[A-Za-z-]+", name) else None


def _scale(match: re.Match[str]) -> str:
    return " celsius" if match[1] == "C" else " fahrenheit"


def _singular(word: str) -> str:
    if word in PLURALS:
        return PLURALS[word]
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if re.search(r"(?:[sxz]|ch|sh)es$", word) else word.removesuffix("s")


def scaled(text: str) -> tuple[int, str]:
    """Return the factor of a leading word such as "million" (1 without one), and the text after it."""
    first, _, rest = text.partition(" ")
    factor = SCALES.get(first.lower(), 0)
    return (factor, rest) if factor else (1, text)


def in_words(text: str) -> Fraction | None:
    """Return the number that a text such as "seventy-two", "one hundred five" or "3rd" means; None if it means none."""
    place = re.fullmatch(r"([0-9]+)\s?(?:\^\s?\{?\s?)?(?:st|nd|rd|th)\s?\}?", text)
    if place:
        return Fraction(place[1])
    total = part = 0
    words = re.split(r"[\s-]+", text.lower().strip())
    if not 0 < len(words) <= 12:
        return None
    for word in words:
        if word in SMALL:
            part += SMALL[word]
        elif word == "hundred" and part:
            part *= 100
        elif word in SCALES and part:
            total, part = total + part * SCALES[word], 0
        else:
            return None
    return Fraction(total + part)
