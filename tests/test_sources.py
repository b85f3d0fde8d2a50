"""Several data sets of one key: their names, and the order in which a run takes records from them."""

import re
from pathlib import Path

import pytest

from rlhf.data.sources import named
from rlhf.errors import UserError


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME=PATH gives a name. A path that contains "=" is still a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run=3").mkdir()
    for name in ("a=b.jsonl", "run=3/x.jsonl"):
        (tmp_path / name).write_text("{}")
    for entry, wanted in {
        "math=/data/a.jsonl": ("math", "/data/a.jsonl"),
        "m-1_x=b=c.jsonl": ("m-1_x", "b=c.jsonl"),
        "a=c.jsonl": ("a", "c.jsonl"),
        "a=b.jsonl": ("a-b", "a=b.jsonl"),
        "run=3/x.jsonl": ("x", "run=3/x.jsonl"),
        "run=3/*.jsonl": ("data", "run=3/*.jsonl"),
        "run=run=3/x.jsonl": ("run", "run=3/x.jsonl"),
        "/data/run=3/x.jsonl": ("x", "/data/run=3/x.jsonl"),
        "/data/train.jsonl.gz": ("train", "/data/train.jsonl.gz"),
        "/data/llama3.1-sft/": ("llama3-1-sft", "/data/llama3.1-sft/"),
        "/data/train-*": ("train", "/data/train-*"),
        ".": (tmp_path.name, "."),
    }.items():
        assert named([entry], "data.train") == dict([wanted])
    assert list(named(["b=x.jsonl", "a.jsonl"], "data.train")) == ["b", "a"]
    said = "data.eval: x/a.jsonl and y/a.jsonl both have the name a; give one of them another name: OTHER=y/a.jsonl"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        named(["x/a.jsonl", "y/a.jsonl"], "data.eval")
