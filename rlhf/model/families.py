"""The families of dense decoders, one row each: the names in config.json and in the files, and what the layers compute.

A new family is a new row. What all rows have in common today (the same tensors in every layer, one norm before attention and one
before the MLP, norms that multiply by their weight, one MLP) becomes a field of `Family` when a family differs. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlhf.model.architecture import Architecture

Shape = tuple[int, ...]
# How tensor parallelism cuts a tensor: by rows, by columns, by rows of a vocabulary that is padded first, by key/value heads, or not
# at all.
Split = Literal["rows", "columns", "vocab", "qkv", "whole"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCORE = "score.weight"  # the scalar head [1, hidden] of a reward model or critic
QKV = [f"self_attn.{x}_proj.{kind}" for kind in ("weight", "bias") for x in "qkv"]
# Tensors that vLLM keeps as one: q, then k, then v; gate, then up. Some families' files do so too.
FUSED = {
    **{name: f"self_attn.qkv_proj.{name.split('.')[-1]}" for name in QKV},
    "mlp.gate_proj.weight": "mlp.gate_up_proj.weight",
    "mlp.up_proj.weight": "mlp.gate_up_proj.weight",
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor by its canonical name, which is its name in the files of a Llama."""

    name: str
    shape: Shape
    split: Split = "whole"


@dataclass(frozen=True, slots=True)
class Family:
    """What the models of a family have in common."""

    name: str  # model_type in config.json
    classes: str  # how its class names in config.json begin: LlamaForCausalLM
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every head's queries and keys, before they are rotated
    activation: str = "silu"  # of the gated MLP, as hidden_act says it
    # Which layers attend to the last sliding_window tokens alone: all of them, those from max_window_layers on where
    # use_sliding_window is true, or none.
    window: Literal["all", "some", "none"] = "none"
    ropes: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")  # what rope_type may say
    # Canonical name -> name in the Hugging Face files, where it differs. Tensors of one name follow one another in its rows.
    files: Mapping[str, str] = field(default_factory=dict, hash=False)

    def before(self, arch: Architecture) -> list[Weight]:
        """What the first pipeline stage holds before its layers."""
        return [Weight(EMBEDDING, (arch.vocab, arch.hidden), "vocab")]

    def layer(self, arch: Architecture) -> list[Weight]:
        """The tensors of a layer in the model's order, named without the layer's prefix."""
        hidden, ffn, q, kv = arch.hidden, arch.ffn, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        rows = {"q": q, "k": kv, "v": kv}
        return [
            Weight("input_layernorm.weight", (hidden,)),
            *(Weight(f"self_attn.{x}_proj.weight", (rows[x], hidden), "qkv") for x in "qkv"),
            *(Weight(f"self_attn.{x}_proj.bias", (rows[x],), "qkv") for x in "qkv" if self.qkv_bias),
            *(Weight(f"self_attn.{x}_norm.weight", (arch.head_dim,)) for x in "qk" if self.qk_norm),
            Weight("self_attn.o_proj.weight", (hidden, q), "columns"),
            Weight("post_attention_layernorm.weight", (hidden,)),
            Weight("mlp.gate_proj.weight", (ffn, hidden), "rows"),
            Weight("mlp.up_proj.weight", (ffn, hidden), "rows"),
            Weight("mlp.down_proj.weight", (hidden, ffn), "columns"),
        ]

    def after(self, arch: Architecture) -> list[Weight]:
        """What the last pipeline stage holds after its layers; a tied output layer is the embedding, which is not listed again."""
        head = [Weight(HEAD, (arch.vocab, arch.hidden), "vocab")] if arch.lm and not arch.tied else []
        score = [Weight(SCORE, (1, arch.hidden))] if arch.scalar else []
        return [Weight("model.norm.weight", (arch.hidden,)), *head, *score]


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral", window="all"),
        Family("qwen2", "Qwen2", qkv_bias=True, window="some"),
        Family("qwen3", "Qwen3", qk_norm=True, window="some"),
        Family("phi3", "Phi3", window="all", ropes=("default",), files=FUSED),  # Phi-4, too
    )
}
CAUSAL, SCALAR = "ForCausalLM", "ForSequenceClassification"  # how class names end
CLASSES = {f"{family.classes}{kind}": family for family in FAMILIES.values() for kind in (CAUSAL, SCALAR)}
