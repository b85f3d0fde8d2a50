"""Converts weights on the command line, from any format and layout to any other, without a temporary copy.

./launch.sh convert --from DIR --to DIR --format FORMAT [--tp N] [--pp N] [--dtype bf16|fp16|fp32] [--verify]
LOAD_PATH=... SAVE_PATH=... TP=2 ./launch.sh convert_hf_to_megatron
LOAD_PATH=... SAVE_PATH=... VOCAB_PATH=... ./launch.sh convert_megatron_to_hf
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf import texts
from rlhf.data.tokenizer import TEMPLATES
from rlhf.errors import StorageError, UserError
from rlhf.model.architecture import Architecture
from rlhf.weights import entries, export, files, names
from rlhf.weights.entries import mapped
from rlhf.weights.formats import FORMATS, Target, args
from rlhf.weights.tiles import Tile

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TUTORIAL = ("convert_hf_to_megatron", "convert_megatron_to_hf")
BUCKET = 512 << 20  # largest number of bytes of tensors in memory at a time (or two tensors, if they are larger)
# Files of a Hugging Face folder that are not weights. They are copied into the new folder.
BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    f"{TEMPLATES}/*.jinja",
    "generation_config.json",
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = texts.Parser(
        prog="./launch.sh convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--from", dest="source", required=True, metavar="DIR", help="folder of any format, or of a run")
    p.add_argument("--to", required=True, metavar="DIR", help="folder to make; it must not exist")
    p.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="hf: safetensors; mcore: Megatron core with Transformer Engine's names; mcore-local: without them; "
        "legacy: before Megatron core; torch_dist: Megatron core's sharded checkpoints",
    )
    p.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of the new folder")
    p.add_argument("--pp", type=int, default=1, help="pipeline stages of the new folder")
    p.add_argument("--dtype", choices=DTYPES, help="dtype of the new weights; default: unchanged")
    p.add_argument(
        "--iteration",
        type=int,
        help="iteration of the Megatron checkpoint: to read (default: that of the tracker file) and to write (default: "
        "that which is read, or 1)",
    )
    p.add_argument(
        "--config",
        default="",
        metavar="DIR",
        help="folder with the tokenizer, and with config.json if --from has none",
    )
    p.add_argument(
        "--vocab-divisor",
        type=int,
        default=0,
        metavar="N",
        help="pad the vocabulary to a multiple of N x tp, as Megatron-LM does",
    )
    p.add_argument("--verify", action="store_true", help="read the new folder again and compare every byte")
    return p


def tutorial(command: str, environment: Mapping[str, str]) -> list[str]:
    """Return the arguments for the tutorial's variables. Raises UserError if a variable is missing or invalid."""
    to_hf = command == "convert_megatron_to_hf"
    missing = [name for name in ("LOAD_PATH", "SAVE_PATH") if not environment.get(name)]
    if missing:
        raise UserError(f"{command}: set {' and '.join(missing)} (the folder to read, and the folder to make)")
    legacy = _flag(environment, "USE_LEGACY_MODELS")
    arguments = ["--from", environment["LOAD_PATH"], "--to", environment["SAVE_PATH"]]
    arguments += ["--format", "hf" if to_hf else "legacy" if legacy else "mcore"]
    beside = environment.get("VOCAB_PATH") or environment.get("TOKENIZER_MODEL") or ""
    if beside:
        arguments += ["--config", str(Path(beside).parent if Path(beside).is_file() else beside)]
    if not to_hf:
        arguments += [f"--{name.lower()}={environment[name]}" for name in ("TP", "PP") if environment.get(name)]
    dtype = environment.get("target_params_dtype")
    if dtype and dtype not in (*DTYPES, *DTYPES.values()):
        raise UserError(f"{command}: target_params_dtype={dtype}: set {', '.join(DTYPES)}")
    return arguments + (
        ["--dtype", next(short for short, name in DTYPES.items() if dtype in (short, name))] if dtype else []
    )


def _flag(environment: Mapping[str, str], name: str) -> bool:
    text = environment.get(name, "True")
    if text.lower() not in ("true", "false", "1", "0"):
        raise UserError(f"{name}={text}: set True or False")
    return text.lower() in ("true", "1")


@texts.paths()
def main(arguments: Sequence[str]) -> None:
    """Run the command line. Raises UserError for the first mistake. Nothing is written then."""
    a = parser().parse_args(arguments)
    if a.config and not Path(a.config).is_dir():
        raise UserError(f"--config {a.config}: no such folder; give the one with config.json and tokenizer")
    a.source, a.config = files.locate(a.source), files.locate(a.config)
    arch = files.read_architecture(a.source, a.config, a.iteration)
    source = files.open_folder(a.source, arch, a.iteration, head=arch.scalar)
    _check(a, arch)
    import torch

    stored = {
        shard[tile.local].dtype
        for tiling, shard in zip(source.tilings, source.contents.shards, strict=True)
        for tile in tiling
    }
    name = DTYPES[a.dtype] if a.dtype else entries.DTYPES[stored.pop()] if len(stored) == 1 else ""
    if not name:
        raise UserError(
            f"{a.source}: its tensors have several dtypes, {', '.join(sorted(stored))}: choose one with --dtype"
        )
    dtype = getattr(torch, name)
    iteration = a.iteration or source.contents.iteration or 1
    target = Target(FORMATS[a.format], arch, dtype, a.tp, a.pp, iteration, a.vocab_divisor)
    for remark in [*source.remarks(arch, a.config, "--config"), *(args.unsaid(arch) if a.format != "hf" else ())]:
        print(f"convert: {remark}", file=sys.stderr)
    try:
        _make(a, source, target)
    except OSError as error:
        raise UserError(f"--to {a.to}: {error}") from None
    print(
        f"convert: {a.source} ({source.contents.format}) -> {a.to} ({a.format}, tp {a.tp}, pp {a.pp}, {name})"
        + (", verified" if a.verify else "")
    )


def _make(a: argparse.Namespace, source: files.Source, target: Target) -> None:
    """Write the new folder under a temporary name, and rename it when it is complete."""
    final, where = Path(a.to), files.config_folder(a.source, a.config)
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a conversion that was killed
    beside = [
        {path.relative_to(place): path for pattern in BESIDE for path in Path(place).glob(pattern) if path.is_file()}
        for place in (a.config, where)
        if place
    ]
    try:
        convert(source, target, partial)
        for name, path in next(filter(None, beside), {}).items():  # all from one folder, because they belong together
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copy(path, partial / name)
        export.finish(target, partial, files.read_config(a.source, a.config, a.iteration))
        if a.verify:
            verify(source, target.arch, partial)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after an error


def convert(source: files.Source, target: Target, folder: Path) -> None:
    """Write a target from an opened folder, with a progress bar.

    Raises UserError if there is not enough storage, or if a value is too large for the dtype.
    """
    import torch

    shapes = [shape for tiling in target.files.values() for shape in names.shapes(tiling).values()]
    total = sum(map(prod, shapes)) * target.dtype.itemsize
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    room = shutil.disk_usage(place)
    if room.total and room.free < total:  # some network storage reports 0 for total and free
        raise UserError(
            f"{place} has {room.free / 1e9:.1f} GB left, but the new folder takes {total / 1e9:.1f} GB: "
            "delete files, or choose another --to"
        )
    progress = Progress(total)

    def fill(targets: list[list[Tile]], tensors: dict[str, torch.Tensor]) -> None:
        source.read(targets[0], tensors)
        for name, tensor in tensors.items() if target.dtype == torch.float16 else ():
            if tensor.isinf().any():
                raise UserError(
                    f"{source.path}: {name} has values above 65504, the largest of float16: choose another --dtype"
                )

    for written in export.write_batches(folder, target, fill, rank=0, world=1, bucket=BUCKET):
        progress.add(written)
    progress.close()


def verify(source: files.Source, arch: Architecture, folder: Path) -> None:
    """Open the written folder, compute every tensor again from the source, and compare all bytes.

    Raises StorageError if a byte differs.
    """
    import torch

    written = files.open_folder(folder, arch)
    for tiling, shard in zip(written.contents.tilings(arch, pad=True), written.contents.shards, strict=True):
        for local, shape in names.shapes(tiling).items():
            stored = mapped(shard[local])
            wanted = torch.empty(shape, dtype=stored.dtype)
            source.read([tile for tile in tiling if tile.local == local], {local: wanted})
            if not torch.equal(stored.view(torch.uint8), wanted.view(torch.uint8)):
                raise StorageError(
                    f"{shard[local].path}: {local} differs from what was written, so the storage is faulty: "
                    "choose another --to"
                )


class Progress:
    """Shows the progress in one line on a terminal: the share that is done, and bytes per second."""

    def __init__(self, total: int):
        self.total, self.done, self.start, self.shown = total, 0, time.monotonic(), 0.0

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if sys.stderr.isatty() and now - self.shown > 0.2:
            self.shown, rate = now, self.done / max(1e-9, now - self.start)
            bar = "#" * (40 * self.done // self.total)
            print(
                f"\r[{bar:40}] {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s",
                end="",
                file=sys.stderr,
            )

    def close(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)


def _check(a: argparse.Namespace, arch: Architecture) -> None:
    """Check the arguments, before anything is written. Raises UserError."""
    if Path(a.to).exists():
        raise UserError(f"--to {a.to} exists: give a new folder, or delete it")
    form = FORMATS[a.format]
    if not form.pads and a.vocab_divisor:
        raise UserError(
            f"--vocab-divisor {a.vocab_divisor}: a vocabulary of format {a.format} is not padded; leave it out"
        )
    if not form.split and (a.tp, a.pp) != (1, 1):
        raise UserError(
            f"--tp {a.tp} --pp {a.pp}: a folder of format {a.format} is not split over ranks; leave them out"
        )
    if min(a.tp, a.pp) < 1 or (a.iteration or 0) < 0 or a.vocab_divisor < 0:
        raise UserError("--tp and --pp must be at least 1, --iteration and --vocab-divisor not negative")
    arch.check_split(a.tp, a.pp, said=(f"--tp {a.tp}", f"--pp {a.pp}"))
