"""Classes of transformers that do not use a tokenizer.json as it is: they are known here, and most are refused."""

import ast
import json
from pathlib import Path

import pytest
from vocabularies import write_byte_level

from rlhf.data import parts
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError


def test_the_classes_that_build_their_parts_anew_are_those_of_transformers() -> None:
    """A class either gets the parts of transformers here, or is refused, or uses a tokenizer.json as it is."""
    transformers = pytest.importorskip("transformers")
    files = (Path(transformers.__file__).parent / "models").glob("*/tokenization*.py")
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    builds = {
        node.name
        for node in nodes
        if isinstance(node, ast.ClassDef)
        and any(isinstance(call, ast.Call) and ast.unparse(call.func) == "Tokenizer" for call in ast.walk(node))
    }
    size = 0
    while size < len(builds):  # further names and subclasses
        size = len(builds)
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                builds |= {name.asname for name in node.names if name.asname and name.name in builds}
            elif isinstance(node, ast.ClassDef) and builds & {ast.unparse(base) for base in node.bases}:
                builds.add(node.name)
            elif isinstance(node, ast.Assign) and ast.unparse(node.value) in builds:
                builds.add(ast.unparse(node.targets[0]))
    names = {name.removesuffix("Fast") for name in builds if not name.startswith("_")}
    assert names == {*parts.PARTS, *parts.REBUILT}


@pytest.mark.parametrize("name", ["GPTNeoXTokenizerFast", "CohereTokenizer"])
def test_a_class_that_builds_its_parts_anew_is_refused(tmp_path: Path, name: str) -> None:
    """The remedy works."""
    settings = json.loads((write_byte_level(tmp_path) / "tokenizer_config.json").read_text())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    plain = Tokenizer.load(tmp_path).encode("Hello, 12 of them.")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
    known = name.removesuffix("Fast")
    with pytest.raises(UserError, match=f"reads it as {known}, which builds parts of it anew; set tokenizer_class to"):
        Tokenizer.load(tmp_path)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(tmp_path).encode("Hello, 12 of them.") == plain
