"""Tiny random Hugging Face folders of every family, made by transformers, and its outputs for samples."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import transformers

from rlhf.contracts import Sample

SHAPE = {
    "vocab_size": 509,  # not a multiple of 64, so that padding is needed
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
FAMILIES = {
    "phi3": transformers.Phi3Config(**SHAPE | {"head_dim": 32}, pad_token_id=None),  # like Llama, with fused files
    "llama3-tied": transformers.LlamaConfig(
        **SHAPE | {"head_dim": 32}, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "mistral": transformers.MistralConfig(**SHAPE | {"num_key_value_heads": 4}, sliding_window=7, rms_norm_eps=1e-5),
    "qwen2": transformers.Qwen2Config(**SHAPE, rope_parameters=YARN, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHAPE | {"head_dim": 32}, rope_parameters=LINEAR),
}


def make(family: str, folder: Path, seed: int = 7) -> None:
    """Save a random model.

    Norms and biases are random too: a test would not notice if they were ignored at their initial values.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.08 + name.endswith("norm.weight"))
    model.save_pretrained(folder)


def samples(count: int = 7, seed: int = 3, vocab: int = 509) -> list[Sample]:
    """Return random samples of very different lengths, with all streams that the loss of GRPO reads."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = int(rng.integers(3, 60)) if i else 90
        mask = np.arange(length) >= rng.integers(0, length - 1)
        streams = {n: rng.normal(-6, 0.3, length).astype(np.float32) for n in ("old_logp", "ref_logp", "sampler_logp")}
        advantages = np.full(length, rng.normal(), np.float32) * mask
        made.append(
            Sample(
                rng.integers(0, vocab, length + 1).astype(np.int32),
                mask,
                group=i // 2,
                advantages=advantages,
                **streams,
            )
        )
    return made


def reference_logits(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """Return the logits [L, vocab] of transformers for one sample alone."""
    return model(torch.from_numpy(sample.tokens[None, :-1].astype(np.int64))).logits[0]


def reference_logp(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """Return the log-probs [L] of the labels."""
    labels = torch.from_numpy(sample.tokens[1:].astype(np.int64))
    return reference_logits(model, sample).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def layout_keys(layout: str) -> list[str]:
    """Convert tp2-recomputefull to parallel.tp=2 parallel.recompute=full."""
    pairs = (re.match(r"([a-z]+?)(\d+|none|full|selective)$", part).groups() for part in layout.split("-"))
    return [
        f"parallel.{key}={('false', 'true')[int(value)] if key in ('sp', 'zero') else value}" for key, value in pairs
    ]
