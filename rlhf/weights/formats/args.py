"""The args in Megatron's checkpoints: checks them, and converts an architecture to args and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.model.architecture import LARGEST, ORIGINAL, ROPES, Architecture, check_numbers, check_sizes
from rlhf.model.families import FAMILIES
from rlhf.weights import names

if TYPE_CHECKING:
    from rlhf.weights.formats.format import Contents, Target

# Args that do not show in the tensors -> the only supported value.
UNSEEN = {
    "apply_layernorm_1p": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "window_attn_skip_freq": None,
}
NUMBERS = (
    *("rotary_base", "rope_scaling_factor", "rotary_seq_len_interpolation_factor"),
    *("norm_epsilon", "layernorm_epsilon"),
)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}  # Megatron uses these values for all models
YARN = {  # args of megatron-core's position_embedding_type yarn -> keys of Architecture.rope_scaling
    "yarn_rotary_scaling_factor": "factor",
    "yarn_original_max_position_embeddings": ORIGINAL,
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
    "yarn_correction_range_round_to_int": "truncate",
}


def read(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the args in a checkpoint's tree; empty if it has none."""
    return dict(vars(tree["args"])) if "args" in tree else {}


def check(path: Path, args: Mapping[str, Any]) -> None:
    """Raise UserError with the path if args have an unsupported value, or a value that is not a number but must be."""
    for name, ours in UNSEEN.items():
        if args.get(name, ours) != ours:
            raise UserError(
                f"{path}: its args have {name} {args[name]}, which is not supported; the only supported value is {ours}"
            )
    if args.get("position_embedding_type") == "yarn":
        check_numbers(path, {f"args.{name}": args.get(name) for name, key in YARN.items() if key in ROPES["yarn"][0]})
    check_numbers(path, {f"args.{name}": value for name in NUMBERS if (value := args.get(name)) is not None})


def describe(target: Target) -> dict[str, Any]:
    """Return the args that Megatron-LM reads (load_args_from_checkpoint, check_checkpoint_args) for a target."""
    import torch

    arch, layout, dtype, tp, pp = target.arch, target.format.layout, target.dtype, target.tp, target.pp
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
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(arch.rope_theta) if arch.rope_theta.is_integer() else arch.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        **of_rope(arch),
        "normalization": "RMSNorm",
        "norm_epsilon": arch.eps,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "qk_layernorm": arch.row.qk_norm,
        "window_size": arch.window_size,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": arch.row.qkv_bias,
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
    """Return the make_vocab_size_divisible_by that pads a vocabulary to `rows` rows."""
    return next(n for n in (128, 64, 32, 16, 8, 4, 2, 1, rows // tp) if -vocab % (n * tp) == rows - vocab)


def architecture(contents: Contents, rows: int) -> Architecture:
    """Return the architecture that a checkpoint's args describe, for folders without config.json.

    rows: rows of the embedding. Raises UserError if a value is missing in args.
    """
    a, form = contents.args, names.LAYOUTS[contents.layout]
    last = {name.partition("#")[0] for name in contents.shards[-1]}
    needed = (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
        "max_position_embeddings",
    )
    groups = ("num_query_groups",) if a.get("group_query_attention") else ()
    optional = ("vocab_size",) if a.get("vocab_size") else ()
    try:
        check_sizes(contents.path, {f"args.{key}": a[key] for key in (*needed, *groups, *optional)})
        return Architecture(
            family=family(contents.path, a),
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
            window=window(contents.path, a),
            rope_theta=float(a.get("rotary_base") or 10000),
            rope_scaling=rope_scaling(a),
            # The tensors do not show whether a tied model has an output layer. A reward model is assumed to have none.
            lm=bool(last & {form.local("lm_head.weight"), form.tied})
            or (not a["untie_embeddings_and_output_weights"] and names.SCORE not in last),
            scalar=names.SCORE in last,
        )
    except KeyError as error:
        remedy = f"copy the model's config.json into {contents.path.parent}"
        raise UserError(f"{contents.path}: args has no {error}: {remedy}") from None


def family(path: Path, args: Mapping[str, Any]) -> str:
    """Return the first family that fits the args, which do not name a family. Raises UserError if none fits."""
    windowed = window(path, args) > 0
    for row in FAMILIES.values():
        same = (row.qkv_bias, row.qk_norm) == (bool(args.get("add_qkv_bias")), bool(args.get("qk_layernorm")))
        if same and (row.window == "all" or not windowed):
            return row.name
    keys = ("add_qkv_bias", "qk_layernorm", "window_size")
    said = ", ".join(f"{key} {args[key]}" for key in keys if args.get(key))
    raise UserError(f"{path}: its args have {said}, but no supported family has this combination")


def window(path: Path, args: Mapping[str, Any]) -> int:
    """Return Architecture.window.

    Megatron's window_size is (number of keys before the query's own key, number of keys after it). -1 means all.
    """
    before, behind = args.get("window_size") or (-1, 0)
    if behind != 0:
        raise UserError(f"{path}: its args have window_size {args['window_size']}, but only (tokens, 0) is supported")
    if before == -1:
        return 0
    check_sizes(path, {"args.window_size[0] + 1": before + 1})
    return before + 1 if before + 1 < args.get("max_position_embeddings", LARGEST) else 0


def of_rope(arch: Architecture) -> dict[str, Any]:
    """Return the args for the rope scaling of an architecture."""
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
    """Return Architecture.rope_scaling from args."""
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
    """Return remarks on differences between args and the config.json in `where`, which has precedence.

    Only values that do not show in the tensors are compared, and only if args have them.
    """
    said = {
        "rotary_base": (float(args.get("rotary_base") or arch.rope_theta), arch.rope_theta),
        "rope scaling": (rope_scaling(args) or arch.rope_scaling, arch.rope_scaling),
        "window": (window(path, args) or arch.window, arch.window),
    }
    differ = [(f"{name} {theirs}", ours or "none") for name, (theirs, ours) in said.items() if theirs != ours]
    return [
        f"{path}: its args have {theirs}, but {where}/config.json has {ours}, which is used" for theirs, ours in differ
    ]


def unsaid(arch: Architecture) -> list[str]:
    """Return remarks on properties of a model that Megatron's args cannot express."""
    found = []
    if rope_scaling(of_rope(arch)) != arch.rope_scaling:
        numbers = ", ".join(f"{key} {value}" for key, value in arch.rope_scaling.items())
        found.append(f"Megatron's args cannot express all of the rope scaling ({numbers}); config.json has all of it")
    if arch.scalar and arch.pad is not None:
        found.append(
            f"Megatron's args cannot express pad_token_id {arch.pad}, on which scores depend; config.json has it"
        )
    return found
