"""Megatron's rank files: a file of torch.save per tensor-parallel rank and pipeline stage.

    iter_0000001/mp_rank_{tp:02}/model_optim_rng.pt             with one pipeline stage
    iter_0000001/mp_rank_{tp:02}_{pp:03}/model_optim_rng.pt     with several pipeline stages

The three formats differ in the names of the tensors (names.LAYOUTS). A .pt file is a zip archive. One record is a
pickle of a tree of dicts. Each other record has the bytes of one storage. The file is never read as a whole: opening it
only finds the location of each tensor's bytes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.errors import UserError
from rlhf.model.architecture import Architecture
from rlhf.parallel.layout import Layout, Place
from rlhf.weights import names, pt
from rlhf.weights.entries import Entry, Shape, intact
from rlhf.weights.formats import args
from rlhf.weights.formats.format import Target
from rlhf.weights.formats.megatron import RANKS, TRACKER, Megatron, MegatronContents, iteration_folder, number, title
from rlhf.weights.tiles import Tile

if TYPE_CHECKING:
    import torch

FILE = "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")


@dataclass(frozen=True, slots=True)
class RankContents(MegatronContents):
    """The rank files of one iteration. Each is a shard, in order of pipeline stage, then tensor-parallel rank."""

    @property
    def vocab(self) -> int:
        local = names.LAYOUTS[self.layout].local("model.embed_tokens.weight")
        if local not in self.shards[0] or len(self.shards[0][local].shape) != 2:
            what = f"no matrix {local} in the first rank file"
            raise UserError(f"{self.path}: {what}; this is not a GPT model's checkpoint")
        return self.shards[0][local].shape[0] * self.tp

    def tilings(self, arch: Architecture, pad: bool = False) -> list[list[Tile]]:
        rows = self.vocab
        return [names.tiles(arch, self.layout, place, rows=rows, pad=pad) for place in _places(self.tp, self.pp)]


class RankFiles(Megatron):
    """Rank files of megatron-core models."""

    split, sign = True, RANKS
    # Megatron's strict load needs the (empty) extra states of these linear layers. It also needs that of the output
    # layer if the file has the tensor `with_output`.
    linear: ClassVar[tuple[str, ...]] = (
        *("self_attention.linear_qkv", "self_attention.linear_proj"),
        *("mlp.linear_fc1", "mlp.linear_fc2"),
    )
    with_output: ClassVar[str] = "model.norm.weight"

    def owns(self, folder: Path, iteration: int | None = None) -> bool:
        # A tracker file without iterations is an incomplete checkpoint. open() reports what is missing.
        return super().owns(folder, iteration) or (folder / TRACKER).exists()

    def open(self, folder: Path, iteration: int | None = None) -> RankContents:
        path = iteration_folder(folder, iteration)
        with intact(path, "a checkpoint"):
            contents = _open(path)
        args.check(path, contents.args)
        return contents

    def lay_out(self, target: Target) -> dict[str, list[Tile]]:
        return {
            f"{title(target.iteration)}/{_folder(place)}/{FILE}": names.tiles(
                target.arch, self.layout, place, rows=target.rows, pad=True
            )
            for place in _places(target.tp, target.pp)
        }

    def begin(self, target: Target, path: Path, shapes: Mapping[str, Shape]) -> dict[str, Entry]:
        import torch

        # These tensors are never accessed, so they take no memory.
        tensors = {name: torch.empty(shape, dtype=target.dtype) for name, shape in shapes.items()}
        tree = {
            "args": argparse.Namespace(**args.describe(target)),
            "checkpoint_version": 3.0,
            "iteration": target.iteration,
            "model": self.tree(tensors),
            "num_floating_point_operations_so_far": 0,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.serialization.skip_data():
            pt.write(tree, path)
        return _entries(path, pt.read(path))

    def tree(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the value of the key `model` in a rank file: the tensors by local name, and the empty extra states."""
        form = names.LAYOUTS[self.layout]
        layer = re.compile(form.layer.replace("{}", r"\d+"))
        prefixes = sorted({match[0] for name in tensors if (match := layer.match(name))})
        empty = [f"{prefix}{linear}._extra_state" for prefix in prefixes for linear in self.linear]
        if form.local(self.with_output) in tensors:
            empty.append(form.local("lm_head.weight").replace(".weight", "._extra_state"))
        return {**tensors, **dict.fromkeys(empty)}


class LegacyFiles(RankFiles):
    """Rank files of Megatron-LM's models before megatron-core. Their trees are nested dicts, down to the encoder."""

    linear = (
        *("self_attention.query_key_value", "self_attention.dense"),
        *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )
    with_output = "lm_head.weight"

    def tree(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for name, state in super().tree(tensors).items():
            *outer, inner = name.split(".") if ".encoder." not in name else name.split(".", 2)
            place = nested
            for key in outer:
                place = place.setdefault(key, {})
            place[inner] = state
        return nested


MCORE = RankFiles("mcore", "megatron-te")
MCORE_LOCAL = RankFiles("mcore-local", "megatron")
LEGACY = LegacyFiles("legacy", "legacy")


def _open(path: Path) -> RankContents:
    matches = {child: match for child in path.iterdir() if (match := RANK.fullmatch(child.name))}
    found = {tuple(int(n or 0) for n in match.groups()): child for child, match in matches.items()}
    if not found:
        raise UserError(f"{path}: no mp_rank_* folder; a Megatron checkpoint has one for every rank")
    trees = {rank: pt.read(child / FILE) for rank, child in sorted(found.items())}
    first = next(iter(trees.values()))
    version = first.get("checkpoint_version", 3.0)
    if version < 2.0:
        why = f"checkpoint_version {version} has another order of the rows of q, k and v"
        raise UserError(f"{path}: {why}; save it with a newer Megatron-LM")
    described = args.read(first)
    tp = described.get("tensor_model_parallel_size") or max(t for t, _ in found) + 1
    pp = described.get("pipeline_model_parallel_size") or max(p for _, p in found) + 1
    ranks = {(place.tp[0], place.pp[0]): place for place in _places(tp, pp)}
    missing = [_folder(place) for rank, place in ranks.items() if rank not in trees]
    if missing or len(found) > tp * pp:
        what = f"{missing[0]} is missing" if missing else "there are too many mp_rank_* folders"
        raise UserError(f"{path}: {what} for {tp} x {pp} ranks; copy the whole checkpoint again")
    shards = [_entries(found[rank] / FILE, trees[rank]) for rank in ranks]
    form = _form(shards[0])
    return RankContents(path, form.name, form.layout, shards, described, number(first), tp, pp)


def _form(shard: Mapping[str, Entry]) -> RankFiles:
    """Return which of the three formats a rank file has, by the names of its tensors."""
    if any(name.startswith("language_model.") for name in shard):
        return LEGACY
    return MCORE if any(name.endswith("linear_qkv.layer_norm_weight") for name in shard) else MCORE_LOCAL


def _places(tp: int, pp: int) -> list[Place]:
    """Return the place of every rank file, in the order of the shards."""
    layout = Layout(tp=tp, pp=pp)
    return [layout.place(rank) for rank in range(layout.world)]


def _folder(place: Place) -> str:
    """Return the name of the folder of a rank."""
    (tensor, _), (stage, stages) = place.tp, place.pp
    return f"mp_rank_{tensor:02}" + (f"_{stage:03}" if stages > 1 else "")


def _entries(path: Path, tree: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the locations of the model's tensors in the file."""
    if "model0" in tree:
        raise UserError(f"{path}: virtual pipeline stages (model0, model1, ...) are not supported; save without them")
    if "model" not in tree:
        raise UserError(f"{path}: no key 'model', only {', '.join(map(str, tree))}; give a Megatron checkpoint")
    found = pt.entries(path, tree, "model.")
    return {name: entry for name, entry in found.items() if not name.endswith(("_extra_state", "inv_freq"))}
