"""Conversion: any format and layout to any other is bitwise, files are as Megatron-LM writes them, and nothing foreign runs."""

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tiles import FAMILIES, LLAMA, random_hf

from rlhf import convert
from rlhf.model import architecture
from rlhf.weights import hf

ROOT = Path(__file__).parents[1]
MODELS = {
    **FAMILIES,
    "reward model": replace(LLAMA, lm=False, scalar=True),
    "tied reward model": replace(LLAMA, lm=False, scalar=True, tied=True),
    "a vocabulary that divides": replace(LLAMA, vocab=128),
}


def hf_folder(folder: Path, arch: architecture.Architecture, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A Hugging Face folder, written by the safetensors package; its tensors."""
    tensors = {name: tensor.to(dtype) for name, tensor in random_hf(arch).items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf.description(arch)))
    (folder / "tokenizer.json").write_text("{}")
    return tensors


def run(*arguments: object) -> None:
    convert.main([str(argument) for argument in arguments])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS)
def test_hf_mcore_legacy_hf_is_bitwise(tmp_path: Path, arch):
    wanted = hf_folder(tmp_path / "hf", arch)
    assert architecture.read(tmp_path / "hf") == arch
    for (tp, pp), (other_tp, other_pp) in zip(product((1, 2, 4), (1, 2, 4)), product((4, 1, 2), (2, 1, 4)), strict=True):
        step = tmp_path / f"{tp}-{pp}"
        run("--from", tmp_path / "hf", "--to", step / "core", "--format", ("mcore", "mcore-local")[pp // 2 % 2], "--tp", tp, "--pp", pp)
        run("--from", step / "core", "--to", step / "old", "--format", "legacy", "--tp", other_tp, "--pp", other_pp, "--verify")
        run("--from", step / "old", "--to", step / "hf", "--format", "hf", "--verify")
        got = tensors_of(step / "hf")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted), (tp, pp)
        assert architecture.read(step / "hf") == arch
        assert (step / "hf/tokenizer.json").exists()
