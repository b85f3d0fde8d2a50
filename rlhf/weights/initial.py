"""Random initial weights: a function of the seed and of a tensor's canonical name, whatever the layout."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.model.architecture import Architecture
from rlhf.weights import names
from rlhf.weights.tiles import Tile, view

STD = 0.02  # of every matrix, as Hugging Face's initializer_range defaults to


@torch.no_grad()
def fill(arch: Architecture, tiling: Sequence[Tile], parameters: Mapping[str, Tensor], seed: int) -> None:
    """Matrices from N(0, STD^2), norms 1, biases and scalar heads 0; rows that pad the vocabulary 0."""
    for tensor in parameters.values():
        tensor.zero_()
    shapes = {tile.name: [high for _, high in tile.box] for tile in names.tiles(arch, "hf")}  # of whole tensors
    for tile in tiling:
        target = view(parameters[tile.local], tile, tile.box)
        if tile.name.endswith("norm.weight"):
            target.fill_(1.0)
        elif not tile.name.endswith((".bias", names.SCORE)):
            # 32 bits that depend on both: a CPU's generator looks at no more of them.
            generator = torch.Generator(target.device).manual_seed(zlib.crc32(tile.name.encode(), seed))
            full = torch.empty(shapes[tile.name], device=target.device).normal_(std=STD, generator=generator)
            target.copy_(full[tuple(slice(low, high) for low, high in tile.box)])
