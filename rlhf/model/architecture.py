"""Reads the architecture of a dense decoder from a Hugging Face config.json, and refuses unsupported models.

It does not import torch, so a wrong model is refused before anything is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf import texts
from rlhf.errors import UserError
from rlhf.model.families import CLASSES, FAMILIES, SCALAR, Family

# Keys that may give the context length. vLLM uses the smallest value.
CONTEXTS = ("max_position_embeddings", "max_sequence_length", "max_seq_length", "seq_length", "seq_len")
QUANTIZED = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
ORIGINAL = "original_max_position_embeddings"
# rope_type -> (required values, optional values with their defaults). None: the default is computed from the others.
ROPES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "default": ((), {}),
    "linear": (("factor",), {}),
    "dynamic": (("factor",), {}),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), {}),
    "yarn": (
        ("factor", ORIGINAL),
        {
            "beta_fast": 32,
            "beta_slow": 1,
            "truncate": True,
            "attention_factor": None,
            "mscale": None,
            "mscale_all_dim": None,
        },
    ),
}
# Limits of any number, and of the number of layers. It is lower, because the tensors of each layer are listed.
LARGEST, LAYERS = 2**31 - 1, 4096
REMEDY = "use the file that belongs to the weights"


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers that define a dense decoder."""

    family: str  # a key of FAMILIES
    layers: int
    hidden: int
    ffn: int  # intermediate size of the gated MLP
    heads: int
    kv_heads: int  # key/value heads (GQA groups); divides heads
    head_dim: int
    vocab: int  # rows of the embedding in the folder, before any padding
    context: int  # longest sequence, in tokens; up to the window if only some layers have one
    eps: float  # of RMSNorm
    tied: bool  # the output layer uses the weight of the embedding
    rope_theta: float
    # rope_type and its values (ROPES) by their names in config.json; empty: no scaling
    rope_scaling: dict[str, Any] = field(default_factory=dict, hash=False)
    window: int = 0  # number of tokens that a token attends to, including itself; 0: no limit
    lm: bool = True  # has an output layer over the vocabulary (its own, or the tied embedding)
    scalar: bool = False  # has a scalar head, score.weight [1, hidden] (reward model, critic)
    pad: int | None = None  # pad token; a reward model's score is read at the last token that is not this one

    @property
    def row(self) -> Family:
        """Return the model's row in the table of families."""
        return FAMILIES[self.family]

    @property
    def rope_kind(self) -> str:
        """Return the type of rope scaling, a key of ROPES."""
        return str(self.rope_scaling.get("rope_type", "default"))

    @property
    def window_size(self) -> tuple[int, int] | None:
        """Return megatron-core's window_size: how many keys before and after its own position a query attends to.

        None without a window.
        """
        return (self.window - 1, 0) if self.window else None

    def padded_vocab(self, tp: int) -> int:
        """Return the rows of the embedding when tp ranks split it: a multiple of tp, and of 64 as in vLLM."""
        unit = math.lcm(tp, 64)
        return (self.vocab + unit - 1) // unit * unit

    def num_parameters(self) -> int:
        """Return the number of parameters without padding. A tied embedding counts once."""
        row = self.row
        outer, layer = row.before(self) + row.after(self), row.layer(self)
        return sum(math.prod(w.shape) for w in outer) + self.layers * sum(math.prod(w.shape) for w in layer)

    def check_split(self, tp: int, pp: int = 1, *, said: tuple[str, str], where: str = "") -> None:
        """Raise UserError unless tp ranks can split each layer, and pp stages can have equal numbers of layers.

        The message contains `said`, the user's settings of tp and pp, and `where`, the source of the sizes.
        """
        by_tp, by_pp = said
        for size, what in ((self.heads, "attention heads"), (self.ffn, "intermediate size")):
            if size % tp:
                raise UserError(f"{by_tp} does not divide the {what} {size}{where}")
        if self.kv_heads % tp and tp % self.kv_heads:
            raise UserError(f"neither of {by_tp} and the {self.kv_heads} key/value heads{where} divides the other")
        if self.layers % pp:
            raise UserError(f"{by_pp} does not divide the {self.layers} layers{where}")


def read(folder: str | Path) -> Architecture:
    """Return the architecture of a Hugging Face folder. Raises UserError if it is missing, malformed or unsupported."""
    path = Path(folder) / "config.json"
    config = texts.load(path, "a model is a Hugging Face folder with a config.json")
    try:
        return _architecture(config, path)
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing") from None
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not a valid config.json of a model ({error}); download it again") from None


def check_sizes(where: Path, sizes: Mapping[str, Any]) -> None:
    """Raise UserError for the first size (key -> value) that is not a whole number above 0."""
    for key, value in sizes.items():
        most = LAYERS if key.endswith("layers") else LARGEST
        if type(value) is not int or not 0 < value <= most:
            raise UserError(f"{where}: {key} {value!r:.80} is not a whole number above 0 and up to {most}: {REMEDY}")


def check_numbers(where: Path, numbers: Mapping[str, Any]) -> None:
    """Raise UserError for the first value (key -> value) that is not a number above 0."""
    for key, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value <= LARGEST:  # refuses nan too
            raise UserError(f"{where}: {key} {value!r:.80} is not a number above 0 and up to {LARGEST}: {REMEDY}")


def _architecture(config: dict[str, Any], path: Path) -> Architecture:
    names = config.get("architectures")
    if not names:
        raise UserError(
            f"{path}: key architectures is missing; add the class that was saved, such as [{min(CLASSES)!r}]"
        )
    family = CLASSES.get(names[0])
    if family is None:
        raise UserError(f"{path}: {names[0]!s:.80} is not supported; use one of {', '.join(CLASSES)}")
    needed = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    optional = [key for key in ("num_key_value_heads", "head_dim", *CONTEXTS) if config.get(key) is not None]
    check_sizes(path, {key: config[key] for key in (*needed, *optional)})
    _refuse_unsupported(config, family, path)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if head_dim % 2 or not head_dim:
        raise UserError(f"{path}: head_dim {head_dim} is not even, but rotary embeddings need pairs: {REMEDY}")
    check_numbers(path, {"rms_norm_eps": config["rms_norm_eps"]})
    theta, scaling = _rope(config, family, path)
    scalar = config.get("architectures", [""])[0].endswith(SCALAR)
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if scalar and labels != 1:
        raise UserError(f"{path}: num_labels {labels} is not supported; it must be 1")
    context = min(config[key] for key in CONTEXTS if config.get(key) is not None)
    window, all_layers = _window(config, family, path)
    if window and not all_layers:  # vLLM and transformers can differ in which layers have it
        context = min(context, window)
    if scaling.get("rope_type") == "yarn":  # vLLM's tables end at this position
        context = min(context, int(scaling["factor"] * scaling[ORIGINAL]))
    return Architecture(
        lm=not scalar,
        scalar=scalar,
        pad=_pad(config, family, path),
        family=family.name,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config["vocab_size"],
        context=context,
        window=window if window < context else 0,
        eps=float(config["rms_norm_eps"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _pad(config: dict[str, Any], family: Family, path: Path) -> int | None:
    """Return Architecture.pad. A number that is no token id, such as -1, never occurs in a text."""
    pad = config.get("pad_token_id", family.pad)
    if pad is not None and type(pad) is not int:
        raise UserError(f"{path}: pad_token_id {pad!r:.80} is neither a token id nor null: {REMEDY}")
    return pad


def _rope(config: dict[str, Any], family: Family, path: Path) -> tuple[float, dict[str, Any]]:
    """Return Architecture.rope_theta and Architecture.rope_scaling."""
    outer = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope = {**outer, **(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    kind, theta = rope.get("rope_type", rope.get("type", "default")), rope["rope_theta"]
    if kind not in family.ropes:
        kinds = ", ".join(family.ropes)
        raise UserError(f"{path}: rope scaling {kind!r:.80} is not supported for {family.name}; supported: {kinds}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"{path}: partial_rotary_factor {partial!r:.80} is not supported; it must be 1")
    needed, optional = ROPES[kind]
    if odd := rope.keys() - {"rope_theta", "rope_type", "type", "partial_rotary_factor", ORIGINAL, *needed, *optional}:
        raise UserError(f"{path}: rope scaling {kind} with {min(odd)!r:.80} is not supported; {REMEDY}")
    rope[ORIGINAL] = rope.get(ORIGINAL) or config["max_position_embeddings"]
    other = config.get(ORIGINAL)
    if ORIGINAL in needed and other not in (None, rope[ORIGINAL]):  # programs differ in which value they use
        raise UserError(
            f"{path}: {ORIGINAL} is {other!r:.80}, but {rope[ORIGINAL]!r:.80} in the rope scaling: delete the first"
        )
    numbers = {key: rope[key] for key in needed}
    numbers |= {key: rope[key] for key, usual in optional.items() if rope.get(key) not in (None, usual)}
    truncate = numbers.pop("truncate", True)
    check_numbers(path, {"rope_theta": theta, **numbers})
    if type(truncate) is not bool:
        raise UserError(f"{path}: truncate {truncate!r:.80} is neither true nor false: {REMEDY}")
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise UserError(f"{path}: low_freq_factor {numbers['low_freq_factor']} is not below high_freq_factor: {REMEDY}")
    if kind == "default":
        return float(theta), {}
    return float(theta), {"rope_type": kind, **numbers} | ({} if truncate else {"truncate": False})


def _window(config: dict[str, Any], family: Family, path: Path) -> tuple[int, bool]:
    """Return the window in tokens (0: there is none), and whether all layers have it."""
    window = config.get("sliding_window")
    if window is None or (family.window == "some" and not config.get("use_sliding_window")):
        return 0, False
    check_sizes(path, {"sliding_window": window})
    kinds = set(config.get("layer_types") or ["sliding_attention"])
    return int(window), family.window == "all" and kinds == {"sliding_attention"}


def _refuse_unsupported(config: dict[str, Any], family: Family, path: Path) -> None:
    """Raise UserError for the first feature in config.json that is not implemented and would give other results."""
    if config.get("tie_word_embeddings") not in (None, True, False):
        raise UserError(
            f"{path}: tie_word_embeddings {config['tie_word_embeddings']!r:.80} is neither true nor false: {REMEDY}"
        )
    if config.get("hidden_act", family.activation) != family.activation:
        raise UserError(
            f"{path}: hidden_act {config['hidden_act']!r:.80} is not supported; it must be {family.activation}"
        )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError(f"{path}: attention_bias and mlp_bias are not supported for {family.name}; both must be false")
    if any(config.get(key) is not None for key in QUANTIZED):
        raise UserError(f"{path}: quantized weights are not supported; use a folder with bfloat16 or float32 weights")
    if title := config.get("transformers_weights"):
        what = f"transformers_weights {title!r:.80} is not supported"
        raise UserError(f"{path}: {what}; rename this file to model.safetensors, and delete the key")
