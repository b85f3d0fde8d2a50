"""Rotary tables equal those of transformers bitwise, at every position and for every kind of scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.model.rope import Rope

CONTEXT = 1 << 17
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip


def read(folder: Path, rope: dict[str, Any], **changes: Any) -> architecture.Architecture:
    (folder / "config.json").write_text(json.dumps(SHAPE | {"rope_scaling": rope} | changes))
    return architecture.read(folder)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.7},
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        YARN,
        {**YARN, "type": "yarn", "factor": 40},
        {"rope_type": "yarn", "factor": 4.0},
        {**YARN, "attention_factor": 1.7},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        {**YARN, "mscale": 0.7},
        {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**YARN, "attention_factor": None, "beta_fast": None, "truncate": True},
    ],
    ids=str,
)
def test_tables(tmp_path: Path, rope: dict[str, Any]) -> None:
    arch = read(tmp_path, rope)
    assert arch.context == CONTEXT
    positions = torch.cat(
        [torch.arange(300), torch.arange(4090, 4100), torch.arange(0, CONTEXT, 997), torch.tensor([CONTEXT - 1])]
    )
    wanted = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))(torch.zeros(1), positions[None])
    for found, right in zip(Rope.of(arch, "cpu").tables(positions, torch.float32), wanted, strict=True):
        assert torch.equal(torch.cat([found[:, 0]] * 2, dim=-1), right[0])


def test_usual_numbers_are_not_kept(tmp_path: Path) -> None:
    """The model is the same if config.json has some keys with their default values."""
    spelled = {**YARN, "beta_fast": 32.0, "beta_slow": 1, "truncate": True, "attention_factor": None}
    assert read(tmp_path, spelled) == read(tmp_path, YARN)


def test_the_original_context(tmp_path: Path) -> None:
    """It is max_position_embeddings if the scaling does not contain it.

    A second one outside of the scaling must be equal.
    """
    outer = "original_max_position_embeddings"
    assert read(tmp_path, {"rope_type": "yarn", "factor": 4.0}).rope_scaling[outer] == CONTEXT
    assert read(tmp_path, YARN, **{outer: 4096}) == read(tmp_path, YARN)
    assert read(tmp_path, {"rope_type": "default"}, **{outer: 4096}).rope_scaling == {}
    with pytest.raises(
        UserError, match="original_max_position_embeddings is 1024, but 4096 in the rope scaling: delete the first"
    ):
        read(tmp_path, YARN, **{outer: 1024})


def test_yarn_reaches_as_far_as_its_factor(tmp_path: Path) -> None:
    """vLLM's tables end there, for any value of max_position_embeddings."""
    assert read(tmp_path, {**YARN, "factor": 4.0}).context == 4 * 4096


def test_unknown_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rope scaling yarn with 'mrope_section' is not supported"):
        read(tmp_path, {**YARN, "mrope_section": [1, 2]})
