"""Layouts: which boxes of the Hugging Face tensors a rank holds, and under which local names."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rlhf.model.architecture import Architecture
from rlhf.model.families import EMBEDDING, FUSED, HEAD, QKV, Shape, Split, Weight
from rlhf.model.families import SCORE as SCORE  # for the importers of this module
from rlhf.parallel.layout import Axis, Place, spread
from rlhf.weights.tiles import Box, Tile

WHOLE = Place()


@dataclass(frozen=True, slots=True)
class Layout:
    """The local names of the canonical tensors.

    If several tensors have the same local name, their rows follow one another, in the order of Family.layer. The
    exception is grouped qkv: the rows of each kv head are its q heads, then k, then v. Tensor parallelism cuts the
    result into equal chunks.
    """

    layer: str = "model.layers.{}."  # prefix of a layer's tensors; {} is its number within the pipeline stage
    names: Mapping[str, str] = field(default_factory=dict)  # canonical -> local name; for a layer, without the prefix
    grouped_qkv: bool = False
    # The last pipeline stage needs a copy of a tied embedding if it does not hold the embedding itself. This is the
    # copy's local name; empty: the name of the output layer.
    tied: str = ""

    def local(self, name: str) -> str:
        """Return the local name of a canonical tensor. Names that are not listed stay the same."""
        return self.names.get(name, name)


MCORE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
    **{name: f"self_attention.linear_qkv.{name.split('.')[-1]}" for name in QKV},
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp.gate_proj.weight": "mlp.linear_fc1.weight",
    "mlp.up_proj.weight": "mlp.linear_fc1.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
LAYOUTS = {
    "hf": Layout(),  # the tensors of a Hugging Face folder; _form() adds the names in the family's files
    # The parameters of a live vLLM engine. With more ranks than kv heads, kv heads are replicated.
    "vllm": Layout(names=FUSED),
    # A megatron-core GPTModel built without Transformer Engine: the live model and its checkpoints.
    "megatron": Layout(
        layer="decoder.layers.{}.",
        names={**MCORE, "post_attention_layernorm.weight": "pre_mlp_layernorm.weight"},
        grouped_qkv=True,
    ),
    # Checkpoints of a GPTModel built with Transformer Engine. Its linear layers contain the norms before them.
    "megatron-te": Layout(
        layer="decoder.layers.{}.",
        names={
            **MCORE,
            "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
            "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
        },
        grouped_qkv=True,
    ),
    "legacy": Layout(  # checkpoints of Megatron-LM's models before megatron-core
        layer="language_model.encoder.layers.{}.",
        names={
            "model.embed_tokens.weight": "language_model.embedding.word_embeddings.weight",
            "model.norm.weight": "language_model.encoder.final_norm.weight",
            "lm_head.weight": "language_model.output_layer.weight",
            "input_layernorm.weight": "input_norm.weight",
            **{name: f"self_attention.query_key_value.{name.split('.')[-1]}" for name in QKV},
            "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
            "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
            "self_attn.o_proj.weight": "self_attention.dense.weight",
            "post_attention_layernorm.weight": "post_attention_norm.weight",
            "mlp.gate_proj.weight": "mlp.dense_h_to_4h.weight",
            "mlp.up_proj.weight": "mlp.dense_h_to_4h.weight",
            "mlp.down_proj.weight": "mlp.dense_4h_to_h.weight",
        },
        grouped_qkv=True,
        tied="word_embeddings_for_head.weight",
    ),
}


class Held(NamedTuple):
    """A tensor of a pipeline stage, before tensor parallelism cuts it."""

    name: str  # canonical name
    local: str
    shape: Shape
    split: Split


def hf_shapes(arch: Architecture) -> dict[str, Shape]:
    """Return name -> shape of every tensor in a Hugging Face folder, in the model's order.

    A tied model has no lm_head.weight. A scalar head is score.weight.
    """
    return shapes(tiles(arch, "hf"))


def parameters(arch: Architecture, layout: str, place: Place = WHOLE) -> dict[str, Shape]:
    """Return local name -> shape of every parameter of a live model on one rank, including vocabulary padding."""
    return shapes(tiles(arch, layout, place, pad=True))


def tiles(arch: Architecture, layout: str, place: Place = WHOLE, rows: int = 0, pad: bool = False) -> list[Tile]:
    """Return the tiles of one rank. Layers are divided evenly over the pipeline stages.

    rows: rows of the padded vocabulary over all ranks; 0: padded as in live models.
    pad: also return a tile for each padding row. Its content is the last real row, as in Megatron-LM. Without pad, no
    tile covers the padding rows.
    """
    form, tp, (stage, stages) = _form(arch, layout), place.tp, place.pp
    assert arch.layers % stages == 0, f"{arch.layers} layers do not divide over {stages} pipeline stages"
    depth, last = arch.layers // stages, stage == stages - 1

    def held(weights: Sequence[Weight], canonical: str = "", local: str = "") -> list[Held]:
        return [Held(canonical + w.name, local + form.local(w.name), w.shape, w.split) for w in weights]

    found, layer = held(arch.row.before(arch)) if stage == 0 else [], arch.row.layer(arch)
    for i in range(depth):
        found += held(layer, f"model.layers.{stage * depth + i}.", form.layer.format(i))
    if last:
        found += held(arch.row.after(arch))
    if (
        last and arch.lm and arch.tied and stage > 0
    ):  # the embedding is on another stage, so this stage has a copy of it
        found.append(Held(EMBEDDING, form.tied or form.local(HEAD), (arch.vocab, arch.hidden), "vocab"))
    rows = rows or arch.padded_vocab(tp[1])
    return _place(arch, tp, found, rows, form.grouped_qkv) + (_padding(arch, tp, found, rows) if pad else [])


def tilings(arch: Architecture, layout: str, world: int, tp: int, pp: int = 1) -> list[list[Tile]]:
    """Return the tiles of every rank. Ranks at the same place get the same list object."""
    ranks = spread(world, tp, pp)
    places = [ranks.place(rank) for rank in range(world)]
    unique = {place: tiles(arch, layout, place) for place in dict.fromkeys(places)}
    return [unique[place] for place in places]


def shapes(tiling: Sequence[Tile]) -> dict[str, Shape]:
    """Return local name -> shape of the local tensors that the tiles cover, in the order of the tiles."""
    found: dict[str, Shape] = {}
    for tile in tiling:
        rows = max(tile.start + tile.rows, found.get(tile.local, (0,))[0])
        found[tile.local] = (rows, *tile.columns)
    return found


def _form(arch: Architecture, layout: str) -> Layout:
    """Return a layout for the model's family. In its Hugging Face files, several tensors may be stored as one."""
    return replace(LAYOUTS[layout], names=arch.row.files) if layout == "hf" else LAYOUTS[layout]


def _padding(arch: Architecture, tp: Axis, held: list[Held], rows: int) -> list[Tile]:
    """Return one tile for each padding row in this rank's share of the vocabulary tables."""
    low, high = _chunk(rows, tp)
    real = max(0, min(high, arch.vocab) - low)
    tables = [(each.name, each.local) for each in held if each.split == "vocab"]
    last: Box = ((arch.vocab - 1, arch.vocab), (0, arch.hidden))
    return [
        Tile(name, last, local, row, 1, (1, arch.hidden), (0, 0))
        for name, local in tables
        for row in range(real, high - low)
    ]


def _place(arch: Architecture, tp: Axis, held: list[Held], vocab: int, grouped: bool) -> list[Tile]:
    """Return the tiles of this rank's share of the tensors. Tensors with the same local name follow one another."""
    filled: dict[str, int] = defaultdict(int)
    placed = []
    for name, local, shape, split in held:
        if split == "qkv":
            box, view, at = _cut_qkv(arch, name.split(".")[-2][0], shape[1:], tp, grouped)
        else:
            box = _cut(arch, shape, split, tp, vocab)
            view, at = tuple(high - low for low, high in box), (0,) * len(box)
        rows = view[0] * view[1] if split == "qkv" else view[0]
        if all(low < high for low, high in box):
            placed.append(Tile(name, box, local, filled[local], rows, view, at))
        if not (split == "qkv" and grouped):
            filled[local] += rows
    return placed


def _chunk(length: int, axis: Axis) -> tuple[int, int]:
    rank, size = axis
    assert length % size == 0, f"{length} rows or columns do not divide over {size} ranks"
    return length // size * rank, length // size * (rank + 1)


def _cut(arch: Architecture, shape: Shape, split: Split, tp: Axis, vocab: int) -> Box:
    whole = tuple((0, n) for n in shape)
    match split:
        case "rows":
            return (_chunk(shape[0], tp), *whole[1:])
        case "columns":
            return (whole[0], _chunk(shape[1], tp))
        case "vocab":
            low, high = _chunk(vocab, tp)
            return ((min(low, arch.vocab), min(high, arch.vocab)), *whole[1:])
    return whole


def _cut_qkv(arch: Architecture, part: str, columns: Shape, tp: Axis, grouped: bool) -> tuple[Box, Shape, Shape]:
    """Return the box in the canonical view, the shape of the local rows, and the offsets of the box in it.

    part: q, k or v. With more ranks than kv heads, several ranks share a kv head. Grouped rows are cut into equal
    chunks, even within k and v. Otherwise q is cut, and k and v are replicated.
    """
    rank, size = tp
    sharers = max(1, size // arch.kv_heads)
    assert size % sharers == 0, f"{size} ranks cannot share {arch.kv_heads} kv heads evenly"
    heads = _chunk(arch.kv_heads, (rank // sharers, size // sharers))
    group = {
        "q": arch.heads // arch.kv_heads * arch.head_dim,
        "k": arch.head_dim,
        "v": arch.head_dim,
    }  # rows per kv head
    tail = tuple((0, n) for n in columns)
    if not grouped:
        rows = _chunk(group[part], (rank % sharers, sharers)) if part == "q" else (0, group[part])
        box: Box = (heads, rows, *tail)
        return box, tuple(high - low for low, high in box), (0,) * len(box)
    low, high = _chunk(sum(group.values()), (rank % sharers, sharers))
    offset = {"q": 0, "k": group["q"], "v": group["q"] + group["k"]}[part]
    first, last = max(low, offset), min(high, offset + group[part])
    box = (heads, (first - offset, last - offset), *tail)
    return box, (heads[1] - heads[0], high - low, *columns), (0, first - low, *(0 for _ in columns))
