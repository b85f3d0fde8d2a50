"""What a Hugging Face config.json says about a dense decoder, and whether we can run it. No torch here: a wrong model is
refused before anything is loaded."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

# config.json's "architectures" -> family. Anything else is refused by name.
FAMILIES = {
    f"{name}For{kind}": name.lower() for name in ("Llama", "Mistral", "Qwen2", "Qwen3") for kind in ("CausalLM", "SequenceClassification")
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers that define a dense decoder."""

    family: str  # llama, mistral, qwen2 or qwen3
    layers: int
    hidden: int
    ffn: int  # intermediate size of the gated MLP
    heads: int
    kv_heads: int  # key/value heads (GQA groups); divides heads
    head_dim: int
    vocab: int  # rows of the embedding in the folder, before any padding
    context: int  # longest sequence, in tokens
    eps: float  # of RMSNorm
    tied: bool  # output layer shares the embedding
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # llama3 scaling, or empty
    lm: bool = True  # has an output layer over the vocabulary (its own, or the tied embedding)
    scalar: bool = False  # has a scalar head, score.weight [1, hidden] (reward model, critic)

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding when tp ranks split it: a multiple of 64 per vLLM's own padding, and of tp."""
        unit = math.lcm(tp, 64)
        return (self.vocab + unit - 1) // unit * unit

    def num_parameters(self) -> int:
        """Parameters without padding; a tied embedding counts once."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = qkv * (self.hidden + self.qkv_bias) + self.heads * self.head_dim * self.hidden + 3 * self.hidden * self.ffn
        layer += 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        return self.layers * layer + self.hidden * (1 + self.vocab * (1 + (self.lm and not self.tied)) + self.scalar)

    def check_split(self, tp: int, pp: int = 1, *, said: tuple[str, str], where: str = "") -> None:
        """Raise UserError unless tp ranks can split every layer and pp ranks the layers. said: how the user set the two; where: in whose
        config.json the sizes stand."""
        by_tp, by_pp = said
        for size, what in ((self.heads, "attention heads"), (self.ffn, "intermediate size")):
            if size % tp:
                raise UserError(f"{by_tp} does not divide the {what} {size}{where}")
        if self.kv_heads % tp and tp % self.kv_heads:
            raise UserError(f"{by_tp} and the {self.kv_heads} key/value heads{where} do not divide one another")
        if self.layers % pp:
            raise UserError(f"{by_pp} does not divide the {self.layers} layers{where}")


def read(folder: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder. Raises UserError where it is missing, malformed or unsupported."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a model is a Hugging Face folder with a config.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    try:
        return _architecture(config, path)
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not what a model's config.json says ({error}); download it again") from None


def check_sizes(where: Path, sizes: Mapping[str, Any]) -> None:
    """Raise UserError for the first of a model's sizes (key -> value) that is not a whole number above 0."""
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {key} {value!r} is not a whole number above 0: give the one that belongs to the weights")


def check_numbers(where: Path, numbers: Mapping[str, Any]) -> None:
    """Raise UserError for the first of a model's other values (key -> value) that is not a number."""
    for key, value in numbers.items():
        if not isinstance(value, (int, float)):
            raise UserError(f"{where}: {key} {value!r} is not a number: give the one that belongs to the weights")


def _architecture(config: dict[str, Any], path: Path) -> Architecture:
    names = config.get("architectures") or [f"model_type {config.get('model_type')}"]
    family = FAMILIES.get(names[0])
    if family is None:
        raise UserError(f"{path}: {names[0]} is not supported; supported are {', '.join(FAMILIES)}")
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    optional = [key for key in ("num_key_value_heads", "head_dim") if config.get(key)]
    check_sizes(path, {key: config[key] for key in (*needed, *optional)})
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _refuse_unsupported(config, family, kind, path)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings") if kind == "llama3" else ()
    check_numbers(path, {"rms_norm_eps": config["rms_norm_eps"], **{key: rope[key] for key in scaling}})
    scalar = config.get("architectures", [""])[0].endswith("SequenceClassification")
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if scalar and labels != 1:
        raise UserError(f"{path}: num_labels {labels} is not supported; a reward model has 1")
    return Architecture(
        lm=not scalar,
        scalar=scalar,
        family=family,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        eps=config["rms_norm_eps"],
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rope_scaling={k: rope[k] for k in scaling},
    )


def _refuse_unsupported(config: dict[str, Any], family: str, rope: str, path: Path) -> None:
    """One line for the first feature of config.json that would silently give other numbers here."""
    window = config.get("sliding_window") if config.get("use_sliding_window", family == "mistral") else None
    if window is not None and window < config["max_position_embeddings"]:
        raise UserError(f"{path}: sliding_window {window} is not supported; set it to null if sequences stay under it")
    if rope not in ("default", "llama3"):
        raise UserError(f"{path}: rope scaling {rope!r} is not supported; supported are default and llama3")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act {config['hidden_act']!r} is not supported; supported is silu")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError(f"{path}: attention_bias and mlp_bias are not supported for {family}; both must be false")
    if "quantization_config" in config:
        raise UserError(f"{path}: quantized weights are not supported; give the bfloat16 or float32 folder")
