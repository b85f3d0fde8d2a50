"""Hugging Face's format: a folder of safetensors files and a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rlhf import texts
from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.model.architecture import Architecture
from rlhf.model.families import CAUSAL, SCALAR
from rlhf.weights import header, names
from rlhf.weights.entries import Entry, Shape, groups, intact, kind, some
from rlhf.weights.formats.format import Contents, Format, Target
from rlhf.weights.tiles import Tile, by_local

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class HuggingFaceContents(Contents):
    """All tensors of a folder, as one shard."""

    def tilings(self, arch: Architecture, pad: bool = False) -> list[list[Tile]]:
        return [names.tiles(arch, self.layout)]

    def architecture(self) -> Architecture:
        return architecture.read(self.path)


class HuggingFace(Format):
    """Folders that transformers and vLLM read."""

    split, pads, needs_config = False, False, True

    def __init__(self) -> None:
        super().__init__("hf", "hf")

    def owns(self, folder: Path, iteration: int | None = None) -> bool:
        return True  # it is the default, so it is asked last; open() reports what is missing

    def open(self, folder: Path, iteration: int | None = None) -> HuggingFaceContents:
        return HuggingFaceContents(folder, self.name, self.layout, [_entries(folder)])

    def lay_out(self, target: Target) -> dict[str, list[Tile]]:
        whole = by_local(names.tiles(target.arch, self.layout))
        sizes = {name: prod(shape) * target.dtype.itemsize for name, shape in names.hf_shapes(target.arch).items()}
        shares = groups(sizes, target.shard)
        titles = [f"model-{i:05}-of-{len(shares):05}.safetensors" for i in range(1, 1 + len(shares))]
        if len(shares) == 1:
            titles = ["model.safetensors"]
        held = zip(titles, shares, strict=True)
        return {title: [tile for name in share for tile in whole[name]] for title, share in held}

    def begin(self, target: Target, path: Path, shapes: Mapping[str, Shape]) -> dict[str, Entry]:
        text, size = header.text({name: (kind(target.dtype), shape) for name, shape in shapes.items()})
        with path.open("wb") as file:
            file.write(text)
            file.truncate(len(text) + size)
        return header.entries(path)

    def finish(self, target: Target, folder: Path, config: Mapping[str, Any]) -> None:
        if len(target.files) > 1:
            shapes = {title: names.shapes(tiling) for title, tiling in target.files.items()}
            size = sum(prod(shape) for held in shapes.values() for shape in held.values()) * target.dtype.itemsize
            where = {name: title for title, held in shapes.items() for name in held}
            texts.save(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        texts.save(folder / "config.json", config)


def description(arch: Architecture) -> dict[str, Any]:
    """Return the content of a config.json for a model that has none."""
    rope: dict[str, Any] = {"rope_theta": arch.rope_theta}
    if arch.rope_scaling:
        rope["rope_scaling"] = arch.rope_scaling
    return {
        "architectures": [arch.row.classes + (CAUSAL if arch.lm else SCALAR)],
        "model_type": arch.family,
        "hidden_act": arch.row.activation,
        "hidden_size": arch.hidden,
        "intermediate_size": arch.ffn,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab,
        "pad_token_id": arch.pad,
        "max_position_embeddings": arch.context,
        "rms_norm_eps": arch.eps,
        "tie_word_embeddings": arch.tied,
        **rope,
        **({} if arch.lm else {"num_labels": 1, "id2label": {"0": "LABEL_0"}}),
        **({"sliding_window": arch.window or None} if arch.row.window == "all" else {}),
    }


def _entries(folder: Path) -> dict[str, Entry]:
    """Return the locations of all tensors of a folder.

    Raises UserError if a file is missing or damaged, or if two files have the same tensor.
    """
    found: dict[str, Entry] = {}
    for path in _paths(folder):
        more = header.entries(path)
        if twice := found.keys() & more.keys():
            first = found[min(twice)].path.name
            raise UserError(f"{path}: tensors {some(sorted(twice))} are in {first} too; download the folder again")
        found |= more
    return found


def _paths(folder: Path) -> list[Path]:
    """Return the files of the weights: those in the index, else model.safetensors, else all *.safetensors files."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.exists():
        with intact(index, "an index of safetensors files"):
            titles = sorted(set(texts.load(index, "copy it again")["weight_map"].values()))
            if bad := [title for title in titles if "\0" in title or len(title) > 255 or Path(title).name != title]:
                raise UserError(f"{index}: {bad[0]!r:.80} is not the name of a file in this folder; copy it again")
            paths = [folder / title for title in titles]
    else:
        paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no *.safetensors file; save the model in this format first")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: missing, but {INDEX} lists it; download it again")
    return paths
