"""The args in Megatron's checkpoints: checked, written for an architecture, and read as one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.model.architecture import Architecture, check_numbers, check_sizes
from rlhf.weights import names

if TYPE_CHECKING:
    from rlhf.weights.formats.format import Contents, Target

# What args may say that no tensor shows, -> what we compute.
UNSEEN = {
    "apply_layernorm_1p": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_seq_len_interpolation_factor": None,
}
NUMBERS = ("rotary_base", "rope_scaling_factor", "norm_epsilon", "layernorm_epsilon")


def read(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The args in a checkpoint's tree; empty if it has none."""
    return dict(vars(tree["args"])) if "args" in tree else {}


def check(path: Path, args: Mapping[str, Any]) -> None:
    """Raise UserError, naming path, if args ask for a computation that is not ours, or hold what should be a number."""
    for name, ours in UNSEEN.items():
        if args.get(name, ours) != ours:
            raise UserError(f"{path}: its args say {name} {args[name]}, which is not supported; supported is {ours}")
    check_numbers(path, {f"args.{name}": value for name in NUMBERS if (value := args.get(name)) is not None})


def describe(target: Target) -> dict[str, Any]:
    """The args that Megatron-LM reads (load_args_from_checkpoint, check_checkpoint_args), with the model's own rope."""
    import torch

    arch, layout, dtype, tp, pp = target.arch, target.format.layout, target.dtype, target.tp, target.pp
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
        "padded_vocab_size": target.rows,
        "make_vocab_size_divisible_by": _divisor(arch.vocab, target.rows, tp),
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
        "transformer_impl": "transformer_engine" if layout == "megatron-te" else "local",
        "iteration": target.iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _divisor(vocab: int, rows: int, tp: int) -> int:
    """The make_vocab_size_divisible_by that pads a vocabulary to these rows."""
    return next(n for n in (128, 64, 32, 16, 8, 4, 2, 1, rows // tp) if -vocab % (n * tp) == rows - vocab)


def architecture(contents: Contents, rows: int) -> Architecture:
    """The model that a checkpoint's args describe, for folders without config.json. rows: of its embedding.

    Raises UserError if args lack something.
    """
    # As in Megatron, for all models.
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    a, form = contents.args, names.LAYOUTS[contents.layout]
    last = {name.partition("#")[0] for name in contents.shards[-1]}
    needed = (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
        "max_position_embeddings",
    )
    groups = ("num_query_groups",) if a.get("group_query_attention") else ()
    optional = ("vocab_size",) if a.get("vocab_size") else ()
    scaling = {"factor": float(a.get("rope_scaling_factor", 8)), **scaling} if a.get("use_rope_scaling") else {}
    try:
        check_sizes(contents.path, {f"args.{key}": a[key] for key in (*needed, *groups, *optional)})
        return Architecture(
            family="qwen3" if a.get("qk_layernorm") else "qwen2" if a.get("add_qkv_bias") else "llama",
            layers=a["num_layers"],
            hidden=a["hidden_size"],
            ffn=a["ffn_hidden_size"],
            heads=a["num_attention_heads"],
            kv_heads=a["num_query_groups"] if a.get("group_query_attention") else a["num_attention_heads"],
            head_dim=a["kv_channels"],
            vocab=a.get("vocab_size") or rows,
            context=a["max_position_embeddings"],
            eps=a["norm_epsilon"] if "norm_epsilon" in a else a["layernorm_epsilon"],
            tied=not a["untie_embeddings_and_output_weights"],
            qkv_bias=bool(a.get("add_qkv_bias")),
            qk_norm=bool(a.get("qk_layernorm")),
            rope_theta=float(a.get("rotary_base") or 10000),
            rope_scaling=scaling,
            # A tied output layer alone has no tensor that would tell; a reward model is taken to be without.
            lm=bool(last & {form.local("lm_head.weight"), form.tied})
            or (not a["untie_embeddings_and_output_weights"] and names.SCORE not in last),
            scalar=names.SCORE in last,
        )
    except KeyError as error:
        remedy = f"copy the model's config.json into {contents.path.parent}"
        raise UserError(f"{contents.path}: args has no {error}: {remedy}") from None
