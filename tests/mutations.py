"""Strategies of hypothesis that draw damaged and wrong files, and a check of the call that reads them."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rlhf.errors import UserError

LIMIT = 30  # seconds that one example may take, also on a busy machine
mutations = settings(
    max_examples=int(os.environ.get("MUTATIONS", "40")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


TEXTS = st.text(max_size=8) | st.sampled_from(["\0", "\ud800", "../x", "a" * 300, "true", "Infinity", "</s>"])
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1, 2, 2**31, 2**32, 2**63, 2**64, 10**9, 10**400, 1e39, 1e300])
)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
OTHERS = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=4
)
OTHERS |= st.sampled_from([150, 400, 900]).map(nested)


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, (dict, list)) and tree:
        return [leaf for inner in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(inner)]
    return [tree]


def changed(draw: Callable[[st.SearchStrategy], Any], tree: Any, whole: Any) -> Any:
    """Return the tree with one place replaced, removed, or duplicated."""
    if not isinstance(tree, (dict, list)) or not tree or not draw(st.integers(0, 7)):
        return draw(OTHERS | st.sampled_from(leaves(whole)))
    key = draw(st.sampled_from(list(tree) if isinstance(tree, dict) else range(len(tree))))
    how = draw(st.sampled_from(["within", "within", "within", "without", "added"]))
    if how == "within":
        tree[key] = changed(draw, tree[key], whole)
    elif how == "without":
        del tree[key]
    elif isinstance(tree, dict):
        tree[draw(TEXTS)] = tree[key]
    else:
        tree.append(tree[key])
    return tree


@st.composite
def documents(draw: Callable[[st.SearchStrategy], Any], tree: Any) -> Any:
    """Return JSON trees that differ from this one in one to three places."""
    found = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = changed(draw, found, tree)
    return found


@st.composite
def damaged(draw: Callable[[st.SearchStrategy], Any], content: bytes) -> bytes:
    """Return bytes that differ from these in some places, or are cut."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at, piece = (
            draw(st.integers(0, len(found))),
            draw(st.binary(max_size=4) | st.sampled_from([b"\xff", b"\0", b"[" * 5000, b"9" * 5000])),
        )
        end = draw(st.sampled_from([at, at + 1, at + len(piece), len(found)]))
        found[at:end] = piece
    return bytes(found)


def texts(tree: Any) -> st.SearchStrategy[bytes]:
    """Return contents of a JSON file that are near the JSON text of this tree."""
    return documents(tree).map(lambda found: json.dumps(found).encode()) | damaged(json.dumps(tree).encode())


def check(call: Callable[[], Any]) -> None:
    """Check that the call works, or raises UserError with one line."""

    def late(number: int, frame: object) -> None:
        pytest.fail(f"no answer within {LIMIT} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    finally:
        signal.alarm(0)
