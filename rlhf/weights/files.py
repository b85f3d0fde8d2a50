"""Opens and checks folders of weights in any format, and reads boxes from them.

In every format, a folder is a list of shards: one shard of Hugging Face tensors, or one shard per Megatron rank. A
shard consists of a tiling of the Hugging Face tensors, and of a table with the locations of its own tensors. torch is
imported only in functions that use tensors or .pt files, so a Hugging Face folder can be refused without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import folders, progress, texts
from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.model.architecture import Architecture
from rlhf.weights import names, unsupported
from rlhf.weights.entries import DTYPES, Entry, Shape, mapped, some
from rlhf.weights.formats import FORMATS, Contents, args, hf, inspect, recognise
from rlhf.weights.plan import Move, Plan
from rlhf.weights.tiles import Tile, view

if TYPE_CHECKING:
    import torch

    from rlhf.weights.publish import Transform


# Prefix of the tensors of scalar heads that are not supported -> what they are.
HEADS = {
    "pooler_head.": "a reward head of two layers (pooler_head), but only heads of one layer are supported",  # ChatLearn
    hf.VALUE: "a value head with a bias (v_head, of TRL), but only heads without a bias are supported",
}


@dataclass(frozen=True, slots=True)
class Source:
    """An opened folder. Its tensors are those of an architecture."""

    path: Path
    contents: Contents
    tilings: list[list[Tile]]  # of every shard, without optional tensors that the folder does not have

    def read(
        self,
        tiling: Sequence[Tile],
        tensors: Mapping[str, torch.Tensor],
        transform: Transform | None = None,
    ) -> None:
        """Fill live tensors (local name -> tensor) with the boxes of their tiles.

        Values are converted to the dtypes of the tensors. One stored tensor is mapped at a time. Only the pages of
        these boxes are read, and they are released at once. With a transform, each stored tensor is read as a whole,
        and the boxes are taken from the transformed tensor.
        """
        import torch

        wanted, last = {tile.name for tile in tiling}, None
        with torch.no_grad():
            for move in self._moves(tiling, wanted):
                progress.move()
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
    def plain(self) -> bool:
        """Whether vLLM, which reads Hugging Face folders by itself, would read the same tensors."""
        needed = {tile.local for tiling in self.tilings for tile in tiling}
        return self.contents.plain and all(shard.keys() <= needed for shard in self.contents.shards)

    @property
    def has_head(self) -> bool:
        return any(tile.name == names.SCORE for tiling in self.tilings for tile in tiling)

    def remarks(self, arch: Architecture, beside: str | Path, key: str) -> list[str]:
        """Return remarks on differences between a checkpoint's args and config.json, which has precedence.

        beside: a folder with a config.json. key: the configuration key of this folder.
        """
        where = config_folder(self.path, beside)
        if where is None:
            what = f"rotary_base {self.contents.args.get('rotary_base')} and all other values are those of its args"
            return [
                f"{self.path} has no config.json: {what}; if they are wrong, set {key} to a folder with config.json"
            ]
        return [*self.contents.remarks, *args.remarks(self.path, self.contents.args, arch, where)]

    def _moves(self, tiling: Sequence[Tile], wanted: set[str]) -> list[Move]:
        """Return which box comes from which shard.

        This is a plan in which each shard is a rank. One more rank holds nothing and needs every tile.
        """
        held = [[tile for tile in shard if tile.name in wanted] for shard in self.tilings]
        mine = [tile for tile in tiling if tile.name != names.SCORE or self.has_head]
        return Plan([*held, []], [*([] for _ in held), mine], [0] * (len(held) + 1)).received(len(held))


def locate(text: str) -> str:
    """Return the folder of the model that `text` means.

    That is the newest complete export if `text` is the folder of a run or of one of its steps, and else `text` itself.
    """
    folder = Path(text)
    if not text or (folder / "config.json").exists() or not folder.is_dir():
        return text
    return str(folders.newest_export(folder, FORMATS) or text)


def open_folder(folder: str | Path, arch: Architecture, iteration: int | None = None, head: bool = False) -> Source:
    """Open a folder of any format, and check it. Only headers are read.

    Raises UserError with the name of the file, unless the folder has exactly the tensors of arch. A scalar model may be
    loaded from a causal one. An output layer that it does not use is ignored. A missing scalar head becomes zeros, or
    is an error if `head` is True.
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
        raise UserError(f"{what}: it is no reward model, and all its scores would be 0; give a reward model")
    return source


def read(folder: str | Path, arch: Architecture, tiling: Sequence[Tile], tensors: Mapping[str, torch.Tensor]) -> None:
    """Open a folder and fill live tensors from it. Rows that no tile covers are not changed."""
    open_folder(folder, arch).read(tiling, tensors)


def config_folder(folder: str | Path, beside: str | Path = "") -> Path | None:
    """Return the folder with the config.json of the model in `folder`; None if there is none and none is needed.

    beside: a folder with a config.json, for Megatron's formats, which need not contain one.
    """
    folder, form = Path(folder), recognise(folder)
    places = form.config_folders(folder, Path(beside) if beside else None)
    found = [place for place in places if (place / "config.json").exists()]
    return found[0] if found else folder if form.needs_config else None


def read_architecture(folder: str | Path, beside: str | Path = "", iteration: int | None = None) -> Architecture:
    """Return the architecture of the model in a folder: from config.json, or else from the checkpoint's args.

    Raises UserError with the kind of the folder if it is of another kind.
    """
    unsupported.check(Path(folder))
    where = config_folder(folder, beside)
    if where and not (where / "config.json").exists():
        unsupported.explain(where)
    return architecture.read(where) if where else inspect(folder, iteration).architecture()


def read_config(folder: str | Path, beside: str | Path = "", iteration: int | None = None) -> dict[str, Any]:
    """Return the content of the model's config.json. If there is none, make it from the architecture."""
    where = config_folder(folder, beside)
    if where:
        return texts.load(where / "config.json", architecture.REMEDY)
    return hf.description(read_architecture(folder, beside, iteration))


def _check(contents: Contents, arch: Architecture, wanted: Mapping[str, Shape], found: Mapping[str, Entry]) -> None:
    """Raise UserError unless a shard holds exactly the wanted tensors, in supported dtypes."""
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
    ignored |= {name for name in found if name.startswith(hf.VALUE) and not arch.scalar}  # as in transformers
    extra = [name for name in found if name not in wanted and name.partition("#")[0] not in ignored]
    for prefix, what in HEADS.items():
        if any(name.startswith(prefix) for name in extra):
            raise UserError(f"{contents.path}: it has {what}; train a reward model with mode reward")
    if extra:
        what = f"tensors {some(extra)} are not part of a {arch.family} model of config.json's shape"
        raise UserError(f"{found[extra[0]].path}: {what}")
