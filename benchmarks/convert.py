"""Measure the speed and memory of the conversion of weights.

python benchmarks/convert.py FOLDER [--layers 32] [--format legacy] [--tp 1]

Writes a Hugging Face folder of random bfloat16 weights with Llama-2-7B's shapes into FOLDER, copies it with cp,
converts it, and converts the result back. Each input starts outside the page cache, and the time ends when the output
is on the disk. The last line is JSON: bytes, seconds, peak resident memory (GB), and the rate of each conversion
relative to cp. FOLDER needs three times the bytes, and is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from publish import MODELS

from rlhf.weights import export, names
from rlhf.weights.entries import store
from rlhf.weights.formats import FORMATS, Target, hf

ROOT = Path(__file__).parents[1]


def make(folder: Path, layers: int) -> int:
    """Write a Hugging Face folder of random weights. Returns its size in bytes."""
    arch, dtype = replace(MODELS["7b"], layers=layers), torch.bfloat16
    target, noise = Target(FORMATS["hf"], arch, dtype), torch.randn(1 << 20)
    folder.mkdir(parents=True)
    for title, tiling in target.files.items():
        for entry in target.format.begin(target, folder / title, names.shapes(tiling)).values():
            count = prod(entry.shape)
            store(entry, noise.mul_(1.0001).to(dtype).repeat(-(-count // len(noise)))[:count].view(entry.shape))
    export.finish(target, folder, hf.description(arch))
    return sum(path.stat().st_size for path in folder.iterdir())


def evict(folder: Path) -> None:
    """Remove the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(command: list[str], source: Path, target: Path) -> dict[str, float]:
    """Run a command. Returns the seconds until its output is on the disk, and its peak memory."""
    evict(source)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{' '.join(command)} failed"
    for path in target.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return {"seconds": round(time.perf_counter() - start, 2), "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 3)}


def main(arguments: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--format", choices=FORMATS, default="legacy")
    p.add_argument("--tp", default="1")
    p.add_argument("--pp", default="1")
    a = p.parse_args(arguments)
    source, copy, there, back = (a.folder / name for name in ("hf", "copy", "there", "back"))
    size = make(source, a.layers)
    convert = [sys.executable, "-m", "rlhf", "convert"]
    try:
        cp = measure(["cp", "-r", str(source), str(copy)], source, copy)
        shutil.rmtree(copy)
        layout = ["--format", a.format, "--tp", a.tp, "--pp", a.pp]
        out = measure([*convert, "--from", str(source), "--to", str(there), *layout], source, there)
        shutil.rmtree(source)
        home = measure([*convert, "--from", str(there), "--to", str(back), "--format", "hf"], there, back)
    finally:
        shutil.rmtree(a.folder)
    result = {
        "benchmark": "convert",
        "command": f"benchmarks/convert.py FOLDER {' '.join(arguments[1:])}".strip(),
        "bytes": size,
    }
    for name, found in (("cp", cp), (f"hf_to_{a.format}", out), (f"{a.format}_to_hf", home)):
        ratio = {"ratio": round(cp["seconds"] / found["seconds"], 2)} if name != "cp" else {}
        result[name] = found | {"gb_per_s": round(size / found["seconds"] / 1e9, 2)} | ratio
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
