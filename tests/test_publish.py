"""A publish on four ranks: from every training layout to engine shards, and a folder written from them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from commands import run_ranks
from safetensors.torch import load_file
from test_tiles import FAMILIES, LLAMA, blank, model_ranks, random_hf

from rlhf.weights import export, files, publish
from rlhf.weights.formats import FORMATS
from rlhf.weights.names import shapes, tiles, tilings
from rlhf.weights.plan import Plan
from rlhf.weights.publish import Publisher, _rounds, checksum

ROOT = Path(__file__).parents[1]
WORLD = 4
RESHARDS = {
    "TP2PP2 -> TP1": (2, 2, 1),
    "TP4 -> TP2": (4, 1, 2),
    "TP2 -> TP4": (2, 1, 4),
    "PP4 -> TP4": (1, 4, 4),
    "TP1 -> TP2": (1, 1, 2),
}
SMALL = 24 << 10  # bytes of a bucket, small so that there are many rounds and tensors are cut
SPLIT = {"mcore": {"tp": 2, "pp": 2}, "mcore-local": {"tp": 4}, "legacy": {"tp": 1, "pp": 4}}
EXPORTED = replace(LLAMA, kv_heads=2, vocab=1000)


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for arch in (FAMILIES["gqa"], FAMILIES["qkv bias, tied, one group"], FAMILIES["ranks with nothing but padding"]):
        for tp, pp, engine_tp in RESHARDS.values():
            check_publish(arch, tp, pp, engine_tp, rank)
    parameters = model_ranks(EXPORTED, random_hf(EXPORTED), "megatron", WORLD, 2, 2)[rank]
    for format in FORMATS:
        export.write(
            f"{folder}/{format}", EXPORTED, {"model_type": "llama"}, tilings(EXPORTED, "megatron", WORLD, 2, 2),
            parameters, format=format, rank=rank, nodes=[0] * WORLD, dtype=torch.bfloat16, shard=20 << 10, bucket=SMALL,
            **SPLIT.get(format, {}),
        )  # fmt: skip
    export.write(
        f"{folder}/scaled", EXPORTED, {"model_type": "llama"}, tilings(EXPORTED, "megatron", WORLD, 2, 2), parameters,
        rank=rank, nodes=[0] * WORLD, dtype=torch.bfloat16, bucket=SMALL, transform=scaled,
    )  # fmt: skip
    dist.destroy_process_group()


def scaled(local: str, tensor: torch.Tensor) -> torch.Tensor:
    """A transform of some tensors."""
    return 3 * tensor if "linear" in local else tensor


def check_transform(moves: Plan, rank: int, source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    """Check that a publish with a transform equals a publish of scaled tensors. The sender's tensors do not change."""
    before, asked = {name: tensor.clone() for name, tensor in source.items()}, set()

    def recording(local: str, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor is source[local], "a whole local tensor is transformed"
        asked.add(local)
        return scaled(local, tensor)

    found, wanted = ({name: torch.full_like(tensor, torch.nan) for name, tensor in target.items()} for _ in range(2))
    publisher = Publisher(moves, rank, torch.bfloat16, SMALL, recording)
    publisher.publish(source, found)
    publisher.verify(source, found)
    Publisher(moves, rank, torch.bfloat16, SMALL).publish({n: scaled(n, t) for n, t in source.items()}, wanted)
    for name in target:
        assert torch.equal(found[name].nan_to_num(), wanted[name].nan_to_num()), f"rank {rank}: {name}"
    assert asked == {move.source_tile.local for move in moves.moves if move.source == rank}
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.items())


def check_publish(arch, tp: int, pp: int, engine_tp: int, rank: int) -> None:
    moves = Plan(tilings(arch, "megatron", WORLD, tp, pp), tilings(arch, "vllm", WORLD, engine_tp), [0] * WORLD)
    publisher = Publisher(moves, rank, torch.bfloat16, SMALL)
    hf = random_hf(arch)
    for update in range(2):  # the same publisher is used in every step
        hf = {name: tensor + update for name, tensor in hf.items()}
        wanted = model_ranks(arch, hf, "vllm", WORLD, engine_tp, 1)[rank]
        target = blank([{name: tensor.bfloat16() for name, tensor in wanted.items()}])[0]
        publisher.publish(model_ranks(arch, hf, "megatron", WORLD, tp, pp)[rank], target)
        for name in target:
            assert torch.equal(target[name], wanted[name].bfloat16()), (
                f"rank {rank}: {name} after TP{tp} PP{pp} -> TP{engine_tp}"
            )
        sources = model_ranks(arch, hf, "megatron", WORLD, tp, pp)[rank]
        publisher.verify(sources, target)
    check_transform(moves, rank, sources, target)
    norm = target["model.norm.weight"]
    norm[3:5] = norm[3:5].flip(0)  # the same bits at other places
    if rank == 2:
        with pytest.raises(
            RuntimeError, match=r"the engine's model.norm.weight on rank 2 differs from model.norm.weight"
        ):
            publisher.verify(sources, target)
    else:
        norm[3:5] = norm[3:5].flip(0)
        publisher.verify(sources, target)


def test_four_ranks(tmp_path: Path):
    mp.spawn(on_rank, (str(tmp_path),), WORLD)  # raises the exceptions of the ranks

    folder, hf = tmp_path / "hf", random_hf(EXPORTED)
    for format in FORMATS:
        whole = tiles(EXPORTED, "hf")
        held = {name: torch.zeros(shape) for name, shape in shapes(whole).items()}
        files.read(tmp_path / format, EXPORTED, whole, held)
        assert all(torch.equal(held[name], hf[name].bfloat16().float()) for name in hf), format
    tensors = load_file(tmp_path / "scaled/model.safetensors")
    assert all(torch.equal(tensors[name], (hf[name] * (3 if "_proj" in name else 1)).bfloat16()) for name in hf)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", *shards, "model.safetensors.index.json"]
    assert len(shards) > WORLD
    for shard in shards:
        tensors = load_file(folder / shard)
        assert tensors.keys() == {name for name, title in index["weight_map"].items() if title == shard}
        assert all(torch.equal(tensor, hf[name].bfloat16()) for name, tensor in tensors.items())
    assert index["weight_map"].keys() == hf.keys()
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "llama", "torch_dtype": "bfloat16"}


def test_an_engine_of_other_parameters_is_refused():
    tiling = tiles(LLAMA, "vllm", pad=True)
    good = {name: torch.empty(shape) for name, shape in shapes(tiling).items()}
    assert publish.mismatch(good, tiling, torch.float32) == ""
    norm, fused = "model.norm.weight", "model.layers.0.self_attn.qkv_proj.weight"
    others = {
        f"it has no {norm}": {name: tensor for name, tensor in good.items() if name != norm},
        "it also has model.layers.0.scale": good | {"model.layers.0.scale": torch.empty(1)},
        f"its {norm} is [33] torch.float32, and [32] torch.float32 is written": good | {norm: torch.empty(33)},
        f"its {norm} is [32] torch.bfloat16, and [32] torch.float32 is written": good | {norm: good[norm].bfloat16()},
        f"it has no {fused}": {name.replace("0.self_attn.qkv_proj", "0.self_attn.fused"): good[name] for name in good},
    }
    for problem, parameters in others.items():
        assert publish.mismatch(parameters, tiling, torch.float32) == problem


def test_a_checksum_sees_what_changed_places():
    rows = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert checksum(rows) != checksum(rows.flip(0))
    long = torch.zeros((1 << 22) + 1).bfloat16()
    long[2], long[1 << 22] = 3, 5
    swapped = long.clone()
    swapped[2], swapped[1 << 22] = 5, 3
    assert checksum(long) != checksum(swapped)
    assert checksum(long[:-1]) == checksum(long[:-1].clone())
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


@pytest.mark.parametrize("limit", [50, 1000, 100_000])
@pytest.mark.parametrize("nodes", [[0, 0, 0, 0], [0, 0, 1, 1]])
def test_rounds_carry_everything_within_the_limit(limit: int, nodes: list[int]):
    """The order causes no deadlock.

    Each rank does its rounds one after another, and a message needs both of its ranks.
    """
    moves = Plan(tilings(LLAMA, "megatron", WORLD, 2, 2), tilings(LLAMA, "vllm", WORLD, 4), nodes)
    ranks = [_rounds(moves.received(rank) + moves.sent(rank), WORLD, limit) for rank in range(WORLD)]
    assert all(sum(message.numel for message in messages) <= limit for rounds in ranks for messages in rounds)
    begun: list[Counter] = [
        Counter() for _ in ranks
    ]  # by rank: (source, target) -> messages that the rank has begun to send or to receive
    turn, sizes = [-1] * WORLD, Counter()

    def waits(rank: int) -> bool:
        mine = ranks[rank][turn[rank]] if turn[rank] >= 0 else []
        return any(
            begun[m.source + m.target - rank][m.source, m.target] < begun[rank][m.source, m.target] for m in mine
        )

    while ready := [rank for rank in range(WORLD) if not waits(rank) and turn[rank] + 1 < len(ranks[rank])]:
        turn[ready[0]] += 1
        for message in ranks[ready[0]][turn[ready[0]]]:
            begun[ready[0]][message.source, message.target] += 1
            sizes[ready[0] == message.source] += message.numel
    assert turn == [len(rounds) - 1 for rounds in ranks]
    assert not any(map(waits, range(WORLD)))
    assert sizes == {True: moves.volume()[1], False: moves.volume()[1]}


def test_rounds_fill_both_directions():
    """Two ranks exchange halves: both directions are used at the same time."""
    moves = Plan(tilings(LLAMA, "megatron", 2, 2), tilings(LLAMA, "vllm", 2, 1), [0, 0])
    rounds = _rounds(moves.received(0) + moves.sent(0), 2, 10_000)
    assert len(rounds) > 4
    assert all({message.source for message in messages} == {0, 1} for messages in rounds)


def test_what_stays_is_copied_while_the_links_work(monkeypatch: pytest.MonkeyPatch):
    """Each round copies an equal share of the local boxes. All messages of all rounds use one bucket."""
    training, engines = tilings(LLAMA, "megatron", 2, 2), tilings(LLAMA, "vllm", 2, 1)
    source, target = (
        {name: torch.zeros(shape) for name, shape in shapes(tiling[0]).items()} for tiling in (training, engines)
    )
    live = {tensor.untyped_storage().data_ptr() for tensors in (source, target) for tensor in tensors.values()}
    rounds: list[int] = []  # after the start of each: elements copied from source to target
    buffers: dict[int, int] = {}  # address -> bytes

    def start(calls: list[tuple]) -> list:
        rounds.append(0)
        buffers.update({flat.untyped_storage().data_ptr(): flat.untyped_storage().nbytes() for _, flat, _ in calls})
        return []

    def copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        for into, out_of in zip(targets, sources, strict=True):
            if {into.untyped_storage().data_ptr(), out_of.untyped_storage().data_ptr()} <= live:
                rounds[-1] += into.numel()

    for where, name, fake in (
        (dist, "barrier", lambda: None),
        (dist, "P2POp", lambda *a: a),
        (dist, "batch_isend_irecv", start),
        (publish, "copy", copy),
    ):
        monkeypatch.setattr(where, name, fake)
    moves = Plan(training, engines, [0, 0])
    publisher = Publisher(moves, 0, torch.float32, SMALL)
    publisher.publish(source, target)
    staying = sum(move.numel for move in moves.moves if move.source == move.target == 0)
    assert len(rounds) == len(publisher.rounds) > 8
    assert sum(rounds) == staying
    assert max(rounds) < 4 * staying / len(rounds)
    assert len(buffers) == 1
    assert sum(buffers.values()) <= SMALL


@pytest.mark.parametrize(("layout", "crossing"), [("--train-tp=2", 1 / 2), ("--train-pp=2 --engine-tp=2", 1 / 4)])
def test_benchmark_runs(layout: str, crossing: float):
    """On two ranks, each receives the half of the model that it lacks, or a quarter."""
    keys = ["--model=toy", "--repeat=1", *layout.split()]
    printed = run_ranks(2, "benchmarks/publish.py", *keys, timeout=120, CUDA_VISIBLE_DEVICES="")
    result = json.loads(printed.splitlines()[-1])
    whole = 2 * 1_059_968  # bytes: bfloat16 parameters of the toy model
    assert result["bytes_crossing_per_rank"] == pytest.approx(
        whole * crossing, rel=0.1
    )  # every stage has the norms, and one stage each table
    assert result["seconds"] > 0


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two models of each of three families, and the greedy continuations of transformers for some prompts."""
    root = tmp_path_factory.mktemp("greedy")
    prompts, tokens = [[5, 9, 33], [7], [500, 0, 64, 65, 1, 2, 3]], {}
    for family in ("llama3-tied", "qwen3", "phi3"):
        for seed, age in enumerate(("old", "new")):
            name = f"{family}-{age}"
            models.make(family, root / name, seed)
            model = transformers.AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
            tokens[name] = []
            for prompt in prompts:
                text = torch.tensor([prompt])
                for _ in range(8):
                    text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
                tokens[name].append(text[0, len(prompt) :].tolist())
    (root / "greedy.json").write_text(json.dumps({"prompts": prompts, "tokens": tokens}))
    return root


@pytest.mark.parametrize(
    ("engine", "tp", "model", "layouts"),
    [("kvcache", "4", "llama3-tied", "2x1 1x4"), ("vllm", "1", "qwen3", "2x2 1x4"), ("vllm", "2", "phi3", "4x1 2x2")],
    ids=lambda value: value.replace(" ", ","),
)
def test_engines_say_what_transformers_says(greedy: Path, engine: str, tp: str, model: str, layouts: str):
    """After each publish to four ranks, for every training layout (TP x PP) in turn."""
    keys = [str(greedy), engine, tp, model, *layouts.split()]
    printed = run_ranks(WORLD, "tests/ranks/publishing.py", *keys, CUDA_VISIBLE_DEVICES="")
    assert printed.count("engines agree") == WORLD
