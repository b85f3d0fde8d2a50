"""Weights: every conversion of layouts is bitwise, the plan moves no byte twice, and the layouts equal the engines'."""

import time
from dataclasses import replace
from itertools import product

import pytest
import torch

from rlhf.model.architecture import Architecture
from rlhf.weights.names import hf_shapes, tiles, tilings
from rlhf.weights.plan import Plan
from rlhf.weights.tiles import Tile, intersect, numel, split, subtract, view

LLAMA = Architecture(
    family="llama", layers=4, hidden=32, ffn=48, heads=8, kv_heads=4, head_dim=8, vocab=101, context=64,
    eps=1e-5, tied=False, rope_theta=10000.0,
)  # fmt: skip
FAMILIES = {
    "gqa": LLAMA,
    "mha": replace(LLAMA, kv_heads=8),
    "groups fewer than ranks": replace(LLAMA, kv_heads=2),
    "tied, head_dim apart": replace(LLAMA, tied=True, head_dim=16),
    "qkv bias, tied, one group": replace(LLAMA, family="qwen2", tied=True, kv_heads=1),
    "qk norm": replace(LLAMA, family="qwen3"),
    "fused files, window": replace(LLAMA, family="phi3", kv_heads=2, window=9),
    "ranks with nothing but padding": replace(LLAMA, vocab=30),
}
LLAMA_70B = replace(LLAMA, layers=80, hidden=8192, ffn=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256)

Tensors = dict[str, torch.Tensor]


def random_hf(arch: Architecture) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(arch).items()}


def apart(arch: Architecture, hf: Tensors) -> Tensors:
    """Return the tensors of a folder with q, k, v, gate and up as separate tensors."""
    found, heads = {}, [arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim, arch.kv_heads * arch.head_dim]
    for name, tensor in hf.items():
        if "qkv_proj" in name:
            found |= {name.replace("qkv", x): part for x, part in zip("qkv", tensor.split(heads), strict=True)}
        elif "gate_up_proj" in name:
            found |= {name.replace("gate_up", x): part for x, part in zip(("gate", "up"), tensor.chunk(2), strict=True)}
        else:
            found[name] = tensor
    return found


def mcore_rank(arch: Architecture, hf: Tensors, tp: tuple[int, int], pp: tuple[int, int]) -> Tensors:
    """Return the shard of a megatron-core GPTModel, by concatenation and chunks of whole tensors."""
    hf, (t, num_t), (p, num_p) = apart(arch, hf), tp, pp
    depth = arch.layers // num_p

    def table(name: str) -> torch.Tensor:
        padding = torch.zeros(arch.padded_vocab(num_t) - arch.vocab, arch.hidden)
        return torch.cat([hf[name], padding]).chunk(num_t)[t]

    held = {}
    if p == 0:
        held["embedding.word_embeddings.weight"] = table("model.embed_tokens.weight")
    for i in range(depth):
        prefix = f"model.layers.{p * depth + i}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in hf.items() if name.startswith(prefix)}
        held |= {f"decoder.layers.{i}.{name}": tensor for name, tensor in mcore_layer(arch, layer, t, num_t).items()}
    if p == num_p - 1:
        held["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not arch.tied:
            held["output_layer.weight"] = table("lm_head.weight")
        elif num_p > 1:
            held["output_layer.weight"] = table("model.embed_tokens.weight")
    return held


def mcore_layer(arch: Architecture, hf: Tensors, t: int, num_t: int) -> Tensors:
    def fused_qkv(kind: str) -> torch.Tensor:
        rows = []
        for group in range(arch.kv_heads):
            for x, heads in (("q", arch.heads // arch.kv_heads), ("k", 1), ("v", 1)):
                size = heads * arch.head_dim
                rows.append(hf[f"self_attn.{x}_proj.{kind}"][group * size : (group + 1) * size])
        return torch.cat(rows).chunk(num_t)[t]

    held = {
        "input_layernorm.weight": hf["input_layernorm.weight"],
        "pre_mlp_layernorm.weight": hf["post_attention_layernorm.weight"],
        "self_attention.linear_qkv.weight": fused_qkv("weight"),
        "self_attention.linear_proj.weight": hf["self_attn.o_proj.weight"].chunk(num_t, dim=1)[t],
        "mlp.linear_fc1.weight": torch.cat([hf[f"mlp.{x}_proj.weight"].chunk(num_t)[t] for x in ("gate", "up")]),
        "mlp.linear_fc2.weight": hf["mlp.down_proj.weight"].chunk(num_t, dim=1)[t],
    }
    if arch.row.qkv_bias:
        held["self_attention.linear_qkv.bias"] = fused_qkv("bias")
    if arch.row.qk_norm:
        held |= {f"self_attention.{x}_layernorm.weight": hf[f"self_attn.{x}_norm.weight"] for x in "qk"}
    return held


def vllm_rank(arch: Architecture, hf: Tensors, tp: tuple[int, int]) -> Tensors:
    """Return the shard of a vLLM engine. If there are more ranks than kv heads, several ranks hold each kv head."""
    hf, (t, num_t) = apart(arch, hf), tp

    def table(name: str) -> torch.Tensor:
        padding = torch.zeros(-arch.vocab % 64, arch.hidden)
        return torch.cat([hf[name], padding]).chunk(num_t)[t]

    def stacked_qkv(prefix: str, kind: str) -> torch.Tensor:
        q, k, v = (hf[f"{prefix}{x}_proj.{kind}"] for x in "qkv")
        num_k = max(1, arch.kv_heads // num_t)  # kv heads per rank
        first = t * num_k if arch.kv_heads >= num_t else t * arch.kv_heads // num_t
        mine = slice(first * arch.head_dim, (first + num_k) * arch.head_dim)
        return torch.cat([q.chunk(num_t)[t], k[mine], v[mine]])

    held = {
        "model.embed_tokens.weight": table("model.embed_tokens.weight"),
        "model.norm.weight": hf["model.norm.weight"],
    }
    if not arch.tied:
        held["lm_head.weight"] = table("lm_head.weight")
    for i in range(arch.layers):
        at = f"model.layers.{i}."
        held[at + "self_attn.qkv_proj.weight"] = stacked_qkv(at + "self_attn.", "weight")
        if arch.row.qkv_bias:
            held[at + "self_attn.qkv_proj.bias"] = stacked_qkv(at + "self_attn.", "bias")
        held[at + "self_attn.o_proj.weight"] = hf[at + "self_attn.o_proj.weight"].chunk(num_t, dim=1)[t]
        held[at + "mlp.gate_up_proj.weight"] = torch.cat(
            [hf[at + f"mlp.{x}_proj.weight"].chunk(num_t)[t] for x in ("gate", "up")]
        )
        held[at + "mlp.down_proj.weight"] = hf[at + "mlp.down_proj.weight"].chunk(num_t, dim=1)[t]
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            if at + norm + ".weight" in hf:
                held[at + norm + ".weight"] = hf[at + norm + ".weight"]
    return held


def model_ranks(arch: Architecture, hf: Tensors, layout: str, world: int, tp: int, pp: int) -> list[Tensors]:
    if layout == "vllm":
        ranks = [vllm_rank(arch, hf, (rank % tp, tp)) for rank in range(world)]
    elif layout == "megatron":
        ranks = [mcore_rank(arch, hf, (rank % tp, tp), (rank // (world // pp), pp)) for rank in range(world)]
    else:
        ranks = [hf] * world
    return [{name: tensor.contiguous() for name, tensor in mine.items()} for mine in ranks]


def carry_out(moves: Plan, sources: list[Tensors], targets: list[Tensors]) -> None:
    for move in moves.moves:
        source = view(sources[move.source][move.source_tile.local], move.source_tile, move.box)
        view(targets[move.target][move.target_tile.local], move.target_tile, move.box).copy_(source)


def blank(tensors: list[Tensors]) -> list[Tensors]:
    """Return zeros, as a new model has in the rows that pad the vocabulary."""
    return [{name: torch.zeros_like(tensor) for name, tensor in mine.items()} for mine in tensors]


def assert_equal(got: list[Tensors], wanted: list[Tensors]) -> None:
    for rank, (mine, right) in enumerate(zip(got, wanted, strict=True)):
        for name in right:
            assert torch.equal(mine[name], right[name]), f"rank {rank}: {name}"


# Boxes and moves


def test_boxes():
    box = ((0, 4), (2, 6))
    assert intersect(box, ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert intersect(box, ((4, 9), (2, 6))) is None
    hole = ((1, 3), (2, 5))
    rest = subtract(box, hole)
    assert sum(map(numel, rest)) + numel(hole) == numel(box)
    assert all(intersect(a, b) is None for i, a in enumerate([hole, *rest]) for b in rest[i:])
    pieces = split(((0, 1), (0, 7), (0, 5)), 9)
    assert max(map(numel, pieces)) <= 9
    assert sum(map(numel, pieces)) == 35


def test_plan_needs_every_element():
    half = Tile("w", ((0, 2),), "w", 0, 2, (2,), (0,))
    with pytest.raises(AssertionError, match=r"no rank holds w \[\(\(2, 4\),\)\]"):
        Plan([[half]], [[replace(half, box=((0, 4),), rows=4, shape=(4,))]], [0]).received(0)


def test_plan_prefers_rank_then_node_then_spreads():
    tile = Tile("w", ((0, 2),), "w", 0, 2, (2,), (0,))
    moves = Plan([[tile], [], [tile], [tile], [], []], [[tile]] * 6, [0, 0, 0, 1, 1, 1]).moves
    assert [(move.source, move.target) for move in moves] == [(0, 0), (0, 1), (2, 2), (3, 3), (3, 4), (3, 5)]
    moves = Plan([[tile], [tile], [], [], [], []], [[]] * 2 + [[tile]] * 4, [0, 0, 1, 1, 2, 2]).moves
    assert [(move.source, move.target) for move in moves] == [(1, 2), (0, 3), (0, 4), (1, 5)]


def test_the_busiest_link_says_how_long():
    tile, nobody = Tile("w", ((0, 6),), "w", 0, 6, (6,), (0,)), []
    far, near = (Plan([[tile], nobody, nobody], [[], [tile], [tile]], nodes) for nodes in ([0, 0, 1], [0, 0, 0]))
    assert far.seconds(2, within=3.0, between=1.0) == 12.0
    assert near.seconds(2, within=3.0, between=1.0) == 8.0  # one rank sends both
    assert far.volume() == near.volume() == (0, 12)


# Layouts


@pytest.mark.parametrize("arch", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    ("layout", "tp", "pp"),
    [("megatron", t, p) for t, p in product((1, 2, 4), (1, 2, 4))] + [("vllm", t, 1) for t in (1, 2, 4, 8)],
)
def test_layouts_match_the_engines(arch: Architecture, layout: str, tp: int, pp: int):
    world = tp * pp
    hf = random_hf(arch)
    wanted = model_ranks(arch, hf, layout, world, tp, pp)
    engine, folder = tilings(arch, layout, world, tp, pp), [tiles(arch, "hf")] + [[]] * (world - 1)
    assert [{tile.local for tile in mine} for mine in engine] == [
        {name for name in right if right[name].any()} for right in wanted
    ]  # a rank that holds only padding needs no tile
    got = blank(wanted)
    carry_out(Plan(folder, engine, [0] * world), [hf] + [{}] * (world - 1), got)
    assert_equal(got, wanted)
    back = [{name: torch.full_like(tensor, torch.nan) for name, tensor in hf.items()}]
    carry_out(Plan(engine, folder, [0] * world), got, back + [{}] * (world - 1))
    assert_equal(back, [hf])


RESHARDS = {  # training (tp, pp), engine tp, ranks
    "TP2PP2 -> TP1": (2, 2, 1, 4),
    "TP4 -> TP2": (4, 1, 2, 4),
    "TP2 -> TP4": (2, 1, 4, 4),
    "PP4 -> TP4": (1, 4, 4, 4),
    "TP2PP2DP2 -> TP8": (2, 2, 8, 8),
    "TP8 -> TP1": (8, 1, 1, 8),
}


@pytest.mark.parametrize("arch", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(("tp", "pp", "engine_tp", "world"), RESHARDS.values(), ids=RESHARDS)
def test_resharding_is_bitwise_and_moves_nothing_twice(
    arch: Architecture, tp: int, pp: int, engine_tp: int, world: int
):
    hf = random_hf(arch)
    sources, wanted = (
        model_ranks(arch, hf, "megatron", world, tp, pp),
        model_ranks(arch, hf, "vllm", world, engine_tp, 1),
    )
    train, engine = tilings(arch, "megatron", world, tp, pp), tilings(arch, "vllm", world, engine_tp)
    moves = Plan(train, engine, [0] * world)
    got = blank(wanted)
    carry_out(moves, sources, got)
    assert_equal(got, wanted)

    # A lower bound on the moved elements: those that a rank's engine needs and its training shard lacks.
    lacking = 0
    for rank in range(world):
        need, have = marks(arch, engine[rank]), marks(arch, train[rank])
        lacking += sum(int((need[name] & ~have[name]).sum()) for name in hf)
    held = sum(numel(tile.box) for mine in engine for tile in mine)
    assert moves.volume() == (held - lacking, lacking)
    for nodes in (
        [0] * world,
        [rank // 2 for rank in range(world)],
    ):  # the sent boxes of a rank are those that the others expect from it, in order
        moves = Plan(train, engine, nodes)
        crossing = [move for move in moves.moves if move.source != move.target]
        assert [moves.sent(rank) for rank in range(world)] == [
            [m for m in crossing if m.source == rank] for rank in range(world)
        ]


def marks(arch: Architecture, tiling: list[Tile]) -> Tensors:
    """Return name -> True where the rank holds an element."""
    whole = {tile.name: tile for tile in tiles(arch, "hf")}
    marked = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in hf_shapes(arch).items()}
    for tile in tiling:
        view(marked[whole[tile.name].local], whole[tile.name], tile.box).fill_(True)
    return marked


# Real sizes, without data


@pytest.mark.parametrize(
    ("world", "tp", "pp", "engine_tp"), [(32, 8, 4, 8), (64, 8, 4, 8), (64, 8, 8, 4), (64, 4, 4, 8)]
)
def test_plan_of_70b_takes_seconds(world: int, tp: int, pp: int, engine_tp: int):
    nodes = [rank // 8 for rank in range(world)]
    train, engine = tilings(LLAMA_70B, "megatron", world, tp, pp), tilings(LLAMA_70B, "vllm", world, engine_tp)
    start = time.process_time()
    moves = Plan(train, engine, nodes)
    seconds = time.process_time() - start
    local, remote = moves.volume()
    links = moves.seconds(2, within=300e9, between=40e9)  # NVLink; a network adapter of 400 Gbit/s for each GPU
    print(
        f"{world} ranks, TP{tp} PP{pp} -> TP{engine_tp}: planned in {seconds:.1f} s; in bf16 {local / 5e8:.1f} GB stay,"
        f" {remote / 5e8:.1f} GB cross, in {links:.2f} s at 300 GB/s within nodes and 40 GB/s between them"
    )
    assert moves.seconds(2, 150e9, 20e9) == pytest.approx(2 * links)
    assert links >= remote * 2 / world / 300e9
    assert seconds < 20
    for rank in range(world):
        have = {tile.name: [] for tile in train[rank]}
        for tile in train[rank]:
            have[tile.name].append(tile.box)
        boxes = [intersect(tile.box, box) for tile in engine[rank] for box in have.get(tile.name, [])]
        local -= sum(numel(box) for box in boxes if box)
        remote -= sum(numel(tile.box) for tile in engine[rank]) - sum(numel(box) for box in boxes if box)
    assert (local, remote) == (0, 0)  # only elements that a rank does not hold are moved, once
    sent = [0] * world
    for move in moves.moves:
        sent[move.source] += move.numel * (move.source != move.target)
    assert max(sent) < 2 * sum(sent) / world


def test_what_a_rank_plans_does_not_grow_with_the_world():
    found = {}
    for world in (32, 4096):
        train, engine = tilings(LLAMA_70B, "megatron", world, 8, 4), tilings(LLAMA_70B, "vllm", world, 8)
        start = time.process_time()
        moves = Plan(train, engine, [rank // 8 for rank in range(world)])
        found[world] = [len(moves.received(9)), len(moves.sent(9))]
        print(f"{world} ranks: one plans {sum(found[world])} moves in {time.process_time() - start:.2f} s")
        assert time.process_time() - start < 5
    assert found[32] == pytest.approx(found[4096], rel=0.02)
