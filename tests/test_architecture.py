"""Reading of config.json, as models are published and as transformers 5 writes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.model.architecture import Architecture

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name -> (config.json without descriptive keys, its architecture, number of parameters on the model's card)
PUBLISHED: dict[str, tuple[dict[str, Any], Architecture, int]] = {
    "Llama-2-7b-hf": (
        {
            "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size":
            11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        Architecture(
            family="llama", layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000,
            context=4096, eps=1e-5, tied=False, rope_theta=10000.0,
        ),
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "rope_scaling": LLAMA3_SCALING, "tie_word_embeddings": False, "vocab_size": 128256,
        },
        Architecture(
            family="llama", layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256,
            context=131072, eps=1e-5, tied=False, rope_theta=500000.0, rope_scaling=LLAMA3_SCALING,
        ),
        8_030_261_248,
    ),
    "Mistral-7B-v0.3": (
        {
            "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size":
            14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
            "tie_word_embeddings": False, "vocab_size": 32768,
        },
        Architecture(
            family="mistral", layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=32768,
            context=32768, eps=1e-5, tied=False, rope_theta=1000000.0,
        ),
        7_248_023_552,
    ),
    "Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
            "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers":
            24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 4096,
            "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
        },
        Architecture(
            family="qwen2", layers=24, hidden=896, ffn=4864, heads=14, kv_heads=2, head_dim=64, vocab=151936,
            context=32768, eps=1e-6, tied=True, rope_theta=1000000.0,
        ),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        Architecture(
            family="qwen3", layers=28, hidden=1024, ffn=3072, heads=16, kv_heads=8, head_dim=128, vocab=151936,
            context=40960, eps=1e-6, tied=True, rope_theta=1000000.0,
        ),
        596_049_920,
    ),
    "phi-4": (
        {
            "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 5120,
            "intermediate_size": 17920, "max_position_embeddings": 16384, "num_attention_heads": 40,
            "num_hidden_layers": 40, "num_key_value_heads": 10, "original_max_position_embeddings": 16384,
            "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 250000, "sliding_window": None,
            "tie_word_embeddings": False, "vocab_size": 100352,
        },
        Architecture(
            family="phi3", layers=40, hidden=5120, ffn=17920, heads=40, kv_heads=10, head_dim=128, vocab=100352,
            context=16384, eps=1e-5, tied=False, rope_theta=250000.0, pad=32000,
        ),
        14_659_507_200,
    ),
}  # fmt: skip


def read(folder: Path, config: dict[str, Any]) -> Architecture:
    (folder / "config.json").write_text(json.dumps(config))
    return architecture.read(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(tmp_path: Path, name: str) -> None:
    config, wanted, parameters = PUBLISHED[name]
    assert read(tmp_path, config) == wanted
    assert wanted.num_parameters() == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_rope_as_transformers_5_writes_it(tmp_path: Path, name: str) -> None:
    """Transformers 5 writes all keys of rope into one section. This section overrides the older keys."""
    config, wanted, _ = PUBLISHED[name]
    older = {key: config[key] for key in config if key not in ("rope_theta", "rope_scaling")}
    rope = {"rope_type": "default", "rope_theta": wanted.rope_theta, **(config.get("rope_scaling") or {})}
    assert read(tmp_path, {**older, "rope_parameters": rope}) == wanted
    assert read(tmp_path, {**older, "rope_parameters": rope, "rope_theta": 7.0}) == wanted
    del rope["rope_theta"]
    assert read(tmp_path, {**older, "rope_parameters": rope, "rope_theta": 7.0}).rope_theta == 7.0


def test_older_names_and_what_may_be_missing(tmp_path: Path) -> None:
    config, wanted, _ = PUBLISHED["Llama-3.1-8B"]
    older = {key: value for key, value in LLAMA3_SCALING.items() if key != "rope_type"} | {"type": "llama3"}
    assert read(tmp_path, {**config, "rope_scaling": older}) == wanted
    default = {**config, "rope_scaling": {"rope_type": "default"}}
    assert read(tmp_path, default) == replace(wanted, rope_scaling={})
    bare = {
        key: config[key]
        for key in config
        if key not in ("num_key_value_heads", "tie_word_embeddings", "rope_theta", "rope_scaling")
    }
    assert read(tmp_path, bare) == replace(wanted, kv_heads=32, rope_theta=10000.0, rope_scaling={})


def test_a_classifier_of_one_label_is_a_reward_model(tmp_path: Path) -> None:
    config, wanted, parameters = PUBLISHED["Llama-3.1-8B"]
    classifier = {**config, "architectures": ["LlamaForSequenceClassification"]}
    for labels in ({"id2label": {"0": "LABEL_0"}}, {"num_labels": 1}):
        arch = read(tmp_path, {**classifier, **labels})
        assert arch == replace(wanted, lm=False, scalar=True)
        assert arch.num_parameters() == parameters - 128256 * 4096 + 4096
    for pad in (None, -1, 128001):
        assert read(tmp_path, {**classifier, "num_labels": 1, "pad_token_id": pad}).pad == pad
    with pytest.raises(UserError, match=r"pad_token_id '<pad>' is neither a token id nor null"):
        read(tmp_path, {**classifier, "num_labels": 1, "pad_token_id": "<pad>"})
    for labels in ({"id2label": {"0": "a", "1": "b"}}, {"num_labels": 3}, {}):
        with pytest.raises(UserError, match=r"num_labels [023] is not supported; it must be 1"):
            read(tmp_path, {**classifier, **labels})


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("Mistral-7B-v0.3", {"sliding_window": 4096}, 4096),  # as v0.1 was published
        ("Mistral-7B-v0.3", {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 32}, 4096),
        ("Mistral-7B-v0.3", {"sliding_window": 32768}, 0),
        ("Qwen2.5-0.5B", {"use_sliding_window": True, "sliding_window": 32768}, 0),
        ("Llama-2-7b-hf", {"sliding_window": 4096}, 0),
    ],
)
def test_sliding_windows(tmp_path: Path, name: str, changes: dict[str, Any], window: int) -> None:
    config, wanted, _ = PUBLISHED[name]
    assert read(tmp_path, {**config, **changes}) == replace(wanted, window=window)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen2.5-0.5B", {"use_sliding_window": True, "sliding_window": 64}),  # in the layers from max_window_layers on
        ("Llama-2-7b-hf", {"sliding_window": 64}),  # transformers does not read it, but vLLM does
        (
            "Mistral-7B-v0.3",
            {"sliding_window": 64, "layer_types": ["full_attention"] * 32},
        ),  # vLLM reads the second one, and transformers does not
    ],
)
def test_a_window_of_some_layers_limits_the_context(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """Shorter sequences need no window."""
    config, wanted, _ = PUBLISHED[name]
    assert read(tmp_path, {**config, **changes}) == replace(wanted, context=64)
