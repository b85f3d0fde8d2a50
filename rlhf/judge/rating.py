"""The rating in a judge's answer."""

import re

NUMBER = r"([0-9]{1,15}(?:\.[0-9]{0,15})?)"
MARKS = re.compile(rf"\[\[{NUMBER}\]\]"), re.compile(rf"\[{NUMBER}\]")


def rating(text: str) -> float | None:
    """Return the first number written as [[7]] in a judge's answer, else the first written as [7], else None.

    This is the rule of FastChat's MT-Bench. A number with a sign, with text beside it, or with more than 15 digits is
    no rating.
    """
    found = next((match for mark in MARKS if (match := mark.search(text))), None)
    return float(found[1]) if found else None
