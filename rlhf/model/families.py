"""The table of families of dense decoders: their names in config.json and in the files, and what their layers compute.

A new family is a new row. Some properties are the same in all rows so far: the same tensors in every layer, one norm
before attention and one before the MLP, norms that multiply by their weight, and one MLP. If a new family differs in
one of them, it becomes a field of `Family`. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlhf.model.architecture import Architecture

Shape = tuple[int, ...]
# How tensor parallelism splits a tensor. vocab: by rows, after padding the vocabulary. qkv: by key/value heads.
# whole: not split.
Split = Literal["rows", "columns", "vocab", "qkv", "whole"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCORE = "score.weight"  # the scalar head [1, hidden] of a reward model or critic
QKV = [f"self_attn.{x}_proj.{kind}" for kind in ("weight", "bias") for x in "qkv"]
# Tensors that vLLM fuses into one, in the order q, k, v and gate, up. The files of some families do so too.
FUSED = {
    **{name: f"self_attn.qkv_proj.{name.split('.')[-1]}" for name in QKV},
    "mlp.gate_proj.weight": "mlp.gate_up_proj.weight",
    "mlp.up_proj.weight": "mlp.gate_up_proj.weight",
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor. Its canonical name is its name in the files of a Llama model."""

    name: str
    shape: Shape
    split: Split = "whole"


@dataclass(frozen=True, slots=True)
class Family:
    """The properties that all models of a family share."""

    name: str  # model_type in config.json
    classes: str  # beginning of its class names in config.json, such as Llama in LlamaForCausalLM
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of the queries and keys of each head, before the rotary embedding
    activation: str = "silu"  # of the gated MLP; a value of hidden_act
    # Which layers attend only to the last sliding_window tokens. some: if use_sliding_window is true, the layers from
    # max_window_layers on.
    window: Literal["all", "some", "none"] = "none"
    ropes: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")  # supported values of rope_type
    tokenizer: str = ""  # class that transformers reads a tokenizer with, if its folder names none
    tokenizer_wins: bool = False  # transformers does so even if the folder names another class
    # Canonical name -> name in the Hugging Face files, if it differs. Tensors with the same file name are concatenated
    # by rows, in this order.
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    pad: int | None = None  # the pad token of a config.json without pad_token_id, as in transformers

    def before(self, arch: Architecture) -> list[Weight]:
        """Return the tensors that the first pipeline stage has before its layers."""
        return [Weight(EMBEDDING, (arch.vocab, arch.hidden), "vocab")]

    def layer(self, arch: Architecture) -> list[Weight]:
        """Return the tensors of a layer in the model's order. Their names have no layer prefix."""
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
        """Return the tensors that the last pipeline stage has after its layers.

        A tied output layer is not listed, because it is the embedding.
        """
        head = [Weight(HEAD, (arch.vocab, arch.hidden), "vocab")] if arch.lm and not arch.tied else []
        score = [Weight(SCORE, (1, arch.hidden))] if arch.scalar else []
        return [Weight("model.norm.weight", (arch.hidden,)), *head, *score]


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral", window="all", tokenizer="TokenizersBackend", tokenizer_wins=True),
        Family("qwen2", "Qwen2", qkv_bias=True, window="some", tokenizer="Qwen2Tokenizer", tokenizer_wins=True),
        Family("qwen3", "Qwen3", qk_norm=True, window="some", tokenizer="Qwen2Tokenizer"),
        Family(  # also Phi-4
            "phi3",
            "Phi3",
            window="all",
            ropes=("default",),
            tokenizer="TokenizersBackend",
            tokenizer_wins=True,
            files=FUSED,
            pad=32000,
        ),
    )
}
CAUSAL, SCALAR = "ForCausalLM", "ForSequenceClassification"  # endings of class names
CLASSES = {f"{family.classes}{kind}": family for family in FAMILIES.values() for kind in (CAUSAL, SCALAR)}
