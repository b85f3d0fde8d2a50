"""What Megatron's args say of the family, its window and its rope scaling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.model.architecture import LARGEST, ORIGINAL, ROPES, Architecture, check_numbers, check_sizes
from rlhf.model.families import FAMILIES

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}  # as in Megatron, for all models
YARN = {  # args for megatron-core's position_embedding_type yarn -> keys of Architecture.rope_scaling
    "yarn_rotary_scaling_factor": "factor",
    "yarn_original_max_position_embeddings": ORIGINAL,
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
    "yarn_correction_range_round_to_int": "truncate",
}


def check(path: Path, args: Mapping[str, Any]) -> None:
    """Raise UserError where args ask for YaRN without its numbers."""
    if args.get("position_embedding_type") == "yarn":
        check_numbers(path, {f"args.{name}": args.get(name) for name, key in YARN.items() if key in ROPES["yarn"][0]})


def family(path: Path, args: Mapping[str, Any]) -> str:
    """The first family that computes what the args describe: they do not name one. Raises UserError where none does."""
    windowed = window(path, args) > 0
    for row in FAMILIES.values():
        same = (row.qkv_bias, row.qk_norm) == (bool(args.get("add_qkv_bias")), bool(args.get("qk_layernorm")))
        if same and (row.window == "all" or not windowed):
            return row.name
    keys = ("add_qkv_bias", "qk_layernorm", "window_size")
    said = ", ".join(f"{key} {args[key]}" for key in keys if args.get(key))
    raise UserError(f"{path}: its args say {said}, which no supported family has together")


def window(path: Path, args: Mapping[str, Any]) -> int:
    """Architecture.window. Megatron counts the keys before a query's own, and those behind it; -1 is all of them."""
    before, behind = args.get("window_size") or (-1, 0)
    if behind != 0:
        raise UserError(f"{path}: its args say window_size {args['window_size']}, and only (tokens, 0) is supported")
    if before == -1:
        return 0
    check_sizes(path, {"args.window_size[0] + 1": before + 1})
    return before + 1 if before + 1 < args.get("max_position_embeddings", LARGEST) else 0


def of_rope(arch: Architecture) -> dict[str, Any]:
    """The args of rope scaling."""
    args: dict[str, Any] = {"position_embedding_type": "rope", "use_rope_scaling": False}
    match arch.rope_kind:
        case "linear":
            return args | {"rotary_seq_len_interpolation_factor": arch.rope_scaling["factor"]}
        case "llama3":
            return args | {"use_rope_scaling": True, "rope_scaling_factor": arch.rope_scaling["factor"]}
        case "yarn":
            numbers = ROPES["yarn"][1] | arch.rope_scaling
            return args | {"position_embedding_type": "yarn"} | {name: numbers[key] for name, key in YARN.items()}
    return args


def rope_scaling(args: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture.rope_scaling."""
    if args.get("position_embedding_type") == "yarn":
        usual = ROPES["yarn"][1]
        numbers = {key: args.get(name) for name, key in YARN.items()}
        return {"rope_type": "yarn"} | {key: n for key, n in numbers.items() if n not in (None, usual.get(key))}
    if factor := args.get("rotary_seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": float(factor)}
    if args.get("use_rope_scaling"):
        return {"rope_type": "llama3", "factor": float(args.get("rope_scaling_factor", 8)), **LLAMA3}
    return {}


def remarks(path: Path, args: Mapping[str, Any], arch: Architecture, where: Path) -> list[str]:
    """Where args and the config.json in `where`, which wins, disagree on what no tensor shows. Args may leave it out."""
    said = {
        "rotary_base": (float(args.get("rotary_base") or arch.rope_theta), arch.rope_theta),
        "rope scaling": (rope_scaling(args) or arch.rope_scaling, arch.rope_scaling),
        "window": (window(path, args) or arch.window, arch.window),
    }
    differ = [(f"{name} {theirs}", ours or "none") for name, (theirs, ours) in said.items() if theirs != ours]
    return [f"{path}: its args say {theirs}, {where}/config.json {ours}: config.json is right" for theirs, ours in differ]


def unsaid(arch: Architecture) -> list[str]:
    """Remarks on what Megatron's args cannot say of a model."""
    if rope_scaling(of_rope(arch)) == arch.rope_scaling:
        return []
    numbers = ", ".join(f"{key} {value}" for key, value in arch.rope_scaling.items())
    return [f"Megatron's args cannot say all of the rope scaling ({numbers}): config.json beside the weights does"]
