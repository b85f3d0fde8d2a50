"""Whole runs with the real engines: resume, layouts, the demo, and the demo with a random reward."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from rlhf.data.tokenizer import Tokenizer
from rlhf.report import page

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
GRPO = ["configs/demo/grpo.toml", "batch.prompts=8", "evaluate.every=0", "evaluate.prompts=16"]


def start(mode: str, *arguments: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rlhf", mode, *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(mode: str, *arguments: str) -> str:
    return finish(start(mode, *arguments))


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-6000:]
    return output


def metrics(out: Path, name: str = "metrics") -> list[dict[str, float]]:
    """Return the numbers of every step, without times and memory."""
    rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/")) and k != "tokens_per_second"}
        for row in rows
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Run the demo's command. Return the accuracies by stage.

    Later tests start from its models in runs/demo.
    """
    done = subprocess.run(
        [sys.executable, "tools/demo.py"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.count("first record, template plain (") == 4, "one per data set of every stage"
    accuracies = [row["eval_reward"] for row in metrics(ROOT / "runs/demo/grpo") if "eval_reward" in row]
    (fresh,) = metrics(ROOT / "runs/demo/evaluate", "evaluate")
    return {"sft": accuracies[0], "grpo": accuracies[-1], "fresh": fresh["eval_reward"]}


def test_demo_learns(demo: dict[str, float]) -> None:
    """The model improves on held-out prompts, and a new process that loads the exported folder gets the same result."""
    assert 0.3 <= demo["sft"] <= 0.6, demo
    assert demo["grpo"] > 0.9, demo
    assert demo["fresh"] == demo["grpo"], demo


def test_noise_does_not_teach(demo: dict[str, float], tmp_path: Path) -> None:
    """The same run with a random reward does not improve: the demo's gain (about 0.5) comes from the verifier."""
    keys = [
        "reward.function=tools/demo_task.py:noise",
        "evaluate.function=math",
        "evaluate.every=0",
        "evaluate.prompts=0",
    ]
    run("grpo", "configs/demo/grpo.toml", f"out={tmp_path}", *keys)
    assert metrics(tmp_path)[-1]["eval_reward"] - demo["sft"] < (demo["grpo"] - demo["sft"]) / 2


@pytest.mark.usefixtures("demo")
def test_exported_folder_loads_in_transformers() -> None:
    """Tokenizer and model are loaded: the greedy responses are those of vLLM."""
    folder = ROOT / "runs/demo/grpo/hf"
    model, tokenizer = (
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    row = json.loads((ROOT / "runs/demo/data/heldout.jsonl").read_text().splitlines()[0])
    ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
    ours = Tokenizer.load(folder)
    assert ids[0].tolist() == [ours.bos, *ours.encode(row["prompt"])]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert "####" in text


@pytest.mark.usefixtures("demo")
def test_resume_is_bitwise(tmp_path: Path) -> None:
    """Six steps (epochs=0.0106) in one run equal six steps with SIGKILL to all ranks in the middle, bitwise.

    Weights and numbers are compared. Responses are in flight between the steps, and both engines continue them from
    the checkpoint. The second run has more evaluations. The prompts are those of two data sets.
    """
    lines = (ROOT / "runs/demo/data/train_rl.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("many", lines[:3000]), ("few", lines[3000:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    common = [
        *GRPO,
        "steps=100",
        "epochs=0.0106",
        f'data.train=["{tmp_path}/many.jsonl", "{tmp_path}/few.jsonl"]',
        "data.weights.few=0.5",
        "checkpoint.every=2",
        "optim.schedule=linear",
        "log.to=tensorboard",
        "rollout.inflight=1.5",
    ]
    whole_run = start("grpo", *common, f"out={tmp_path}/whole")
    process, killed = start("grpo", *common, f"out={tmp_path}/killed"), tmp_path / "killed/metrics.jsonl"
    while process.poll() is None and not (killed.exists() and '"step": 3' in killed.read_text()):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0][-3000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    output = run("grpo", *common, f"out={tmp_path}/killed", "evaluate.every=5")
    assert "6 steps of 8 of 4,096 records: 0.01067 epochs (one pass over many each); out: " in finish(whole_run)
    assert "resumed after step" in output
    whole, resumed = (load_file(tmp_path / name / "hf/model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = metrics(tmp_path / "whole")
    again = [
        {key: value for key, value in row.items() if key in known}
        for row, known in zip(metrics(tmp_path / "killed"), rows, strict=True)
    ]
    assert rows == again
    assert len(rows) == 7
    assert any(row.get("lag/1") for row in rows), "some tokens were drawn by older weights"
    assert list((tmp_path / "whole").glob("events.out.tfevents.*"))
    assert (tmp_path / "whole/report.html").exists() == (page.plotting() is not None)
    assert "learn/policy" in json.loads((tmp_path / "whole/ledger.json").read_text())
    assert sorted(p.name for p in (tmp_path / "whole").glob("step_*")) == ["step_000004", "step_000006"]


@pytest.mark.usefixtures("demo")
def test_layouts_agree(tmp_path: Path) -> None:
    """TP2 x PP2 with two engines of TP2 equals one rank for the same seed, within float32 noise.

    Samples, losses and gradients are compared.
    """
    layouts = {"one": ["parallel.tp=1"], "four": ["parallel.tp=2", "parallel.pp=2", "rollout.tp=2"]}
    common = [*GRPO, "steps=3", "grpo.kl=0.04", "log.report=false"]
    for process in [start("grpo", *common, *keys, f"out={tmp_path}/{name}") for name, keys in layouts.items()]:
        finish(process)
    for one, four in zip(metrics(tmp_path / "one"), metrics(tmp_path / "four"), strict=True):
        assert one.keys() == four.keys()
        for key in one.keys() - {"mismatch"}:
            assert four[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), (key, one, four)
    assert not list(tmp_path.glob("*/report.html"))


def test_a_calculator_is_asked_because_it_is_right(tmp_path: Path) -> None:
    """A model that guesses most products learns to use the calculator.

    If its results are random, the model does not improve.
    """
    subprocess.run([sys.executable, "tools/calculator_task.py"], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=100)
    run("sft", "configs/calculator/sft.toml")
    runs, accuracies = {}, {}
    for name in ("Calculator", "Noise"):  # at once: two runs of one thread are faster than two threads, twice
        keys = [f"rollout.environment=tools/calculator_task.py:{name}", f"out={tmp_path}/{name}", "steps=10"]
        runs[name] = start("grpo", "configs/calculator/grpo.toml", *keys, OMP_NUM_THREADS="1")
    for name, process in runs.items():
        output = finish(process)
        accuracies[name] = [row["eval_reward"] for row in metrics(tmp_path / name) if "eval_reward" in row]
        if name == "Calculator":
            assert re.search(r" => calc \d+ \* \d+ <= (\d+) => #### \1", output), "the dialogue is shown"
    assert accuracies["Calculator"][0] < 0.5
    assert accuracies["Calculator"][-1] > 0.9
    assert accuracies["Noise"][-1] < 0.5
    last = (tmp_path / "Calculator/samples/step_000010.jsonl").read_text().splitlines()
    asked = [line["turns"] for line in map(json.loads, last) if line["reward"] == 1]
    assert ["assistant", "user", "assistant"] in [[turn["role"] for turn in turns] for turns in asked], "and kept"
