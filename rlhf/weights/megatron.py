"""Megatron-LM's checkpoint folders, of megatron-core models and of the legacy ones: found, described, and begun.

    latest_checkpointed_iteration.txt            a number, or `release`
    iter_0000001/mp_rank_{tp:02}/model_optim_rng.pt        with pipeline stages mp_rank_{tp:02}_{pp:03}

A .pt file is a zip archive: one record is a pickle of the tree of dicts, each other one is the raw bytes of a storage. It is never read as
a whole: what is kept is where each tensor's bytes are.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import texts
from rlhf.errors import UserError
from rlhf.model.architecture import Architecture, check_numbers, check_sizes
from rlhf.weights import names, pt, torch_dist
from rlhf.weights.entries import Entry, Shape, intact, kind
from rlhf.weights.tiles import Tile

if TYPE_CHECKING:
    import torch

TRACKER = "latest_checkpointed_iteration.txt"
DIGITS = 9  # of an iteration's number, at most
FILE = "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
# What args may say that no tensor shows, -> what we compute.
UNSEEN = {"apply_layernorm_1p": False, "rotary_interleaved": False, "rotary_percent": 1.0, "rotary_seq_len_interpolation_factor": None}
NUMBERS = ("rotary_base", "rope_scaling_factor", "norm_epsilon", "layernorm_epsilon")
LINEAR = {  # the linear layers whose (empty) extra state a strict load asks for
    "mcore": ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"),
    "legacy": ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The rank files of one iteration."""

    path: Path  # the folder of the iteration
    iteration: int
    layout: str  # in names.LAYOUTS
    tp: int
    pp: int
    args: dict[str, Any]  # of the first rank file
    shards: list[dict[str, Entry]]  # by pipeline stage, then tensor-parallel rank: local name -> where it is
    sharded: torch_dist.Sharded | None = None  # a torch_dist folder: one shard that holds everything

    @property
    def vocab(self) -> int:
        """Rows of the embedding over all ranks, with whatever pads it."""
        if self.sharded:
            return self.sharded.vocab
        local = names.LAYOUTS[self.layout].local("model.embed_tokens.weight")
        if local not in self.shards[0] or len(self.shards[0][local].shape) != 2:
            raise UserError(f"{self.path}: no matrix {local} in the first rank file; this is not a GPT model's checkpoint")
        return self.shards[0][local].shape[0] * self.tp

    def tilings(self, arch: Architecture, pad: bool = False) -> list[list[Tile]]:
        """What each of the shards holds, if it is a model of arch."""
        if self.sharded:
            return [self.sharded.tiling(arch, pad)]
        ranks = [((t, self.tp), (p, self.pp)) for p in range(self.pp) for t in range(self.tp)]
        return [names.tiles(arch, self.layout, *rank, rows=self.vocab, pad=pad) for rank in ranks]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is Megatron-LM's, by the names in it."""
    signs = (TRACKER, *(f"{place}{sign}" for place in ("", "iter_*/") for sign in ("mp_rank_*", torch_dist.METADATA)))
    return any(True for sign in signs for _ in folder.glob(sign))


def is_iteration(folder: Path) -> bool:
    """Whether a folder is the part of Megatron-LM's that holds one iteration."""
    return any(folder.glob("mp_rank_*")) or (folder / torch_dist.METADATA).exists()


def load(folder: Path, iteration: int | None = None) -> Checkpoint:
    """Describe a checkpoint, that of the tracker file or of the given iteration. Reads no tensor.

    Raises UserError where rank files are missing, hold more than weights and numbers, or a model that computes something else.
    """
    path = _iteration(folder, iteration)
    with intact(path, "a checkpoint"):
        checkpoint = _load(path)
    for name, ours in UNSEEN.items():
        if checkpoint.args.get(name, ours) != ours:
            raise UserError(f"{checkpoint.path}: its args say {name} {checkpoint.args[name]}, which is not supported; supported is {ours}")
    check_numbers(checkpoint.path, {f"args.{name}": said for name in NUMBERS if (said := checkpoint.args.get(name)) is not None})
    return checkpoint


def _load(path: Path) -> Checkpoint:
    if (path / torch_dist.METADATA).exists():
        sharded = torch_dist.load(path)
        args = dict(vars(sharded.common["args"])) if "args" in sharded.common else {}
        return Checkpoint(path, _number(sharded.common), sharded.layout, 1, 1, args, [sharded.entries], sharded)
    found = {tuple(int(n or 0) for n in match.groups()): child for child in path.iterdir() if (match := RANK.fullmatch(child.name))}
    if not found:
        raise UserError(f"{path}: no mp_rank_* folder; a Megatron checkpoint has one for every rank")
    trees = {rank: pt.read(child / FILE) for rank, child in sorted(found.items())}
    first = next(iter(trees.values()))
    args = dict(vars(first["args"])) if "args" in first else {}
    if first.get("checkpoint_version", 3.0) < 2.0:
        version = first["checkpoint_version"]
        raise UserError(
            f"{path}: checkpoint_version {version}, whose rows of q, k and v have another order; save it with a newer Megatron-LM"
        )
    tp = args.get("tensor_model_parallel_size") or max(t for t, _ in found) + 1
    pp = args.get("pipeline_model_parallel_size") or max(p for _, p in found) + 1
    missing = [rank for rank in ((t, p) for p in range(pp) for t in range(tp)) if rank not in trees]
    if missing or len(found) > tp * pp:
        what = f"mp_rank_{missing[0][0]:02}" + (f"_{missing[0][1]:03}" if pp > 1 else "") if missing else "too many mp_rank_* folders"
        raise UserError(f"{path}: {what}{' is missing' if missing else ''} of {tp} x {pp} ranks: copy the checkpoint again, completely")
    shards = [_entries(found[t, p] / FILE, trees[t, p]) for p in range(pp) for t in range(tp)]
    return Checkpoint(path, _number(first), _layout(shards[0]), tp, pp, args, shards)


def _number(tree: Mapping[str, Any]) -> int:
    """The iteration that a tree is of; 0 where it has no number, as a release's may."""
    found = tree.get("iteration")
    return found if isinstance(found, int) else 0


def title(iteration: int, tp: int, pp: int, size: int) -> str:
    """Where the file of one rank of a layout with `size` pipeline stages goes, in a checkpoint folder."""
    return f"iter_{iteration:07}/mp_rank_{tp:02}{f'_{pp:03}' if size > 1 else ''}/{FILE}"


def begin(path: Path, layout: str, shapes: Mapping[str, Shape], dtype: torch.dtype, args: Mapping[str, Any]) -> dict[str, Entry]:
    """Write a rank file in which the tensors' bytes are still to come; where they will go."""
    import torch

    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}  # never touched, so they take no memory
    tree = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": args["iteration"],
        "model": _nest(layout, tensors, args),
        "num_floating_point_operations_so_far": 0,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.serialization.skip_data():
        pt.write(tree, path)
    return _entries(path, pt.read(path))


def track(folder: Path, iteration: int) -> None:
    """Name the iteration that is complete."""
    partial = folder / f"{TRACKER}.partial"
    partial.write_text(str(iteration))
    partial.rename(folder / TRACKER)


def describe(arch: Architecture, layout: str, tp: int, pp: int, vocab: int, dtype: torch.dtype, iteration: int) -> dict[str, Any]:
    """The args of a checkpoint: what Megatron-LM's load_args_from_checkpoint and check_checkpoint_args ask for, and the true rope."""
    import torch

    scaling = {"rope_scaling_factor": arch.rope_scaling["factor"]} if arch.rope_scaling else {}
    return {
        "num_layers": arch.layers,
        "encoder_num_layers": arch.layers,
        "hidden_size": arch.hidden,
        "ffn_hidden_size": arch.ffn,
        "num_attention_heads": arch.heads,
        "group_query_attention": arch.kv_heads != arch.heads,
        "num_query_groups": arch.kv_heads,
        "kv_channels": arch.head_dim,
        "seq_length": arch.context,
        "max_position_embeddings": arch.context,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(arch.rope_theta) if arch.rope_theta.is_integer() else arch.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": bool(scaling),
        **scaling,
        "normalization": "RMSNorm",
        "norm_epsilon": arch.eps,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "qk_layernorm": arch.qk_norm,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "untie_embeddings_and_output_weights": not arch.tied,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "vocab_size": arch.vocab,
        "padded_vocab_size": vocab,
        "make_vocab_size_divisible_by": next(
            n for n in (128, 64, 32, 16, 8, 4, 2, 1, vocab // tp) if -arch.vocab % (n * tp) == vocab - arch.vocab
        ),
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": None,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "world_size": tp * pp,
        "params_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "use_legacy_models": layout == "legacy",
        "use_mcore_models": layout != "legacy",
        "transformer_impl": "transformer_engine" if layout == "mcore-te" else "local",
        "iteration": iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def architecture(checkpoint: Checkpoint) -> Architecture:
    """The model that a checkpoint's args describe, for folders without a config.json. Raises UserError where they lack something."""
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # as in Megatron, for all models
    a, last, form = checkpoint.args, {name.partition("#")[0] for name in checkpoint.shards[-1]}, names.LAYOUTS[checkpoint.layout]
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings")
    groups = ("num_query_groups",) if a.get("group_query_attention") else ()
    optional = ("vocab_size",) if a.get("vocab_size") else ()
    try:
        check_sizes(checkpoint.path, {f"args.{key}": a[key] for key in (*needed, *groups, *optional)})
        return Architecture(
            family="qwen3" if a.get("qk_layernorm") else "qwen2" if a.get("add_qkv_bias") else "llama",
            layers=a["num_layers"],
            hidden=a["hidden_size"],
            ffn=a["ffn_hidden_size"],
            heads=a["num_attention_heads"],
            kv_heads=a["num_query_groups"] if a.get("group_query_attention") else a["num_attention_heads"],
            head_dim=a["kv_channels"],
            vocab=a.get("vocab_size") or checkpoint.vocab,
            context=a["max_position_embeddings"],
            eps=a["norm_epsilon"] if "norm_epsilon" in a else a["layernorm_epsilon"],
            tied=not a["untie_embeddings_and_output_weights"],
            qkv_bias=bool(a.get("add_qkv_bias")),
            qk_norm=bool(a.get("qk_layernorm")),
            rope_theta=float(a.get("rotary_base") or 10000),
            rope_scaling={"factor": float(a.get("rope_scaling_factor", 8)), **scaling} if a.get("use_rope_scaling") else {},
            # A tied output layer alone has no tensor that would tell; a reward model is taken to be without.
            lm=bool(last & {form.local("lm_head.weight"), form.tied})
            or (not a["untie_embeddings_and_output_weights"] and names.SCORE not in last),
            scalar=names.SCORE in last,
        )
    except KeyError as error:
        raise UserError(f"{checkpoint.path}: args has no {error}: copy the model's config.json into {checkpoint.path.parent}") from None


def _iteration(folder: Path, iteration: int | None) -> Path:
    """The folder that holds the rank folders."""
    if is_iteration(folder):
        return folder
    if iteration is not None:
        wanted = f"iter_{iteration:07}"
    elif (folder / TRACKER).exists():
        text = texts.read(folder / TRACKER, "name the iteration that is complete").strip()
        if text != "release" and not (text.isdecimal() and len(text) <= DIGITS):
            raise UserError(f"{folder / TRACKER}: {text[:40]!r} is neither a number nor release: name the iteration that is complete")
        wanted = text if text == "release" else f"iter_{int(text):07}"
    else:
        found = sorted(child.name for child in folder.glob("iter_*"))
        raise UserError(f"{folder}: no {TRACKER}, so {', '.join(found)} may be incomplete; give one of these folders itself if it is not")
    if not (folder / wanted).is_dir():
        raise UserError(f"{folder}: no folder {wanted}; there are {', '.join(sorted(c.name for c in folder.iterdir() if c.is_dir()))}")
    return folder / wanted


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a tree, their keys joined by dots."""
    import torch

    if isinstance(tree, torch.Tensor):
        yield prefix[:-1], tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}{key}.")
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from _flat(value, f"{prefix}{i}.")


def _entries(path: Path, tree: Mapping[str, Any]) -> dict[str, Entry]:
    """Where the tensors of the model lie in the file.

    The file is mapped as a whole, so a tensor's address says where its bytes are: the first storage in memory is the first in the file.
    """
    import torch

    if "model0" in tree:
        raise UserError(f"{path}: virtual pipeline stages (model0, model1, ...) are not supported; save without them")
    if "model" not in tree:
        raise UserError(f"{path}: no model in it, but {', '.join(map(str, tree))}; give a Megatron checkpoint")
    reader = torch._C.PyTorchFileReader(str(path))
    records = {reader.get_record_offset(n) for n in reader.get_all_records() if n.startswith("data/")}  # type: ignore[attr-defined]
    addresses = {storage.data_ptr() for _, tensor in _flat(tree) if (storage := tensor.untyped_storage()).nbytes()}
    origin = min(addresses) - min(records) if addresses else 0
    assert {address - origin for address in addresses} <= records, f"{path}: its storages are not mapped in one piece"
    found = {}
    for name, tensor in _flat(tree["model"]):
        if name.endswith(("_extra_state", "inv_freq")):
            continue
        if not tensor.is_contiguous():
            raise UserError(f"{path}: {name} is a strided view; save contiguous tensors")
        start = tensor.data_ptr() - origin
        found[name] = Entry(path, kind(tensor.dtype), tuple(tensor.shape), start, start + prod(tensor.shape) * tensor.element_size())
    return found


def _layout(shard: Mapping[str, Entry]) -> str:
    if any(name.startswith("language_model.") for name in shard):
        return "legacy"
    return "mcore-te" if any(name.endswith("linear_qkv.layer_norm_weight") for name in shard) else "mcore"


def _nest(layout: str, tensors: Mapping[str, torch.Tensor], args: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` of a rank file: flat for megatron-core, nested down to the encoder for legacy models; with empty extra states."""
    states = dict(tensors)
    form = names.LAYOUTS[layout]
    prefixes = sorted({name[: match.end()] for name in tensors if (match := re.match(form.layer.replace("{}", r"\d+"), name))})
    states |= {f"{prefix}{linear}._extra_state": None for prefix in prefixes for linear in LINEAR[layout.split("-")[0]]}  # type: ignore[misc]
    head, last = form.local("lm_head.weight"), form.local("model.norm.weight") in tensors
    if head in tensors or (layout != "legacy" and last):
        states[head.replace(".weight", "._extra_state")] = None  # type: ignore[assignment]
    if layout != "legacy":
        return states
    nested: dict[str, Any] = {}
    for name, state in states.items():
        *outer, inner = name.split(".") if ".encoder." not in name else name.split(".", 2)
        place = nested
        for key in outer:
            place = place.setdefault(key, {})
        place[inner] = state
    return nested
