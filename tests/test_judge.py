"""The client of a judge against a real HTTP server, and the rating in a judge's answer."""

import pytest

from rlhf.judge.rating import rating


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[7.5]]", 7.5),
        ("[[8.]] of 10", 8.0),
        ("[3] and then [[9]]", 9.0),  # the doubled brackets come first
        ("[[2]], no: [[9]]", 2.0),  # the first of two
        ("my rating is [6]", 6.0),
        ("see [1], [2]", 1.0),
        ("[[-3]]", None),
        ("[[7/10]]", None),
        ("[[7,5]]", None),
        ("[[ten]]", None),
        ("[[" + "9" * 5000 + "]]", None),
        ("[[\u0667]]", None),  # an Arabic digit
        ("7", None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_rating(text: str, found: float | None):
    assert rating(text) == found
