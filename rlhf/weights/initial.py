"""Random initial weights. They depend on the seed and on a tensor's canonical name, but not on the layout."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.model.architecture import Architecture
from rlhf.weights import names
from rlhf.weights.tiles import Tile, view

STD = 0.02  # standard deviation of every matrix: the default of Hugging Face's initializer_range


@torch.no_grad()
def fill(arch: Architecture, tiling: Sequence[Tile], parameters: Mapping[str, Tensor], seed: int) -> None:
    """Fill matrices from N(0, STD^2), norms with 1, and biases, scalar heads and vocabulary padding with 0."""
    for tensor in parameters.values():
        tensor.zero_()
    shapes = {tile.name: [high for _, high in tile.box] for tile in names.tiles(arch, "hf")}  # of whole tensors
    for tile in tiling:
        target = view(parameters[tile.local], tile, tile.box)
        if tile.name.endswith("norm.weight"):
            target.fill_(1.0)
        elif not tile.name.endswith((".bias", names.SCORE)):
            # A CPU generator uses only 32 bits of a seed. crc32 makes all of them depend on both the name and the seed.
            generator = torch.Generator(target.device).manual_seed(zlib.crc32(tile.name.encode(), seed))
            full = torch.empty(shapes[tile.name], device=target.device).normal_(std=STD, generator=generator)
            target.copy_(full[tuple(slice(low, high) for low, high in tile.box)])
