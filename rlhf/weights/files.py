"""Folders of weights, whatever their format: opened, checked, read box by box, written from files or from a model on many ranks.

Every format is a list of shards (one of Hugging Face tensors, or one per Megatron rank), each a tiling of the same tensors and a table
of where its own tensors lie. torch is imported where tensors are handled, and to look into .pt files, so that a Hugging Face folder
can be refused before anything else is loaded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import texts
from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.model.architecture import Architecture
from rlhf.weights import args, hf, megatron, names, torch_dist
from rlhf.weights.entries import DTYPES, SIZES, Entry, Shape, groups, kind, mapped, some, store
from rlhf.weights.plan import Move, Plan
from rlhf.weights.tiles import Tile, view

if TYPE_CHECKING:
    import torch

FORMATS = {  # what can be written -> its layout
    "hf": "hf",
    "mcore": "mcore-te",
    "mcore-local": "mcore",
    "legacy": "legacy",
    "torch_dist": "mcore-te",
}
Fill = Callable[
    [list[list[Tile]], dict[str, "torch.Tensor"]], None
]  # the tiles that every rank wants now, and this rank's tensors for them


@dataclass(frozen=True, slots=True)
class Source:
    """An opened folder."""

    path: Path
    layout: str  # in names.LAYOUTS
    tilings: list[list[Tile]]  # of every shard, as the architecture asks for them
    shards: list[dict[str, Entry]]  # what every shard has, by local name
    checkpoint: megatron.Checkpoint | None = None

    def read(self, tiling: Sequence[Tile], tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill live tensors (local name -> tensor) with the boxes of their tiles, cast to the tensors' own dtypes.

        Files are mapped one tensor at a time, so only the pages of these boxes are read, and given back at once.
        """
        import torch

        wanted, last = {tile.name for tile in tiling}, None
        with torch.no_grad():
            for move in self._moves(tiling, wanted):
                entry = self.shards[move.source][move.source_tile.local]
                if entry != last:
                    last, stored = entry, mapped(entry)
                source = view(stored, move.source_tile, move.box)
                view(tensors[move.target_tile.local], move.target_tile, move.box).copy_(source)
            for tile in tiling:
                if tile.name == names.SCORE and not self.has_head:
                    view(tensors[tile.local], tile, tile.box).zero_()

    @property
    def has_head(self) -> bool:
        return any(tile.name == names.SCORE for tiling in self.tilings for tile in tiling)

    def remarks(self, arch: Architecture, beside: str | Path, key: str) -> list[str]:
        """Where a checkpoint's args and the config.json that wins over them disagree; key is how to name `beside`, a folder with one."""
        where = described(self.path, beside)
        if where is None:
            base = self.checkpoint.args.get("rotary_base") if self.checkpoint else None
            return [f"{self.path} has no config.json: rotary_base {base}, and all else, is what its args say; {key} gives a better one"]
        return args.remarks(self.path, self.checkpoint.args, arch, where) if self.checkpoint else []

    def _moves(self, tiling: Sequence[Tile], wanted: set[str]) -> list[Move]:
        """Which box comes from which shard: the plan of a world whose last rank alone holds nothing and wants everything."""
        held = [[tile for tile in shard if tile.name in wanted] for shard in self.tilings]
        mine = [tile for tile in tiling if tile.name != names.SCORE or self.has_head]
        return Plan([*held, []], [*([] for _ in held), mine], [0] * (len(held) + 1)).received(len(held))


def open_folder(folder: str | Path, arch: Architecture, iteration: int | None = None, head: bool = False) -> Source:
    """Find out what a folder is, and check it. Reads headers only.

    Raises UserError, naming the file, unless it holds exactly the tensors of arch. A scalar model may come from a causal one: its
    head may be missing (it becomes zeros) unless `head` asks for it, and an output layer that it does not use is ignored.
    """
    folder = Path(folder)
    checkpoint = megatron.load(folder, iteration) if megatron.is_checkpoint(folder) else None
    if checkpoint:
        if checkpoint.vocab < arch.vocab:
            raise UserError(f"{checkpoint.path}: a vocabulary of {checkpoint.vocab} rows, but config.json asks for {arch.vocab}")
        if arch.layers % checkpoint.pp:
            raise UserError(f"{checkpoint.path}: {checkpoint.pp} pipeline stages cannot share config.json's {arch.layers} layers evenly")
        layout, shards = checkpoint.layout, checkpoint.shards
        tilings, padded = checkpoint.tilings(arch), checkpoint.tilings(arch, pad=True)
    else:
        layout, shards = "hf", [hf.entries(folder)]
        tilings = padded = [names.tiles(arch, "hf")]
    for tiling, shard in zip(padded, shards, strict=True):
        _check(folder, arch, layout, names.shapes(tiling), shard)
    held = [[tile for tile in tiling if tile.local in shard] for tiling, shard in zip(tilings, shards, strict=True)]
    source = Source(folder, layout, held, shards, checkpoint)
    if head and not source.has_head:
        raise UserError(f"{folder} has no scalar head ({names.SCORE}): it is no reward model, and all of its scores would be 0")
    return source


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder is Megatron's, and not Hugging Face's."""
    return megatron.is_checkpoint(Path(folder))


def read(folder: str | Path, arch: Architecture, tiling: Sequence[Tile], parameters: Mapping[str, torch.Tensor]) -> None:
    """Fill live tensors from a folder of any format that has passed check(); rows that no tile covers are left alone."""
    open_folder(folder, arch).read(tiling, parameters)


def model(folder: str | Path, beside: str | Path = "", iteration: int | None = None) -> Architecture:
    """The architecture of a folder: from its config.json, or the one `beside` it, or from a Megatron checkpoint's own args."""
    where = described(folder, beside)
    return architecture.read(where) if where else megatron.architecture(megatron.load(Path(folder), iteration))


def config(folder: str | Path, beside: str | Path = "", iteration: int | None = None) -> dict[str, Any]:
    """What config.json says of the model in a folder, or would."""
    where = described(folder, beside)
    return texts.load(where / "config.json", architecture.REMEDY) if where else hf.description(model(folder, beside, iteration))


def described(folder: str | Path, beside: str | Path = "") -> Path | None:
    """The folder with the config.json of a model; None: it is a Megatron checkpoint that has none.

    A Hugging Face folder without one is incomplete, so what is beside describes Megatron's alone.
    """
    checkpoint = megatron.is_checkpoint(Path(folder))
    places = [Path(folder), Path(folder).parent] if megatron.is_iteration(Path(folder)) else [Path(folder)]
    found = [place for place in (*places, *([Path(beside)] if beside and checkpoint else [])) if (place / "config.json").exists()]
    return found[0] if found else None if checkpoint else Path(folder)


@dataclass(frozen=True, slots=True)
class Target:
    """A folder to be: what each of its files holds."""

    format: str  # in FORMATS
    tilings: dict[str, list[Tile]]  # file -> tiles of its tensors
    tp: int = 1
    pp: int = 1
    vocab: int = 0  # rows of the vocabulary, with what pads it
    iteration: int = 1

    def begin(self, folder: Path, title: str, arch: Architecture, dtype: torch.dtype) -> dict[str, Entry]:
        """Make one file with room for its tensors; where they go."""
        shapes, path = names.shapes(self.tilings[title]), folder / title
        if self.format == "hf":
            return hf.begin(path, shapes, dtype)
        layout = FORMATS[self.format]
        args = megatron.describe(arch, layout, self.tp, self.pp, self.vocab, dtype, self.iteration)
        if self.format == "torch_dist":
            return torch_dist.begin(path, shapes, dtype, args)
        return megatron.begin(path, layout, shapes, dtype, args)

    def finish(self, folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        """The small files beside the weights. What makes the folder complete comes last."""
        key = "dtype" if "dtype" in config else "torch_dtype"  # transformers renamed it; it reads both
        config = {**config, key: DTYPES[kind(dtype)]}
        if self.format == "hf":
            held = {title: list(names.shapes(tiling)) for title, tiling in self.tilings.items()}
            size = sum(prod(shape) for tiling in self.tilings.values() for shape in names.shapes(tiling).values())
            hf.index(folder, held, size * dtype.itemsize)
        hf.save_json(folder / "config.json", config)
        if self.format != "hf":
            megatron.track(folder, self.iteration)


def target(
    arch: Architecture,
    format: str,
    dtype: torch.dtype,
    *,
    tp: int = 1,
    pp: int = 1,
    iteration: int = 1,
    divisor: int = 0,
    shard: int = 4 << 30,
) -> Target:
    """Lay out a folder in one of FORMATS.

    divisor   of the rows of the vocabulary, times tp, as Megatron-LM's make_vocab_size_divisible_by; 0: no padding where tp divides
              the vocabulary, else 128 as there
    shard     bytes of tensors per Hugging Face file, at most (a larger tensor gets a file of its own)
    """
    if format == "hf":
        whole = _by_local(names.tiles(arch, "hf"))
        sizes = {name: prod(shape) * dtype.itemsize for name, shape in names.hf_shapes(arch).items()}
        return Target("hf", {title: [tile for name in held for tile in whole[name]] for title, held in hf.titles(sizes, shard).items()})
    if format == "torch_dist":
        tp = pp = 1  # any layout reads it
    unit = tp * (divisor or (1 if arch.vocab % tp == 0 else 128))
    vocab = -(-arch.vocab // unit) * unit
    if format == "torch_dist":
        title = f"iter_{iteration:07}/{torch_dist.DATA}"
        return Target(format, {title: names.tiles(arch, FORMATS[format], rows=vocab, pad=True)}, tp, pp, vocab, iteration)
    tilings = {
        megatron.title(iteration, t, p, pp): names.tiles(arch, FORMATS[format], (t, tp), (p, pp), rows=vocab, pad=True)
        for p in range(pp)
        for t in range(tp)
    }
    return Target(format, tilings, tp, pp, vocab, iteration)


def write(
    folder: str | Path,
    arch: Architecture,
    config: Mapping[str, Any],
    sources: Sequence[Sequence[Tile]],
    parameters: Mapping[str, torch.Tensor],
    *,
    rank: int,
    nodes: Sequence[int],
    dtype: torch.dtype,
    shard: int = 4 << 30,
    bucket: int = 512 << 20,
    format: str = "hf",
    tp: int = 1,
    pp: int = 1,
) -> None:
    """Write a model that lives on many ranks as a folder; every rank calls it.

    folder      new or empty, on storage that all ranks share; what interrupts this leaves a folder without config.json or tracker file
    config      what config.json will say, but for the dtype
    sources     the tiles of every rank; parameters are this rank's, by local name
    nodes       the node of every rank
    dtype       of the files
    shard       bytes of tensors per Hugging Face file, at most (a larger tensor gets a file of its own)
    bucket      bytes of tensors that a rank holds at a time, at most (or two tensors)
    format      in FORMATS, with tp and pp the layout of Megatron's
    """
    from rlhf.weights.publish import Publisher

    device = next(iter(parameters.values())).device

    def fill(targets: list[list[Tile]], tensors: dict[str, torch.Tensor]) -> None:
        Publisher(Plan(sources, targets, nodes), rank, dtype, bucket).publish(parameters, tensors)

    to = target(arch, format, dtype, tp=tp, pp=pp, shard=shard)
    for _ in carry(Path(folder), arch, to, fill, dtype, rank=rank, world=len(sources), bucket=bucket, device=device):
        pass
    if rank == 0:
        to.finish(Path(folder), config, dtype)
    _barrier(len(sources))


def carry(
    folder: Path, arch: Architecture, to: Target, fill: Fill, dtype: torch.dtype, *, rank: int, world: int, bucket: int, device: Any = "cpu"
) -> Iterator[int]:
    """Write a target's files, which are shared out over the ranks; yields the bytes written by this rank after each batch.

    Tensors are assembled in batches of at most half of bucket bytes (or one tensor), the same number on every rank, while the batch before
    is written.
    """
    import torch

    owned = [[title for i, title in enumerate(to.tilings) if i * world // len(to.tilings) == r] for r in range(world)]
    folder.mkdir(parents=True, exist_ok=True)
    assert not any((folder / title).exists() for title in owned[rank]), f"{folder} already holds weights"
    stored = {title: to.begin(folder, title, arch, dtype) for title in owned[rank]}
    shapes = {title: names.shapes(tiling) for title, tiling in to.tilings.items()}
    tiling = {title: _by_local(tiles) for title, tiles in to.tilings.items()}
    batches = [[(title, group) for title in titles for group in _batches(shapes[title], dtype, bucket // 2)] for titles in owned]
    largest = max((sum(prod(shapes[title][local]) for local in group) for title, group in batches[rank]), default=0)
    # Two rooms for all batches in turn (fresh memory would cost more than the copies): one is filled while the other is written.
    rooms = deque(torch.empty(largest, dtype=dtype, device=device) for _ in range(2))
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as writer:
        for batch in zip_longest(*batches):  # one for every rank, None where one is done
            if len(writing) == len(rooms):
                writing.popleft().result()
            wanted = [[tile for local in one[1] for tile in tiling[one[0]][local]] if one else [] for one in batch]
            title, group = batch[rank] or ("", [])
            sizes = [prod(shapes[title][local]) for local in group]
            pieces = rooms[0][: sum(sizes)].split(sizes)
            rooms.rotate()
            tensors = {local: piece.view(shapes[title][local]) for local, piece in zip(group, pieces, strict=True)}
            fill(wanted, tensors)
            held = {local: tensor.cpu() for local, tensor in tensors.items()}  # here: on a device the writer's thread has another stream
            writing.append(writer.submit(_store, stored.get(title, {}), held))
            yield sum(sizes) * dtype.itemsize
        for last in writing:
            last.result()
    _barrier(world)


def _store(entries: Mapping[str, Entry], tensors: Mapping[str, torch.Tensor]) -> None:
    for local, tensor in tensors.items():
        store(entries[local], tensor)


def _batches(shapes: Mapping[str, Shape], dtype: torch.dtype, bucket: int) -> list[list[str]]:
    return groups({local: prod(shape) * dtype.itemsize for local, shape in shapes.items()}, bucket)


def _by_local(tiling: Sequence[Tile]) -> dict[str, list[Tile]]:
    found: dict[str, list[Tile]] = {}
    for tile in tiling:
        found.setdefault(tile.local, []).append(tile)
    return found


def _check(folder: Path, arch: Architecture, layout: str, wanted: Mapping[str, Shape], found: Mapping[str, Entry]) -> None:
    """Whether one shard has what it should."""
    for name, shape in wanted.items():
        if name not in found and name.partition("#")[0] == names.SCORE:
            continue
        if name not in found:
            raise UserError(f"{folder}: tensor {name} is missing; config.json asks for it, so download the weights that belong to it")
        entry = found[name]
        if entry.shape != shape:
            raise UserError(f"{entry.path}: {name} has shape {list(entry.shape)}, but config.json asks for {list(shape)}")
        if entry.dtype not in DTYPES:
            raise UserError(f"{entry.path}: {name} has dtype {entry.dtype}; supported are {', '.join(DTYPES)}")
        if entry.stop - entry.start != prod(shape) * SIZES[entry.dtype]:
            raise UserError(f"{entry.path}: {name} has {entry.stop - entry.start} bytes, its shape asks for others; download it again")
    form = names.LAYOUTS[layout]
    ignored = {form.local("lm_head.weight"), form.tied} if arch.tied or not arch.lm else set()
    extra = [n for n in found if n not in wanted and n.partition("#")[0] not in ignored and not n.endswith("rotary_emb.inv_freq")]
    if any(name.startswith("pooler_head.") for name in extra):  # of ChatLearn's reward models
        raise UserError(
            f"{folder}: a reward head of two layers (pooler_head), where ours has one; train a reward model here, with mode reward"
        )
    if extra:
        raise UserError(f"{found[extra[0]].path}: tensors {some(extra)} are not part of a {arch.family} model of config.json's shape")


def _barrier(world: int) -> None:
    import torch.distributed as dist

    if world > 1:
        dist.barrier()
