"""Measure how host work grows with its size: stop strings, rewards, packing, samples, loading tokens, publish plan.

    python benchmarks/host.py                                                   all, on one core
    python benchmarks/host.py --packing 1024 2048 --stop-strings --data-cache   these sizes; no sizes: skip

Results with another --commit were measured with this file in a checkout of that commit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import record
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import vocabularies

from rlhf.config import Reward
from rlhf.contracts import Sample, Text
from rlhf.data import columns, shares
from rlhf.data.columns import Columns
from rlhf.data.packing import microbatches
from rlhf.data.tokenizer import Tokenizer
from rlhf.model.architecture import Architecture
from rlhf.parallel import objects
from rlhf.rewards import Rewards
from rlhf.rollout.stops import Stops
from rlhf.weights import names
from rlhf.weights.plan import Plan

Result = dict[str, float]
ABSENT: Any = None
GATHERED = 2048  # samples of 2,048 tokens
JUDGE = """
import asyncio, time


async def ask(prompt, response, record):
    await asyncio.sleep(0.2)
    return 1.0


def plain(prompt, response, record):
    time.sleep(0.2)
    return 1.0
"""
SENTENCE, STOP = " The answer is four, and the question is what they mean by it.", " STOP"


def stop_strings(sizes: list[int]) -> dict[int, Result]:
    """Cut a response of `size` tokens: with a stop string at its end, without one, and with no stop string set."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.load(vocabularies.write_byte_level(Path(folder)))
    stops = {stop: Stops(tokenizer, [stop] if stop else []) for stop in (STOP, "")}
    end = tokenizer.encode(STOP)
    words = tokenizer.encode(SENTENCE) * (max(sizes) // 8 + 1)

    def seconds(tokens: list[int], stop: str) -> float:
        return record.seconds(lambda: stops[stop].end(tokens), repeat=1, warm=0)

    seconds(words[: min(sizes)], STOP)
    found = {}
    for size in sizes:
        kinds = {
            "seconds": ([*words[: size - len(end)], *end], STOP),
            "without_s": (words[:size], STOP),
            "unset_s": (words[:size], ""),
        }
        found[size] = {name: seconds(*kind) for name, kind in kinds.items()}
    return found


def rewards(sizes: list[int]) -> dict[int, Result]:
    """Get rewards that take 0.2 s each, from an async function and from a plain one, in two processes each."""

    def seconds(function: Rewards, size: int) -> float:
        return record.seconds(lambda: function.score([("", "a", {})] * size), repeat=1, warm=0)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "judge.py").write_text(JUDGE)
        kinds = {"seconds": "ask", "plain_s": "plain"}
        found: dict[int, Result] = {size: {} for size in sizes}
        for name, kind in kinds.items():
            with Rewards([f"{folder}/judge.py:{kind}"], Reward(workers=2)) as function:
                seconds(function, 2)  # starts the processes
                for size in sizes:
                    found[size][name] = seconds(function, size)
    return found


def packing(sizes: list[int]) -> dict[int, Result]:
    """Pack `size` samples into micro-batches of 16,384 tokens.

    The samples form groups of 8. Lengths are lognormal: deviation 0.8, median 400, at most 4,096.
    """
    found = {}
    for size in sizes:
        lengths = np.clip(np.random.default_rng(1).lognormal(6, 0.8, size), 16, 4096).astype(int).tolist()
        samples = [Sample(np.empty(n + 1, np.int32), np.ones(n, bool), group=i // 8) for i, n in enumerate(lengths)]
        start = time.perf_counter()
        cut = microbatches(samples, 16384, False)
        found[size] = {"seconds": time.perf_counter() - start, "microbatches": len(cut)}
    return found


def gather(sizes: list[int]) -> dict[int, Result]:
    """Give the ranks that train on them 2,048 samples of 2,048 tokens, which `size` gloo ranks have sampled.

    before: every rank got all samples with their records. now: each rank, a replica of its own, gets its share. The
    time is that of the slowest rank, in the faster of two turns. The bytes are those that one rank receives.
    """
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            context = get_context("fork")  # the ranks share the memory of the imported modules
            results = context.SimpleQueue()
            ranks = [context.Process(target=_gather, args=(rank, size, folder, results)) for rank in range(size)]
            for process in ranks:
                process.start()
            found[size] = results.get()
            for process in ranks:
                process.join()
    return found


def data_cache(sizes: list[int]) -> dict[int, Result]:
    """Load `size` tokens that another process wrote, in records of 400. Measures the time and the added memory."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            kept = Path(folder) / f"{size}.npz"  # earlier versions need this ending
            columns.write(kept, _columns(size))
            with ProcessPoolExecutor(1, get_context("fork")) as pool:  # a process that has not read anything yet
                found[size] = pool.submit(_load, kept).result()
    return found


def plan(sizes: list[int]) -> dict[int, Result]:
    """Plan what one of `size` ranks, 8 per node, sends and receives: Llama-3 70B from TP8 PP4 to engines of TP8."""
    sizes_70b = {"layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8, "head_dim": 128}
    arch = Architecture("llama", **sizes_70b, vocab=128256, context=8192, eps=1e-5, tied=False, rope_theta=5e5)
    found = {}
    for size in sizes:
        slowest = moves = 0.0
        for rank in (0, size // 2 + 3, size - 1):
            start = time.perf_counter()
            made = Plan(
                names.tilings(arch, "megatron", size, 8, 4),
                names.tilings(arch, "vllm", size, 8),
                [r // 8 for r in range(size)],
            )
            count = len(made.received(rank)) + len(made.sent(rank))
            slowest, moves = max(slowest, time.perf_counter() - start), max(moves, count)
        found[size] = {"seconds": slowest, "moves": moves}
    return found


def _gather(rank: int, size: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    mesh: Any = SimpleNamespace(
        world=size,
        replicas=[[r] for r in range(size)],
        all_gather=lambda value: objects.gather(value, None, size),
        exchange=lambda parts: objects.exchange(parts, None, rank),
    )
    # deal() gives group g to rank g % size, so no sample is made on the rank that gets it
    made = {(i // 8, i % 8): _sample(i // 8) for i in range(GATHERED) if (i // 8 + size // 2) % size == rank}

    def before() -> list[Sample]:
        parts = mesh.all_gather([(*key, sample) for key, sample in made.items()])
        return [sample for *_, sample in sorted((item for part in parts for item in part), key=lambda item: item[:2])]

    def now() -> list[Sample]:
        return shares.deliver(mesh, made, shares.headers(mesh, made), 4096)

    result = {}
    for name, way in (("now", now), ("before", before)):
        taken, own = [], _memory()["RssAnon"]
        for _ in range(2):
            dist.barrier()
            start = time.perf_counter()
            samples = way()
            taken.append(max(mesh.all_gather(time.perf_counter() - start)))
        held = _memory()["RssAnon"] - own
        tokens = sum(s.tokens.nbytes + s.mask.nbytes + s.version.nbytes + s.sampler_logp.nbytes for s in samples)
        result |= {f"{name}_s": min(taken), f"{name}_received_mib": tokens / 2**20, f"{name}_own_mib": held}
        assert sum(len(s.tokens) for s in samples) == (GATHERED if name == "before" else GATHERED // size) * 2048
        del samples
    if rank == 0:
        results.put({"seconds": result["now_s"], **result})
    dist.barrier()
    os._exit(0)


def _sample(group: int) -> Sample:
    rng = np.random.default_rng(group)
    tokens, first = rng.integers(0, 128_000, 2048, np.int32), 255
    version = np.where(np.arange(2047) < first, -1, 3).astype(np.int32)
    record = {"prompt": "What? " * 200, "answer": "four"}
    text = Text(group, record, record["prompt"], "The answer is four. " * 400)
    return Sample(
        tokens,
        version >= 0,
        group,
        reward=1.0,
        text=text,
        version=version,
        sampler_logp=rng.standard_normal(2047, np.float32),
    )


def _columns(size: int) -> Columns:
    count = max(1, size // 400)
    ends = np.arange(1, count + 1, dtype=np.int64)
    tokens = np.resize(np.arange(30011, dtype=np.int32), 400 * count)
    line = np.frombuffer(b'{"prompt": "Q?"}', np.uint8)
    return Columns(
        tokens=tokens,
        learn=tokens % 2 == 0,
        token_ends=400 * ends,
        truncated=np.zeros(count, bool),
        rewards=np.zeros(count),
        sibling_ends=ends,
        rows=ends - 1,
        lines=np.resize(line, len(line) * count),
        line_ends=len(line) * ends,
        templates=np.full(count, "plain", "U16"),
        counts=np.array((count, 0, 0, 0)),
        reason=np.zeros(0, np.uint8),
    )


def _load(kept: Path) -> Result:
    before, start = _memory(), time.perf_counter()
    known = columns.read(kept)
    taken, loaded = time.perf_counter() - start, _memory()
    assert known
    total = int(known.tokens.sum())  # reads each token once, so that all pages are mapped
    assert total > 0
    return {
        "seconds": taken,
        "own_mib": loaded["RssAnon"] - before["RssAnon"],
        "resident_mib": loaded["VmRSS"] - before["VmRSS"],
        "own_after_use_mib": _memory()["RssAnon"] - before["RssAnon"],
        "resident_after_use_mib": _memory()["VmRSS"] - before["VmRSS"],
    }


def _memory() -> Result:
    """Return the memory of this process in MiB: RssAnon is private; VmRSS includes pages of files, which are shared."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) / 1024 for name, _, value in lines if name in ("RssAnon", "VmRSS")}


# name | unit of a size | sizes | measurement
ROWS: list[tuple[str, str, list[int], Callable[[list[int]], dict[int, Result]]]] = [
    ("stop-strings", "tokens", [1024, 2048, 4096, 8192], stop_strings),
    ("rewards", "responses", [32, 128], rewards),
    ("packing", "samples", [2048, 4096, 8192, 16384], packing),
    ("gather", "world", [8, 32, 64], gather),
    ("data-cache", "tokens", [7_500_000, 15_000_000, 30_000_000, 60_000_000], data_cache),
    ("plan", "world", [32, 256, 1024, 4096], plan),
]


def table(name: str, unit: str, found: dict[int, Result]) -> str:
    """Return a table with one line per size. "growth" is the time relative to the size before."""
    keys = list(next(iter(found.values())))
    rows = [f"| {name}: {unit} | {' | '.join(keys)} | growth |", "|" + "---|" * (len(keys) + 2)]
    last = 0.0
    for size, result in found.items():
        growth = f"{result['seconds'] / last:.1f} x" if last else ""
        rows.append(f"| {size:,} | {' | '.join(f'{result[key]:,.4g}' for key in keys)} | {growth} |")
        last = result["seconds"]
    return "\n".join(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--commit", default="", help="commit to write into the results")
    for name, unit, sizes, _ in ROWS:
        p.add_argument(
            f"--{name}", type=int, nargs="*", default=sizes, help=f"{unit} (default: {' '.join(map(str, sizes))})"
        )
    a = vars(p.parse_args())
    tables = []
    for name, unit, _, measure in ROWS:
        if sizes := a[name.replace("-", "_")]:
            found = measure(sorted(sizes))
            tables.append(table(name, unit, found))
            for size, result in found.items():
                about = {"commit": a["commit"]} if a["commit"] else {}
                record.say("host", name, {**about, unit: size, **result})
    print("\n" + "\n\n".join(tables), flush=True)


if __name__ == "__main__":
    main()
