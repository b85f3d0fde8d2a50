"""The training state of every layout fills that of every other layout, bitwise, also if it is cut into ranges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch
from test_tiles import FAMILIES, LLAMA, Tensors, mcore_rank, random_hf

from rlhf.model.architecture import Architecture
from rlhf.parallel.layout import Place
from rlhf.weights import shards
from rlhf.weights.shards import MAIN, MOMENTS, LiveShard, StoredShard, fill
from rlhf.weights.tiles import Tile, numel, within

LAYOUTS = [(tp, pp, cut) for tp, pp in product((1, 2, 4), repeat=2) if tp * pp <= 4 for cut in (1, 4 // (tp * pp))]
LAYOUTS = list(dict.fromkeys(LAYOUTS))  # (tp, pp, number of ranks that share the optimizer state)


def layout(arch: Architecture, hf: Tensors, tp: int, pp: int, cut: int) -> Iterator[LiveShard]:
    """Yield the shards of all ranks. ZeRO cuts the concatenation of all parameters into equal ranges."""
    for p, t in product(range(pp), range(tp)):
        whole = mcore_rank(arch, hf, (t, tp), (p, pp))
        total, part = sum(map(torch.numel, whole.values())), -(-sum(map(torch.numel, whole.values())) // cut)
        for low in range(0, total, part):
            starts, main, first = {}, {}, 0
            for name, tensor in whole.items():
                start, stop = (min(max(edge - first, 0), tensor.numel()) for edge in (low, low + part))
                first += tensor.numel()
                if start < stop:
                    starts[name], main[name] = start, tensor.flatten()[start:stop].clone()
            tensors = {
                MAIN: main,
                **{kind: {k: t * (i + 2) for k, t in main.items()} for i, kind in enumerate(MOMENTS)},
            }
            yield LiveShard(3, shards.tiling(arch, Place((t, tp), (p, pp))), starts, tensors)


@pytest.mark.parametrize("arch", FAMILIES.values(), ids=FAMILIES)
def test_every_layout_fills_every_other(arch: Architecture) -> None:
    """The shards are those that concatenation and chunks of whole tensors give."""
    hf = random_hf(arch)
    held = {each: list(layout(arch, hf, *each)) for each in LAYOUTS}
    for (there, sources), (here, targets) in product(held.items(), repeat=2):
        for wanted in targets:
            blank = {
                kind: {name: torch.zeros_like(t) for name, t in each.items()} for kind, each in wanted.tensors.items()
            }
            got = LiveShard(3, wanted.tiling, wanted.starts, blank)
            fill(got, sources, arch)
            for kind, name in product(blank, wanted.starts):
                assert torch.equal(got.tensors[kind][name], wanted.tensors[kind][name]), (there, here, kind, name)


def test_only_the_needed_files_are_read(tmp_path: Path) -> None:
    """A file of the same layout contains all that its rank needs. With an incomplete checkpoint, fill() fails."""
    held = list(layout(LLAMA, random_hf(LLAMA), 2, 2, 1))
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path, shard in zip(paths, held, strict=True):
        with path.open("wb") as file:
            shard.write(file.write)
    for tensor in held[3].tensors[MAIN].values():
        tensor.untyped_storage().resize_(0)  # the residence must be able to free what was written
    stored = [StoredShard(path, shard.tiling) for path, shard in zip(paths, held, strict=True)]
    assert [each.updates for each in stored] == [3] * 4
    blank = {kind: {name: torch.zeros_like(t) for name, t in each.items()} for kind, each in held[1].tensors.items()}
    got = LiveShard(3, held[1].tiling, held[1].starts, blank)
    for path in paths[:1] + paths[2:]:
        path.unlink()
    fill(got, [stored[1], stored[0], *stored[2:]], LLAMA)
    assert all(torch.equal(t, held[1].tensors[kind][name]) for kind in blank for name, t in got.tensors[kind].items())
    with pytest.raises(AssertionError, match=r"no file of the checkpoint has \('model.embed_tokens.weight'"):
        fill(held[0], [stored[1]], LLAMA)


def test_padding_that_no_source_has_keeps_its_values() -> None:
    """Three ranks pad a vocabulary of 101 to 192 rows, one rank to 128."""
    arch = replace(LLAMA, heads=6, kv_heads=3)
    tables = {}
    for tp in (1, 3):
        tiling = [tile for tile in shards.tiling(arch, Place((tp - 1, tp))) if tile.name.startswith("model.embed")]
        size = arch.padded_vocab(tp) // tp * arch.hidden
        tables[tp] = LiveShard(0, tiling, {tiling[0].local: 0}, {MAIN: {tiling[0].local: torch.ones(size) * tp}})
    fill(tables[3], [tables[1]], arch)
    (table,) = tables[3].tensors[MAIN].values()
    assert torch.equal(table, torch.full_like(table, 3.0)), "rows 128 to 191"


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_a_range_is_cut_into_boxes(shape: tuple[int, ...]) -> None:
    """For every range of elements, the boxes cover it once, and nothing else."""
    tile = Tile("w", tuple((10, 10 + n) for n in shape), "w", shape[0], shape[0], shape, (0,) * len(shape))
    first, count = prod(shape), prod(shape)  # the tile begins after as many rows
    flat = torch.arange(count).view(shape)
    for start, stop in product(range(2 * count + 2), repeat=2):
        boxes = within(tile, start, stop)
        found = [flat[tuple(slice(a - 10, b - 10) for a, b in box)].flatten() for box in boxes]
        wanted = [n for n in range(count) if start <= first + n < stop]
        assert sorted(torch.cat([*found, torch.empty(0, dtype=torch.long)]).tolist()) == wanted
        assert sum(map(numel, boxes)) == len(wanted)
        assert len(boxes) <= 2 * len(shape) + 1
