"""Rotary position embeddings (RoFormer, 2104.09864), and their scaling to longer contexts than in the first training.

The order of operations is the same as in transformers. Another order would round differently, which is visible in the
angles of late positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.model.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Rope:
    """How a model rotates its queries and keys."""

    frequencies: Tensor  # [head_dim / 2] float32, radians per position of each rotated pair
    scale: float = 1.0  # factor of the rotated queries and keys

    @classmethod
    def of(cls, arch: Architecture, device: torch.device | str) -> Rope:
        """Return the rope of a model, on this device."""
        s = arch.rope_scaling
        exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
        periods = arch.rope_theta**exponents  # positions per radian
        match arch.rope_kind:
            case "linear":
                return cls((1 / periods / s["factor"]).to(device))
            case "llama3":
                return cls(_llama3(arch, 1 / periods).to(device))
            case "yarn":
                return cls(_yarn(arch, periods).to(device), _yarn_scale(arch))
        return cls((1 / periods).to(device))  # also for dynamic, which changes nothing within the original context

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin [..., 1, head_dim / 2] of positions [...]."""
        angles = positions[..., None, None].float() * self.frequencies
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def _llama3(arch: Architecture, frequencies: Tensor) -> Tensor:
    """Return the frequencies of Llama 3's scaling (2407.21783).

    The frequency of a pair that rotates slowly within the original context is divided by `factor`. Fast pairs are
    unchanged. Frequencies between are interpolated.
    """
    s = arch.rope_scaling
    turns = s["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    kept = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return (1 - kept) * frequencies / s["factor"] + kept * frequencies


def _yarn(arch: Architecture, periods: Tensor) -> Tensor:
    """Return the frequencies of YaRN (2309.00071).

    The scaling is as in _llama3, but the interpolation is linear in the index of the pair, between the pairs that make
    beta_fast and beta_slow turns.
    """
    s = arch.rope_scaling

    def pair(turns: float) -> float:
        """Return the (fractional) index of the pair that makes this number of turns within the original context."""
        context = s["original_max_position_embeddings"]
        return arch.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(arch.rope_theta))

    first, last = pair(s.get("beta_fast", 32)), pair(s.get("beta_slow", 1))
    if s.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, arch.head_dim - 1)
    ramp = (torch.arange(len(periods), dtype=torch.float32) - first) / (last - first or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1 / (s["factor"] * periods) * (1 - kept) + 1 / periods * kept


def _yarn_scale(arch: Architecture) -> float:
    """Return YaRN's attention factor: the value in config.json, or else computed from mscale and mscale_all_dim."""
    s = arch.rope_scaling

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(s["factor"]) + 1 if s["factor"] > 1 else 1.0

    if "attention_factor" in s:
        return float(s["attention_factor"])
    if "mscale" in s and "mscale_all_dim" in s:
        return magnitude(s["mscale"]) / magnitude(s["mscale_all_dim"])
    return magnitude(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [..., heads, head_dim], rotated by tables [..., 1, head_dim / 2].

    Dimension i is paired with dimension i + head_dim / 2, as in Hugging Face models.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
