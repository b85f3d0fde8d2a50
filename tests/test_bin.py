"""Hugging Face folders with files of torch.save, with several sets of weights, or with tensors of other parts."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_convert import run, tensors_of
from test_files import check_boxes, save
from test_megatron_damage import Malice
from test_tiles import FAMILIES, LLAMA, Tensors, random_hf

from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.weights import files
from rlhf.weights.formats import hf, inspect
from rlhf.weights.names import tilings

BIN = "pytorch_model.bin"


def pickled(folder: Path, tensors: Tensors, num_files: int = 1) -> None:
    """Write files of torch.save as transformers 4 did: parameters in an OrderedDict with metadata, and an index."""
    state = OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items())
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    save(folder, state, num_files, torch.save, BIN)


def read(folder: Path, arch: architecture.Architecture) -> Tensors:
    """Return the tensors of a folder, read through files.py."""
    tiling = tilings(arch, "hf", 1, 1)[0]
    got = {tile.local: torch.full(random_hf(arch)[tile.local].shape, torch.nan) for tile in tiling}
    files.read(folder, arch, tiling, got)
    return got


@pytest.mark.parametrize("arch", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("num_files", [1, 3])
def test_each_rank_reads_its_boxes(tmp_path: Path, arch, num_files: int) -> None:
    """Storages may be shared, and tensors may be transposed views of them."""
    tensors = {name: tensor.bfloat16() for name, tensor in random_hf(arch).items()}
    buffer = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = buffer.split([tensor.numel() for tensor in tensors.values()])
    shared = {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}
    held = {name: t.t().contiguous().t() if "down_proj" in name else t for name, t in shared.items()}
    if arch.tied:
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    pickled(tmp_path, held, num_files)
    check_boxes(tmp_path, arch, tensors)


@pytest.mark.parametrize("num_files", [1, 2])
def test_what_transformers_has_is_converted(tmp_path: Path, num_files: int) -> None:
    """A whole folder becomes one of safetensors, which transformers reads as the same model."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen2Config(vocab_size=101, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = transformers.Qwen2ForCausalLM(config)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(tmp_path / "bin")
    pickled(tmp_path / "bin", model.state_dict(), num_files)
    run("--from", tmp_path / "bin", "--to", tmp_path / "core", "--format", "mcore", "--tp", 2, "--verify")
    run("--from", tmp_path / "core", "--to", tmp_path / "hf", "--format", "hf", "--verify")
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in model.state_dict().items())


def truncated(folder: Path) -> None:
    pickled(folder, random_hf(LLAMA))
    (folder / BIN).write_bytes((folder / BIN).read_bytes()[:-5000])


def shard_missing(folder: Path) -> None:
    pickled(folder, random_hf(LLAMA), 2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def big_endian(folder: Path) -> None:
    pickled(folder, random_hf(LLAMA))
    with zipfile.ZipFile(folder / BIN) as old, zipfile.ZipFile(folder / "new", "w") as new:
        for record in old.infolist():
            new.writestr(record, b"big" if record.filename.endswith("/byteorder") else old.read(record))
    (folder / "new").rename(folder / BIN)


def unlike(change: Callable[[Tensors], object], **options: bool) -> Callable[[Path], None]:
    return lambda folder: torch.save(change(random_hf(LLAMA)), folder / BIN, **options)


NORM = "model.norm.weight"
REFUSED = {
    "cut short": (truncated, "not a file of torch.save, or cut short"),
    "a shard missing": (
        shard_missing,
        r"pytorch_model-00002-of-00002.bin: missing, but pytorch_model.bin.index.json lists it",
    ),
    "before zip files": (
        unlike(lambda hf: hf, _use_new_zipfile_serialization=False),
        "in the format of torch.save before torch 1.6; save it again: python -c ",
    ),
    "git-lfs pointer": (
        lambda folder: (folder / BIN).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "pytorch_model.bin: a pointer of git-lfs, not the file itself; fetch the file: git lfs pull",
    ),
    "of another machine": (big_endian, "written on a big-endian machine; save it again on this one"),
    "a whole module": (unlike(lambda hf: torch.nn.Linear(2, 2)), r"it asks for torch.nn.modules.linear.Linear, but"),
    "a list": (unlike(lambda hf: [*hf]), "it holds a list, not a dict"),
    "a sparse tensor": (unlike(lambda hf: hf | {NORM: hf[NORM].to_sparse()}), "damaged, or not a file of weights"),
    "a wrong dtype": (unlike(lambda hf: hf | {NORM: hf[NORM].double()}), "norm.weight has dtype float64; supported"),
    "a wrong shape": (unlike(lambda hf: hf | {NORM: hf[NORM][:-1]}), r"norm.weight has shape \[31\]"),
    "one level too deep": (unlike(lambda hf: {"state_dict": hf}), "tensor model.embed_tokens.weight is missing"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_files_are_refused(tmp_path: Path, make, message: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        files.open_folder(tmp_path, LLAMA)
    assert str(tmp_path) in str(error.value)


def test_code_is_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    (tmp_path / "config.json").write_text(json.dumps(hf.description(LLAMA)))
    torch.save(random_hf(LLAMA) | {"more": Malice(os.system, f"touch {mark}")}, tmp_path / BIN)
    with pytest.raises(UserError, match=rf"{BIN}: it asks for posix.system, but only weights and numbers are read"):
        run("--from", tmp_path, "--to", tmp_path / "new", "--format", "hf")
    assert not mark.exists()


def marked(number: float) -> Tensors:
    return random_hf(LLAMA) | {NORM: torch.full((32,), float(number))}


def sets(folder: Path, *kinds: str) -> None:
    """Write sets of weights that differ in one tensor: 1 for a single file of safetensors, 2 for several, and so on."""
    writers = {
        "single": lambda: save(folder, marked(1)),
        "sharded": lambda: save(folder, marked(2), 3),
        "bin": lambda: pickled(folder, marked(3)),
        "sharded bin": lambda: pickled(folder, marked(4), 3),
        "Mistral's": lambda: save_file({"norm.weight": torch.ones(32)}, folder / "consolidated.safetensors"),
        "stale": lambda: (folder / hf.INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}'),
        "adapter": lambda: save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors"),
    }
    for kind in kinds:
        writers[kind]()


@pytest.mark.parametrize(
    ("kinds", "number", "plain"),
    [
        (["single"], 1, True),
        (["sharded"], 2, True),
        (["single", "sharded"], 1, False),
        (["single", "stale"], 1, False),
        (["single", "bin", "sharded bin"], 1, True),
        (["sharded", "bin"], 2, True),
        (["sharded", "Mistral's"], 2, False),
        (["single", "adapter"], 1, False),
        (["bin"], 3, False),
        (["bin", "sharded bin"], 3, False),
        (["sharded bin"], 4, False),
        (["sharded bin", "Mistral's"], 4, False),
    ],
)
def test_transformers_decides_between_several_files(
    tmp_path: Path, kinds: list[str], number: float, plain: bool
) -> None:
    """plain: vLLM, which has another order, would read the same tensors."""
    (tmp_path / "config.json").write_text(json.dumps(hf.description(LLAMA)))
    sets(tmp_path, *kinds)
    source = files.open_folder(tmp_path, LLAMA)
    assert read(tmp_path, LLAMA)[NORM].unique().tolist() == [number]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight[0] == number
    assert source.plain == plain
    both = [f"{tmp_path} has model.safetensors and {hf.INDEX}: the first is read, as in transformers"]
    assert source.remarks(LLAMA, "", "policy.tokenizer") == (both if {"sharded", "stale"} & {*kinds[1:]} else [])


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["stale"], "gone.safetensors: missing, but model.safetensors.index.json lists it"),
        (["stale", "bin"], "gone.safetensors: missing"),
        (["Mistral's"], "consolidated.safetensors: weights in Mistral's own format; download it in Hugging Face's"),
        (["adapter"], r"no model\*.safetensors or pytorch_model\*.bin file"),
    ],
)
def test_sets_that_are_refused(tmp_path: Path, kinds: list[str], message: str) -> None:
    sets(tmp_path, *kinds)
    with pytest.raises(UserError, match=message):
        files.open_folder(tmp_path, LLAMA)


def test_files_without_an_index_are_all_read(tmp_path: Path) -> None:
    for kind, number in (("sharded", 2), ("sharded bin", 4)):
        sets(tmp_path, kind)
        for index in tmp_path.glob("*.index.json"):
            index.unlink()
        assert read(tmp_path, LLAMA)[NORM][0] == number
        for path in tmp_path.glob("model-*"):
            path.unlink()


@pytest.mark.parametrize(
    "arch", [replace(LLAMA, tied=True), replace(LLAMA, lm=False, scalar=True)], ids=["lm", "score"]
)
def test_names_without_their_prefix(tmp_path: Path, arch) -> None:
    """The model without its head, as transformers saves a LlamaModel."""
    wanted = random_hf(arch)
    save(tmp_path, {name.removeprefix("model."): tensor for name, tensor in wanted.items()})
    got = read(tmp_path, arch)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert not files.open_folder(tmp_path, arch).plain


def test_an_output_layer_that_is_not_the_embedding(tmp_path: Path) -> None:
    """Transformers would use it in spite of tie_word_embeddings."""
    tied = replace(LLAMA, tied=True)
    wanted = random_hf(tied)
    for head in (wanted["model.embed_tokens.weight"].clone(), wanted["model.embed_tokens.weight"].bfloat16().float()):
        save(tmp_path, wanted | {"lm_head.weight": head})
        if torch.equal(head, wanted["model.embed_tokens.weight"]):
            files.open_folder(tmp_path, tied)
            continue
        with pytest.raises(UserError, match=r"lm_head.weight: .* is not the embedding; set it to false there"):
            files.open_folder(tmp_path, tied)
    save(tmp_path, wanted)
    with pytest.raises(UserError, match=r"tensor lm_head.weight is missing"):
        files.open_folder(tmp_path, LLAMA)


def test_the_value_head_of_trl(tmp_path: Path) -> None:
    """A policy does not use it. It has a bias, so it cannot become a scalar head."""
    value = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    pickled(tmp_path, random_hf(LLAMA) | value)
    (tmp_path / "config.json").write_text(json.dumps(hf.description(LLAMA)))
    source = files.open_folder(tmp_path, LLAMA)
    assert source.remarks(LLAMA, "", "") == [f"{tmp_path}: its value head (v_head.*) is not used"]
    with pytest.raises(UserError, match=r"it has a value head with a bias \(v_head, of TRL\)"):
        files.open_folder(tmp_path, replace(LLAMA, scalar=True))
    run("--from", tmp_path, "--to", tmp_path / "new", "--format", "hf")
    assert tensors_of(tmp_path / "new").keys() == random_hf(LLAMA).keys()
    save(tmp_path, random_hf(LLAMA) | value)
    assert not files.open_folder(tmp_path, LLAMA).plain, "vLLM would refuse it"
    assert len(inspect(tmp_path).shards[0]) == len(load_file(tmp_path / "model.safetensors"))
    assert re.search("v_head", " ".join(inspect(tmp_path).remarks))
