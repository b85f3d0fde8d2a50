"""Classes of transformers that do not use a tokenizer.json as it is: they are known here, and most are refused."""

import ast
import json
from pathlib import Path

import pytest
from vocabularies import write_byte_level

from rlhf.data import parts
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError


def test_the_classes_that_do_not_use_the_file_as_it_is_are_those_of_transformers() -> None:
    """They are those with an `__init__`. They get the parts of transformers here, or are refused."""
    transformers = pytest.importorskip("transformers")
    files = (Path(transformers.__file__).parent / "models").rglob("tokenization*.py")
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    roots, found, size = {"TokenizersBackend", "PythonBackend", "SentencePieceBackend"}, set(), -1
    roots |= {"PreTrainedTokenizer", "PreTrainedTokenizerFast"}
    while size < len(found):  # subclasses and other names
        size = len(found)
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                found |= {name.asname for name in node.names if name.asname and name.name in found}
            elif isinstance(node, ast.ClassDef):
                own = any(isinstance(part, ast.FunctionDef) and part.name == "__init__" for part in node.body)
                if {ast.unparse(base) for base in node.bases} & (found | roots if own else found):
                    found.add(node.name)
            elif isinstance(node, ast.Assign) and ast.unparse(node.value) in found:
                found.add(ast.unparse(node.targets[0]))
    names = {name.removesuffix("Fast") for name in found if name[0] != "_" and not name.endswith("Legacy")}
    assert names == {*parts.PARTS, *parts.REFUSED}


@pytest.mark.parametrize("name", ["GPTNeoXTokenizerFast", "CohereTokenizer", "ByT5Tokenizer"])
def test_such_a_class_is_refused(tmp_path: Path, name: str) -> None:
    """The remedy works."""
    settings = json.loads((write_byte_level(tmp_path) / "tokenizer_config.json").read_text())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    plain = Tokenizer.load(tmp_path).encode("Hello, 12 of them.")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
    known = name.removesuffix("Fast")
    with pytest.raises(
        UserError, match=f"reads it as {known}, which does not use this file as it is; set tokenizer_class to"
    ):
        Tokenizer.load(tmp_path)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(tmp_path).encode("Hello, 12 of them.") == plain
