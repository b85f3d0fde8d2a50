"""Rotary position embeddings (RoFormer, 2104.09864), with the stretch of Llama 3 (2407.21783)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.model.architecture import Architecture


def rope_frequencies(arch: Architecture) -> Tensor:
    """Radians per position of each rotated pair, [head_dim / 2].

    Llama 3's scaling, where config.json asks for it: pairs that turn slowly within the original context are stretched by `factor`, fast
    ones kept, those between blended.
    """
    frequencies = arch.rope_theta ** -(torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim)
    if not arch.rope_scaling:
        return frequencies
    s = arch.rope_scaling
    turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / s["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., heads, head_dim] by tables [..., 1, head_dim / 2], pairing dimension i with i + head_dim / 2 as Hugging Face does."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
