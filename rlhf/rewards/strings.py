"""Functions on the text of an answer: they split it outside brackets, and normalize it for a comparison as text."""

import re
from collections.abc import Iterator

from rlhf.rewards.statements import Words

LONGEST = 300  # largest number of characters of an answer that is parsed; a longer one equals only the same text
SIGNS = re.compile(r"[=≠<>≤≥∈≈⇒]")
MONTH = re.compile(
    r"\b(?:january|february|march|april|may|june|july|august|september|october|november|december)\b", re.IGNORECASE
)


def divided(text: str) -> Iterator[tuple[str, str, bool]]:
    """Yield all ways to split a text into an expression and a unit after it, from the longest unit to no unit."""
    for match in list(re.finditer(r"(?<=[0-9)}π.!a-z√])(\s?)\*?\s?(?=[A-Za-z%°$¢€£¥₹])", text))[:8]:
        head, tail = text[: match.start()], text[match.end() :]
        if not re.search(r"[A-Za-z]$", head) or match[1]:
            yield head, tail, bool(match[1])
    yield text, "", True


def words(text: str) -> Words:
    """Return a text as Words, without spaces and in lower case. The words of a date are sorted."""
    if len(text) <= LONGEST and MONTH.search(text) and re.search(r"[0-9]", text):
        return Words(
            " ".join(
                sorted(re.findall(r"\w+", re.sub(r"(?<=[0-9])(?:st|nd|rd|th)\b|\b(?:of|the)\b", "", text.casefold())))
            )
        )
    text = squeezed(text).casefold()
    return Words(text[1:-1] if enclosed(text) and text[0] in "({" else text)


def squeezed(text: str) -> str:
    """Remove spaces, and the braces around single subscripts and exponents."""
    text = re.sub(r"\s", "", text) if len(text) <= LONGEST else text
    return re.sub(r"([_^])\{(\w+)\}", r"\1\2", text) if len(text) <= LONGEST else text


def split(text: str, separator: str) -> list[str]:
    """Split a text at separators outside brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{⦃") - (character in ")]}⦄")
        if character == separator and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, text[start:])]


def split_signs(text: str) -> tuple[list[str], list[str]]:
    """Split a relation at signs outside brackets. Return its sides, and the signs between them."""
    sides, signs, depth, start = [], [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{⦃") - (character in ")]}⦄")
        if depth == 0 and SIGNS.match(character):
            sides.append(text[start:at].strip())
            signs.append(character)
            start = at + 1
    return [*sides, text[start:].strip()], signs


def enclosed(text: str) -> bool:
    """Return whether the first character is a bracket that the last character closes."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "([{⦃") - (character in ")]}⦄")
        if depth == 0:
            return at > 0 and at == len(text) - 1
    return False
