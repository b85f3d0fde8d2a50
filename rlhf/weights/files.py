"""Folders of weights of any format: opened, checked and read box by box.

Every format is a list of shards (one of Hugging Face tensors, or one per Megatron rank). A shard is a tiling of the
same Hugging Face tensors, and a table of where its own tensors are stored. torch is imported where tensors are handled,
and to look into .pt files, so that a Hugging Face folder can be refused before anything else is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import texts
from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.model.architecture import Architecture
from rlhf.weights import names
from rlhf.weights.entries import DTYPES, Entry, Shape, mapped, some
from rlhf.weights.formats import Contents, args, hf, inspect, recognise
from rlhf.weights.plan import Move, Plan
from rlhf.weights.tiles import Tile, view

if TYPE_CHECKING:
    import torch

    from rlhf.weights.publish import Transform


@dataclass(frozen=True, slots=True)
class Source:
    """An opened folder, whose tensors are those of an architecture."""

    path: Path
    contents: Contents
    tilings: list[list[Tile]]  # of every shard, without tensors that may be missing

    def read(
        self,
        tiling: Sequence[Tile],
        tensors: Mapping[str, torch.Tensor],
        transform: Transform | None = None,
    ) -> None:
        """Fill live tensors (local name -> tensor) with the boxes of their tiles, cast to the tensors' own dtypes.

        Files are mapped one tensor at a time, so only the pages of these boxes are read, and they are released at once.
        With a transform, each stored tensor is read as a whole, and its boxes are those of the result.
        """
        import torch

        wanted, last = {tile.name for tile in tiling}, None
        with torch.no_grad():
            for move in self._moves(tiling, wanted):
                entry = self.contents.shards[move.source][move.source_tile.local]
                if entry != last:
                    last, stored = entry, mapped(entry)
                    if transform:
                        stored = transform(move.source_tile.local, stored)
                source = view(stored, move.source_tile, move.box)
                view(tensors[move.target_tile.local], move.target_tile, move.box).copy_(source)
            for tile in tiling:
                if tile.name == names.SCORE and not self.has_head:
                    view(tensors[tile.local], tile, tile.box).zero_()

    @property
    def has_head(self) -> bool:
        return any(tile.name == names.SCORE for tiling in self.tilings for tile in tiling)

    def remarks(self, arch: Architecture, beside: str | Path, key: str) -> list[str]:
        """Where a checkpoint's args and the config.json that wins over them disagree.

        key: what the user sets to name `beside`, a folder with a config.json.
        """
        where = config_folder(self.path, beside)
        if where is None:
            what = f"rotary_base {self.contents.args.get('rotary_base')}, and all else, is what its args say"
            return [f"{self.path} has no config.json: {what}; {key} gives a better one"]
        return args.remarks(self.path, self.contents.args, arch, where)

    def _moves(self, tiling: Sequence[Tile], wanted: set[str]) -> list[Move]:
        """Which box comes from which shard: a plan with one extra rank, which holds nothing and needs every tile."""
        held = [[tile for tile in shard if tile.name in wanted] for shard in self.tilings]
        mine = [tile for tile in tiling if tile.name != names.SCORE or self.has_head]
        return Plan([*held, []], [*([] for _ in held), mine], [0] * (len(held) + 1)).received(len(held))


def open_folder(folder: str | Path, arch: Architecture, iteration: int | None = None, head: bool = False) -> Source:
    """Open a folder of any format, and check it. Reads headers only.

    Raises UserError, naming the file, unless it holds exactly the tensors of arch. A scalar model may come from a
    causal one: its head may be missing (it becomes zeros) unless `head` asks for it, and an output layer that it does
    not use is ignored.
    """
    folder = Path(folder)
    contents = inspect(folder, iteration)
    contents.check(arch)
    for tiling, shard in zip(contents.tilings(arch, pad=True), contents.shards, strict=True):
        _check(contents, arch, names.shapes(tiling), shard)
    pairs = zip(contents.tilings(arch), contents.shards, strict=True)
    source = Source(folder, contents, [[tile for tile in tiling if tile.local in shard] for tiling, shard in pairs])
    if head and not source.has_head:
        what = f"{folder} has no scalar head ({names.SCORE})"
        raise UserError(f"{what}: it is no reward model, and all of its scores would be 0")
    return source


def read(folder: str | Path, arch: Architecture, tiling: Sequence[Tile], tensors: Mapping[str, torch.Tensor]) -> None:
    """Open a folder and fill live tensors from it; rows that no tile covers are left alone."""
    open_folder(folder, arch).read(tiling, tensors)


def config_folder(folder: str | Path, beside: str | Path = "") -> Path | None:
    """The folder with the config.json of the model in `folder`; None if there is none and the format does without.

    beside: a folder with a config.json, for formats that do without one of their own (Megatron's).
    """
    folder, form = Path(folder), recognise(folder)
    places = form.config_folders(folder, Path(beside) if beside else None)
    found = [place for place in places if (place / "config.json").exists()]
    return found[0] if found else folder if form.needs_config else None


def read_architecture(folder: str | Path, beside: str | Path = "", iteration: int | None = None) -> Architecture:
    """The architecture of the model in a folder: from config.json, or else as the checkpoint itself describes it."""
    where = config_folder(folder, beside)
    return architecture.read(where) if where else inspect(folder, iteration).architecture()


def read_config(folder: str | Path, beside: str | Path = "", iteration: int | None = None) -> dict[str, Any]:
    """The content of the model's config.json, or of the one that it should have."""
    where = config_folder(folder, beside)
    if where:
        return texts.load(where / "config.json", architecture.REMEDY)
    return hf.description(read_architecture(folder, beside, iteration))


def _check(contents: Contents, arch: Architecture, wanted: Mapping[str, Shape], found: Mapping[str, Entry]) -> None:
    """Raise UserError unless one shard holds what it should."""
    for name, shape in wanted.items():
        if name not in found and name.partition("#")[0] == names.SCORE:
            continue
        if name not in found:
            why = "config.json asks for it, so download the weights that belong to it"
            raise UserError(f"{contents.path}: tensor {name} is missing; {why}")
        entry = found[name]
        if entry.shape != shape:
            what = f"{name} has shape {list(entry.shape)}"
            raise UserError(f"{entry.path}: {what}, but config.json asks for {list(shape)}")
        if entry.dtype not in DTYPES:
            raise UserError(f"{entry.path}: {name} has dtype {entry.dtype}; supported are {', '.join(DTYPES)}")
    form = names.LAYOUTS[contents.layout]
    ignored = {form.local("lm_head.weight"), form.tied} if arch.tied or not arch.lm else set()
    ignored |= {name for name in found if name.endswith("rotary_emb.inv_freq")}
    extra = [name for name in found if name not in wanted and name.partition("#")[0] not in ignored]
    if any(name.startswith("pooler_head.") for name in extra):  # of ChatLearn's reward models
        what = "a reward head of two layers (pooler_head), where ours has one"
        raise UserError(f"{contents.path}: {what}; train a reward model here, with mode reward")
    if extra:
        what = f"tensors {some(extra)} are not part of a {arch.family} model of config.json's shape"
        raise UserError(f"{found[extra[0]].path}: {what}")
