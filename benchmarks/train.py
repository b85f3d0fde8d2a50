"""Measure the learner: forward and backward, the log-prob pass and the optimizer, with Llama-2-7B's layers.

    python benchmarks/train.py                                                     one GPU; plain, then fused kernels
    python benchmarks/train.py --kernels fused --profile                           and the time of each kernel
    torchrun --nproc-per-node 2 benchmarks/train.py --kernels fused --tp 2         TP2 with sequence parallelism
    torchrun --nproc-per-node 2 benchmarks/train.py --kernels fused                DP2, distributed optimizer
    python benchmarks/train.py --model toy --layers 2 --tokens 512 --length 128    on a CPU

Weights and tokens are random: the computation is that of a real run. FLOPs are those of the model: 6 per matrix weight
and token, and causal attention (half of the square) forward and backward. Recomputation does not count.
"""

from __future__ import annotations

import argparse
import gc
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import record
import torch
from publish import MODELS

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.contracts import Sample
from rlhf.data.packing import microbatches, shares
from rlhf.model import operations
from rlhf.model.architecture import Architecture
from rlhf.parallel.mesh import Mesh
from rlhf.train.learner import Learner

MEAN, SIGMA = 600, 1.0  # of the lognormal lengths
LR = 1e-6
CASES = ("fixed", "lognormal")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=MODELS, default="7b")
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--tokens", type=int, default=16384, help="tokens per micro-batch (batch.tokens)")
    p.add_argument("--microbatches", type=int, default=4, help="micro-batches per update, on each data-parallel rank")
    p.add_argument("--length", type=int, default=4096, help="tokens per sequence, or their limit")
    p.add_argument("--kernels", nargs="+", choices=("plain", "fused"), default=["plain", "fused"])
    p.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    p.add_argument("--tp", type=int, default=1)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--profile", action="store_true", help="print the kernels by time")
    return p.parse_args()


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the peak and sustained rate of a large matrix product, and of copies (bytes read + written)."""
    n, many = (8192, 1500) if device.type == "cuda" else (512, 10)
    a, b, out = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(3))
    product = record.seconds(lambda: torch.mm(a, b, out=out), 30, 10)
    sustained = record.seconds(lambda: [torch.mm(a, b, out=out) for _ in range(many)], 1) / many  # limited by power
    source = torch.empty(2**30 if device.type == "cuda" else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = record.seconds(lambda: target.copy_(source), 20, 5)
    rates = {"matmul_tflops": product, "sustained_tflops": sustained}
    return {
        **{name: 2 * n**3 / seconds / 1e12 for name, seconds in rates.items()},
        "copy_tb_per_s": 2 * source.numel() / copy / 1e12,
    }


def draw(total: int, length: int, vocab: int, varied: bool) -> list[Sample]:
    """Return samples of about `total` tokens: all of `length` tokens, or lognormal lengths up to `length`."""
    rng, samples, lengths = np.random.default_rng(1), [], []
    mean = min(MEAN, length / 4)
    while sum(lengths) < total:
        drawn = int(rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)) if varied else length
        lengths.append(min(max(drawn, 16), length, max(16, total - sum(lengths))))
    for i, n in enumerate(lengths):
        samples.append(Sample(rng.integers(0, vocab, n + 1).astype(np.int32), np.ones(n, bool), group=i))
    return samples


def flops(arch: Architecture, lengths: list[int]) -> float:
    """Return the FLOPs of the model, forward and backward."""
    matrices = arch.num_parameters() - arch.vocab * arch.hidden  # the embedding is no matrix product
    attention = 6 * arch.layers * arch.heads * arch.head_dim
    return sum(n * (6 * matrices + attention * n) for n in lengths)


def measure(a: argparse.Namespace, mesh: Mesh, kernels: str, arch: Architecture, limits: dict[str, float]) -> None:
    """Measure all cases with one learner."""
    operations.fusing = kernels == "fused"
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    config = configuration.load("sft", [f"parallel.tp={a.tp}", f"batch.tokens={a.tokens}"])
    learner = Learner(arch, config, mesh, dtype, fill=fill, temperature=1.0, train=True)
    loss = partial(ALGORITHMS["sft"](config).loss, "policy")
    about = {
        "model": a.model,
        "layers": arch.layers,
        "parameters": arch.num_parameters(),
        "dtype": str(dtype),
        "kernels": kernels,
    }
    about |= {"tp": a.tp, "dp": mesh.layout.dp, "tokens": a.tokens, "microbatches": a.microbatches, **limits}
    for case in a.cases:
        dp = mesh.layout.dp
        samples = draw(a.tokens * a.microbatches * dp, a.length, arch.vocab, case == "lognormal")
        cut = microbatches(shares(samples, dp, arch.hidden)[mesh.dp_rank], a.tokens, False, mesh.largest)
        lengths = [len(s.mask) for s in samples]
        update = record.seconds(partial(learner.learn, cut, loss, LR), a.repeat)
        step = record.seconds(lambda: learner.optimizer.step(LR), a.repeat)
        score = record.seconds(partial(learner.score, cut), a.repeat)
        tflops = flops(arch, lengths) / (update - step) / 1e12 / mesh.world
        result = {
            **about,
            "length": a.length,
            "sequences": len(samples),
            "microbatches": len(cut),
            "tokens_per_s_per_device": sum(lengths) / (update - step) / mesh.world,
            "tflops_per_device": tflops,
            "share_of_matmul": tflops / limits["matmul_tflops"],
            "share_of_sustained": tflops / limits["sustained_tflops"],
            "forward_backward_s": update - step,
            "score_s": score,
            "score_speedup": (update - step) / score,
            "optimizer_s": step,
            "host_waits": host_waits(
                partial(learner._schedule, map(learner._pack, cut), len(cut), partial(learner._loss, loss), train=True)
            ),
            "optimizer_bytes_ratio": step / (34 * arch.num_parameters() / mesh.world / limits["copy_tb_per_s"] / 1e12),
            "peak_gib": record.peak_gib(),
        }
        record.say("train", f"{case}, {kernels}", result)
        if a.profile:
            profile(partial(learner.learn, cut[:1], loss, LR), f"{case}, {kernels}, one micro-batch and the optimizer")
            profile(partial(learner.score, cut[:1]), f"{case}, {kernels}, score of one micro-batch")


def host_waits(work: Callable[[], object]) -> int:
    """Return how often the host waits for the device during the call, as detected by torch."""
    if not torch.cuda.is_available():
        return 0
    record.wait()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@torch.no_grad()
def fill(parameters: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(1)  # replicated parameters are equal on all ranks
    for p in parameters.values():
        p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, 0.02)


def profile(work: partial, title: str, rows: int = 30) -> None:
    """Print the kernels, by their share of the device time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    record.wait()
    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        record.wait()
    kernels = [
        e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    ]
    total = sum(e.self_device_time_total for e in kernels)
    if os.environ["RANK"] != "0" or not total:
        return
    print(f"\nkernels of {title}: {total / 1e3:.1f} ms")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:rows]:
        print(
            f"  {e.self_device_time_total / total:6.1%} {e.self_device_time_total / 1e3:9.2f} ms"
            f" {e.count:6}x  {e.key[:110]}"
        )


def main() -> None:
    a = options()
    config = configuration.load("sft", [f"parallel.tp={a.tp}"])
    mesh = Mesh(config.parallel, 1)
    limits = ceilings(mesh.device, torch.bfloat16 if mesh.device.type == "cuda" else torch.float32)
    arch = replace(MODELS[a.model], layers=a.layers)
    for kernels in a.kernels:
        measure(a, mesh, kernels, arch, limits)
        gc.collect()
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    os._exit(0)


if __name__ == "__main__":
    main()
