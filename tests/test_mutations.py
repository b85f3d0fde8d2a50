"""Files that are damaged or wrong in any way are refused in one line, or they work.

No other exception is raised, and no call hangs. Every run draws the same examples. MUTATIONS=5000 draws that many of
each kind.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dialects import QWEN3
from hypothesis import given
from hypothesis import strategies as st
from mutations import OTHERS, check, damaged, mutations, texts
from test_bad_models import LLAMA3
from vocabularies import write_byte_level, write_sentencepiece

from rlhf import configuration, folders
from rlhf.algorithms import ALGORITHMS
from rlhf.config import Data
from rlhf.data.forms import ANSWER, FORMS
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.identity import compare
from rlhf.model import architecture
from rlhf.weights import files, names
from rlhf.weights.formats import hf

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model with weights and a tokenizer.json, and a sentencepiece tokenizer beside it."""
    root = tmp_path_factory.mktemp("mutations")
    write_byte_level(root / "model")
    (root / "model/config.json").write_text(json.dumps(demo_task.MODEL | SHAPE | {"rope_scaling": LLAMA3}))
    demo_task.make_weights(root / "model")
    write_sentencepiece(root / "pieces")
    return root


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


def read(model: Path) -> None:
    """Read a model as a run does with policy.load: its description, and every tensor."""
    arch = architecture.read(model)
    source, tiling = files.open_folder(model, arch), names.tiles(arch, "hf")
    source.read(tiling, {name: torch.empty(shape) for name, shape in names.shapes(tiling).items()})
    assert hf.description(arch)


def write_header(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def parts(path: Path) -> tuple[bytes, bytes]:
    """Return header and data of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return content[8:start], content[start:]


def test_config_json(model: Path) -> None:
    path = model / "config.json"
    good = json.loads(path.read_text())

    @mutations
    @given(texts(good))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check(lambda: read(model))

    run()


def test_safetensors(model: Path) -> None:
    path = model / "model.safetensors"
    header, data = parts(path)

    @mutations
    @given(texts(json.loads(header)), st.sampled_from([0, 0, -1, 1]))
    def run(content: bytes, longer: int) -> None:
        write_header(path, content, data[:longer] if longer < 0 else data + b"\0" * longer)
        check(lambda: read(model))

    run()


def test_index(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    where = dict.fromkeys(list(names.hf_shapes(architecture.read(model)))[:4], "model.safetensors")

    @mutations
    @given(texts({"metadata": {"total_size": 1}, "weight_map": where}))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check(lambda: read(model))

    run()


def speak(folder: Path) -> None:
    """Use a tokenizer as a run does with policy.tokenizer."""
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("How many eggs? <|im_end|> é🙂", control=True) + tokenizer.encode(" 12", continues=True)
    tokenizer.decode(ids)
    tokenizer.decode([*tokenizer.stop_ids, 0, tokenizer.vocab], skip_special=False)
    if "tokenizer.json" in tokenizer.files:
        tokenizer.chat([{"role": "user", "content": "How many?"}], cue=True)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
)
def test_tokenizer(model: Path, name: str) -> None:
    path = model / name
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    more = {
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": [{"name": "default", "template": template}],
        "eos_token_id": [1, 2],
    }
    good = json.loads(path.read_text()) if path.exists() else {}

    @mutations
    @given(texts(good if name == "tokenizer.json" else good | more))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check(lambda: speak(model))

    run()


def test_tokenizer_model(made: Path, tmp_path: Path) -> None:
    good = (made / "pieces/tokenizer.model").read_bytes()

    @mutations
    @given(damaged(good))
    def run(content: bytes) -> None:
        (tmp_path / "tokenizer.model").write_bytes(content)
        check(lambda: speak(tmp_path))

    run()


LINES = {
    "prompts": {"prompt": [{"role": "user", "content": "How many?"}], "answer": "4", "eval_func": "math_rule"},
    "demonstrations": {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "4"}]},
    "scored": {"query": "How many?", "response": ["4", "5", "6"], "score": [1, 0.5, 0]},
    "pairs": {"prompt": "How many?", "chosen": [{"role": "assistant", "content": "4"}], "rejected": "5"},
    "questions": {"question_id": 81, "category": "math", "turns": ["How many?", "And now?"], "reference": ["4", "5"]},
}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
CALLING = {"messages": [{"role": "user", "content": "How many?"}, CALL], "tools": [{"name": "add"}]}


@pytest.mark.parametrize("form", FORMS)
def test_jsonl(made: Path, tmp_path: Path, form: Any) -> None:
    path, plain = tmp_path / "lines.jsonl", Tokenizer.load(made / "model")
    own = Tokenizer.load(write_byte_level(tmp_path / "own", template=QWEN3))
    required = (ANSWER,) if form == "prompts" else ()

    @mutations
    @given(texts(LINES[form]) | texts(CALLING), st.sampled_from(["auto", "plain", "human", "chatml", "llama2"]))
    def run(content: bytes, template: Any) -> None:
        path.write_bytes(content + b"\n")
        tokenizer = own if template == "auto" else plain

        def draw() -> None:
            for sample in Records.load(path, form, tokenizer, Data(template=template), required=required).draw(0, 2, 1):
                assert np.isfinite(sample.reward)

        check(draw)

    run()


@pytest.mark.parametrize("mode", ["grpo", "rlhf", "dpo"])
def test_toml(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "config.toml"
    good = configuration.to_toml(configuration.load(mode, []))
    keys = [line.partition(" = ")[0] for line in good.splitlines() if " = " in line]
    values = OTHERS.map(lambda value: json.dumps(value, ensure_ascii=False)) | st.sampled_from(
        ["inf", "nan", "0x" + "f" * 5000, "1979-05-27", "{a.b = 1}"]
    )

    @mutations
    @given(st.data())
    def run(data: st.DataObject) -> None:
        if data.draw(st.booleans()):
            content = data.draw(damaged(good.encode()))
        else:
            chosen = data.draw(st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=3))
            lines = [
                f"{key} = {chosen.get(key, value)}" if mark else key
                for key, mark, value in (line.partition(" = ") for line in good.splitlines())
            ]
            content = "\n".join(lines).encode(errors="surrogatepass")
        path.write_bytes(content)

        def load() -> None:
            config = configuration.load(mode, [str(path)])
            ALGORITHMS[mode](config)
            path.write_text(configuration.to_toml(config))
            assert configuration.load(mode, [str(path)]) == config

        check(load)

    run()


def test_meta_json(tmp_path: Path) -> None:
    """A damaged description has a wrong checksum.

    Older checkpoints have no checksum, so the content itself is checked too.
    """
    config = configuration.load("sft", [])
    run_is = {"keys": {"optim.lr": 1e-6, "steps": 3, "rollout.stop": []}, "read": {"data.train": ["a.jsonl", "0123"]}}
    meta = {"step": 7, "state": {"kl": 0.1}, "mode": "sft", "seed": 1, "dtype": "torch.float32", "zero": True}
    meta |= {
        "tp": 1,
        "pp": 1,
        "cp": 1,
        "dp": 1,
        "run": run_is,
        "steps": 100,
        "files": {"random_rank0.pt": {"size": 3, "crc32": 891568578}},
    }
    folder = tmp_path / "step_000007"
    folder.mkdir()
    (folder / "random_rank0.pt").write_bytes(b"abc")
    (tmp_path / "latest").write_text(folder.name)

    def go_on() -> None:
        newest, _ = folders.newest(tmp_path)
        assert newest == folder
        compare(folder, folders.meta(folder), config, run_is)
        assert folders.altered(folder, ["random_rank0.pt"]) in (
            "",
            f"{folder}/random_rank0.pt is damaged: its checksum is wrong",
        )

    def described(found: Any) -> bytes:
        return json.dumps(
            {**found, "crc32": zlib.crc32(json.dumps(found).encode())} if isinstance(found, dict) else found
        ).encode()

    @mutations
    @given(texts(meta) | damaged(described(meta)))
    def run(content: bytes) -> None:
        (folder / "meta.json").write_bytes(content)
        check(go_on)

    run()
