"""Hugging Face's format: a folder of safetensors files, or files of torch.save, and a config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rlhf import texts
from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.model.architecture import Architecture
from rlhf.model.families import CAUSAL, EMBEDDING, HEAD, SCALAR
from rlhf.weights import header, names, pt, unsupported
from rlhf.weights.entries import Entry, Shape, groups, intact, kind, mapped, some
from rlhf.weights.formats.format import Contents, Format, Target
from rlhf.weights.tiles import Tile, by_local

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The first of these that exists is read, as in transformers. Without one of them, all files of the first pattern that
# matches are read.
CHOICES = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
BARE = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")  # names in a file of the model without its head
ROWS = 1024  # rows of an output layer that are compared with the embedding; training changes every row
VALUE = "v_head."  # the value head of a model that TRL's PPO has trained


@dataclass(frozen=True, slots=True)
class HuggingFaceContents(Contents):
    """All tensors of a folder, as one shard."""

    def tilings(self, arch: Architecture, pad: bool = False) -> list[list[Tile]]:
        return [names.tiles(arch, self.layout)]

    def architecture(self) -> Architecture:
        return architecture.read(self.path)

    def check(self, arch: Architecture) -> None:
        head, table = (self.shards[0].get(name) for name in (HEAD, EMBEDDING))
        if arch.lm and arch.tied and head and table and head != table and _differ(head, table):
            why = "config.json has tie_word_embeddings true, but this tensor is not the embedding"
            raise UserError(f"{head.path}: {HEAD}: {why}; set it to false there")


class HuggingFace(Format):
    """Folders that transformers and vLLM read."""

    split, pads, needs_config = False, False, True

    def __init__(self) -> None:
        super().__init__("hf", "hf")

    def owns(self, folder: Path, iteration: int | None = None) -> bool:
        return True  # it is the default, so it is asked last; open() reports what is missing

    def open(self, folder: Path, iteration: int | None = None) -> HuggingFaceContents:
        paths = _paths(folder)
        found, remarks = _entries(paths), []
        both = (folder / SINGLE).exists() and (folder / INDEX).exists()
        if both:
            remarks.append(f"{folder} has {SINGLE} and {INDEX}: the first is read, as in transformers")
        if any(name.startswith(VALUE) for name in found):
            remarks.append(f"{folder}: its value head ({VALUE}*) is not used")
        bare = [name for name in found if name.startswith(BARE)]
        plain = not both and not bare and paths == sorted(folder.glob("*.safetensors"))
        shard = {f"model.{name}" if name.startswith(BARE) else name: entry for name, entry in found.items()}
        return HuggingFaceContents(folder, self.name, self.layout, [shard], remarks=remarks, plain=plain)

    def lay_out(self, target: Target) -> dict[str, list[Tile]]:
        whole = by_local(names.tiles(target.arch, self.layout))
        sizes = {name: prod(shape) * target.dtype.itemsize for name, shape in names.hf_shapes(target.arch).items()}
        shares = groups(sizes, target.shard)
        titles = [f"model-{i:05}-of-{len(shares):05}.safetensors" for i in range(1, 1 + len(shares))]
        if len(shares) == 1:
            titles = [SINGLE]
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


def _entries(paths: Sequence[Path]) -> dict[str, Entry]:
    """Return the locations of all tensors in the files of a folder.

    Raises UserError if a file is damaged, or if two files have the same tensor.
    """
    found: dict[str, Entry] = {}
    for path in paths:
        with intact(path, "a file of weights"):
            more = header.entries(path) if path.suffix == ".safetensors" else pt.entries(path, pt.read(path))
        if twice := found.keys() & more.keys():
            first = found[min(twice)].path.name
            raise UserError(f"{path}: tensors {some(sorted(twice))} are in {first} too; download the folder again")
        found |= more
    return found


def _paths(folder: Path) -> list[Path]:
    """Return the files of the weights, in order of their names. Raises UserError if one is missing."""
    for choice in (folder / title for title in CHOICES):
        if choice.exists():
            return [choice] if choice.suffix != ".json" else _listed(choice)
    for pattern in PATTERNS:
        if found := sorted(folder.glob(pattern)):
            return found
    unsupported.explain(folder)
    raise UserError(f"{folder}: no {' or '.join(PATTERNS)} file; save the model in this format first")


def _listed(index: Path) -> list[Path]:
    """Return the files that an index lists."""
    with intact(index, "an index of the files of weights"):
        titles = sorted(set(texts.load(index, "copy it again")["weight_map"].values()))
        if bad := [title for title in titles if "\0" in title or len(title) > 255 or Path(title).name != title]:
            raise UserError(f"{index}: {bad[0]!r:.80} is not the name of a file in this folder; copy it again")
    for path in (paths := [index.with_name(title) for title in titles]):
        if not path.is_file():
            raise UserError(f"{path}: missing, but {index.name} lists it; download it again")
    return paths


def _differ(head: Entry, table: Entry) -> bool:
    """Return whether two matrices have different shapes, or differ in one of up to ROWS rows."""
    import torch

    if head.shape != table.shape:
        return True
    rows = torch.linspace(0, head.shape[0] - 1, min(ROWS, head.shape[0])).long()
    first, second = (mapped(entry)[rows].float() for entry in (head, table))
    return not torch.equal(first, second)
