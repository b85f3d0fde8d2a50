"""Hugging Face folders of safetensors: found, described by their headers, and begun.

The format: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, data_offsets), the data.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import texts
from rlhf.errors import UserError
from rlhf.model.architecture import Architecture
from rlhf.weights.entries import Entry, Shape, groups, intact, kind, some

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
HEADS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # family -> class name's start


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder, from the headers alone. Raises UserError where a file is missing, cut short or not safetensors."""
    found: dict[str, Entry] = {}
    for path in _paths(folder):
        more = _header(path)
        if twice := found.keys() & more.keys():
            raise UserError(f"{path}: tensors {some(sorted(twice))} are in {found[min(twice)].path.name} too; download the folder again")
        found |= more
    return found


def titles(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File -> its tensors, of at most limit bytes together."""
    shares = groups(sizes, limit)
    if len(shares) == 1:
        return {"model.safetensors": shares[0]}
    return {f"model-{i:05}-of-{len(shares):05}.safetensors": share for i, share in enumerate(shares, 1)}


def begin(path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype) -> dict[str, Entry]:
    """Write the header of a new file; where its tensors will go."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, shape in shapes.items():
        start, stop = stop, stop + prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind(dtype), "shape": shape, "data_offsets": (start, stop)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)
    return _header(path)


def index(folder: Path, files: Mapping[str, list[str]], size: int) -> None:
    """Write what lists the tensors of several files."""
    if len(files) > 1:
        where = {name: title for title, group in files.items() for name in group}
        save_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def description(arch: Architecture) -> dict[str, Any]:
    """The config.json of a model that came without one."""
    rope: dict[str, Any] = {"rope_theta": arch.rope_theta}
    if arch.rope_scaling:
        rope["rope_scaling"] = {"rope_type": "llama3", **arch.rope_scaling}
    return {
        "architectures": [HEADS[arch.family] + ("ForCausalLM" if arch.lm else "ForSequenceClassification")],
        "model_type": arch.family,
        "hidden_act": "silu",
        "hidden_size": arch.hidden,
        "intermediate_size": arch.ffn,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab,
        "max_position_embeddings": arch.context,
        "rms_norm_eps": arch.eps,
        "tie_word_embeddings": arch.tied,
        **rope,
        **({} if arch.lm else {"num_labels": 1, "id2label": {"0": "LABEL_0"}}),
        **({"sliding_window": None} if arch.family == "mistral" else {}),
    }


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is either whole or not there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(path)


def _paths(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index, or model.safetensors, or whatever safetensors there are."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.exists():
        with intact(index, "an index of safetensors files"):
            titles = sorted(set(texts.load(index, "copy it again")["weight_map"].values()))
            if bad := [title for title in titles if "\0" in title or len(title) > 255 or Path(title).name != title]:
                raise UserError(f"{index}: {bad[0]!r:.80} is no name of a file in this folder; copy it again")
            paths = [folder / title for title in titles]
    else:
        paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no *.safetensors file; save the model in that format first")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: missing, though {INDEX} lists it; download it again")
    return paths


def _header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > 100 << 20:  # the format's own limit; a text file's first letters make a far larger number
            raise UserError(f"{path}: not a safetensors file, or cut short at {size} bytes; download it again")
        text = file.read(length)
    if len(text) < length:
        raise UserError(f"{path}: cut short at {size} bytes, its header alone has {8 + length}; download it again")
    with intact(path, "a safetensors file"):
        header, data = texts.parse(text), 8 + length
        header.pop("__metadata__", None)
        found = {name: _entry(path, at, data) for name, at in header.items()}
    end = data
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:  # nor do those overlap that others read
            raise UserError(f"{path}: {name} starts at byte {entry.start}, the tensor before it ends at {end}; download it again")
        end = entry.stop
    if size != end:
        what = "cut short at" if size < end else "longer than it says:"
        raise UserError(f"{path}: {what} {size} of {end} bytes; download it again")
    return found


def _entry(path: Path, at: Mapping[str, Any], data: int) -> Entry:
    """What the header says of one tensor; data is where the first one starts."""
    start, stop = (operator.index(offset) for offset in at["data_offsets"])
    if not 0 <= start <= stop:
        raise ValueError(f"a tensor starts at {start} and stops at {stop}")
    return Entry(path, str(at["dtype"]), tuple(map(operator.index, at["shape"])), data + start, data + stop)
