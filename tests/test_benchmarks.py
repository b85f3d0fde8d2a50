"""Every benchmark runs at toy size on the CPU and prints its measurements."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
TRL = importlib.util.find_spec("trl") is not None


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def lines(script: str, *arguments: str, **variables: str) -> list[dict]:
    """Return the JSON lines that a benchmark prints."""
    done = run(script, *arguments, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"benchmark"')]
    assert all(line["torch"] and line["command"].startswith(f"benchmarks/{script}.py ") for line in found)
    return found


def test_train() -> None:
    found = lines("train", "--model=toy", "--layers=1", "--tokens=256", "--length=64", "--repeat=1", "--microbatches=2")
    assert [line["case"] for line in found] == ["fixed, plain", "lognormal, plain", "fixed, fused", "lognormal, fused"]
    for line in found:
        rate = line["tokens_per_s_per_device"] * line["forward_backward_s"]
        assert rate == pytest.approx(512, rel=0.05)  # the last of the lognormal lengths may exceed the total
        assert 0 < line["share_of_matmul"] < 1
        assert line["score_s"] > 0


def test_save(tmp_path: Path) -> None:
    (line,) = lines("save", str(tmp_path / "out"), "--model=toy", "--layers=1", "--tokens=256", "--length=64")
    assert line["checkpoint_gb"] * 1e9 == pytest.approx(12 * line["parameters"], rel=0.02)
    assert line["command"] == "benchmarks/save.py OUT --model=toy --layers=1 --tokens=256 --length=64"
    assert line["held_by_copy"] == pytest.approx(line["held_s"] / line["copy_s"], rel=1e-3)


def test_attention() -> None:
    found = lines("attention", "--tokens=256", "--length=64", "--heads=2", "--width=32", "--repeat=1")
    assert [line["case"] for line in found] == ["fixed, padded", "fixed, even", "lognormal, padded"]
    assert all(line[gap] < 1e-6 for line in found for gap in ("gap", "gap_q", "gap_k", "gap_v"))


def test_rollout_and_switch() -> None:
    found = lines("switch", "--rollout", "--model=toy", "--layers=1", "--prompts=4", "--new=8", "--length=16")
    rollouts = [line for line in found if line["benchmark"] == "rollout"]
    assert [line["case"] for line in rollouts] == [
        "alone",
        "alone, with log-probs",
        "alone, with log-probs and seeds",
        "sampler",
    ]
    assert all(line["tokens_per_s"] > 0 for line in rollouts)
    engine, parking = (line for line in found if line["benchmark"] == "switch")
    assert parking["optimizer_gib"] == pytest.approx(3 * 4 / 2**30 * parking["parameters"], rel=0.05)
    assert engine["sleep_s"] < 1


def test_tail() -> None:
    """With responses in flight, two equal runs have the same samples, and so has a run that is resumed."""
    keys = [
        "--model=toy",
        "--groups",
        "2",
        "--siblings=4",
        "--mean=24",
        "--longest=96",
        "--steps=1",
        "--warm=1",
        "--check",
    ]
    check, equal, strict, partial = lines("tail", *keys)
    assert check["twice"] is check["resumed"] is True
    assert (equal["tokens"], equal["longest"]) == (2 * 4 * 24, 24)
    assert strict["us_per_token"] == pytest.approx(strict["ratio"] * equal["us_per_token"], rel=1e-3)
    assert 0 < partial["lag/0"] < 1
    assert sum(partial[f"lag/{lag}"] for lag in range(5)) == pytest.approx(1)


def test_step(tmp_path: Path) -> None:
    """PPO has all four models. Memory of the CPU process does not grow over twenty steps."""
    keys = ["batch.prompts=2", "rollout.group=2", "rollout.max_tokens=8", "rollout.engine=kvcache"]
    exact = {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # freed memory returns to the system at once, so that fragments do not count
    (found,) = lines(
        "step", str(tmp_path), "--mode=rlhf", "--model=toy", "--layers=1", "--steps=20", "--warm=2", *keys, **exact
    )
    phases = sum(found[f"time/{phase}"] for phase in ("rollout", "score", "learn", "publish"))
    assert phases + found["time/between"] == pytest.approx(found["time/step"], rel=1e-3)
    assert 0.1 < found["memory/host"] < 20
    assert found["rise/host"] < 0.01, "GiB"


def test_host() -> None:
    """Each case runs at two sizes. Tokens of a data set are mapped, so a process does not copy them."""
    sizes = {"stop-strings": (64, 128), "rewards": (2, 4), "packing": (32, 64), "gather": (2, 4)}
    sizes |= {"data-cache": (400_000, 2_000_000), "plan": (32, 4096)}
    found = lines("host", *(str(argument) for name, both in sizes.items() for argument in (f"--{name}", *both)))
    units = ("tokens", "responses", "samples", "world")
    named = [(line["case"], next(line[unit] for unit in units if unit in line)) for line in found]
    assert named == [(name, size) for name, both in sizes.items() for size in both]
    assert all(line["seconds"] > 0 for line in found)
    shared, cache, plans = found[-6:-4], found[-4:-2], found[-2:]
    assert all(
        line["now_received_mib"] * line["world"] == pytest.approx(line["before_received_mib"]) for line in shared
    )
    assert cache[1]["own_after_use_mib"] < 4 < cache[1]["resident_after_use_mib"], "of 10 MiB"
    assert plans[0]["moves"] == pytest.approx(plans[1]["moves"], rel=0.02), (
        "a rank's part of a publish does not grow with the world"
    )


@pytest.mark.skipif(not TRL, reason="trl is not installed: pip install trl==1.16.0 datasets")
def test_trl(tmp_path: Path) -> None:
    """Both trainers do the same work, each with vLLM, and TRL's engine samples with TRL's newest weights."""
    keys = ["batch.prompts=2", "rollout.group=4", "rollout.max_tokens=8", "optim.lr=0.01"]
    (found,) = lines("trl_grpo", str(tmp_path), "--model=toy", "--layers=1", "--rows=4", *keys)
    assert found["trl/response_tokens"] == found["ours/response_tokens"] == pytest.approx(8, abs=0.5)
    assert found["trl/tokens"] == pytest.approx(found["ours/tokens"], rel=0.1)  # prompts come in another order
    assert found["trl/mismatch"] < 0.02  # 0.24 with the weights of the step before
    assert found["trl/rollout"] + found["trl/score"] + found["trl/learn"] == pytest.approx(
        found["trl/seconds"], rel=1e-3
    )
    assert found["ratio"] == pytest.approx(found["ours/tokens_per_second"] / found["trl/tokens_per_second"], rel=1e-3)


@pytest.mark.skipif(TRL, reason="trl is installed")
def test_without_trl(tmp_path: Path) -> None:
    done = run("trl_grpo", str(tmp_path / "out"))
    assert done.stderr.startswith("trl is not installed: pip install trl==1.16.0")
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()


def table() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module("table")


def test_table_shows_both_trainers() -> None:
    line = {"ratio": 2.104, "command": "benchmarks/trl_grpo.py OUT", "device": "cpu"}
    for side, rate in (("ours", 10521.0), ("trl", 5000.0)):
        line |= {f"{side}/tokens_per_second": rate, f"{side}/response_tokens": 398.7}
    shown = table().table({("trl", "grpo 7b, float32"): [line]})
    assert (
        "| 2.10 x: 10,521 and 5,000 tokens/s, responses of 399 and 399 tokens "
        "| 2 x | `benchmarks/trl_grpo.py OUT` (cpu) |" in shown
    )


def test_readme_shows_the_results() -> None:
    shown = (ROOT / "README.md").read_text().partition(table().BEGIN)[2].partition(table().END)[0]
    assert shown == table().table(table().read(ROOT / "benchmarks" / "results")), "run python benchmarks/table.py"
