"""A new algorithm is one file and one line.

The steps of CONTRIBUTING.md are applied to a copy of the package, which then runs on two ranks.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rows import write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import demo_task  # noqa: E402

LINES = {"kto": "kto.KTO", "reinforce": "reinforce.Reinforce"}  # mode -> its line in the table
KEYS = [
    "data.max_tokens=64",
    "rollout.max_tokens=16",
    "rollout.group=4",
    "rollout.engine=kvcache",
    "batch.prompts=4",
    "batch.tokens=256",
]
KEYS += ["steps=3", "optim.lr=1e-3", "evaluate.prompts=4", "parallel.dp=2", "checkpoint.every=2", "checkpoint.keep=2"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the package with two more algorithms, and with a tiny model and data for both."""
    root = tmp_path_factory.mktemp("foreign")
    shutil.copytree(ROOT / "rlhf", root / "rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    table = root / "rlhf/algorithms/__init__.py"
    for mode, place in LINES.items():
        shutil.copy(ROOT / f"tests/foreign/{mode}.py", root / "rlhf/algorithms")
        table.write_text(table.read_text().replace("MODES = {", f'MODES = {{\n    "{mode}": "{place}",'))
    changed = [
        path
        for path in (ROOT / "rlhf").rglob("*.py")
        if path.read_bytes() != (root / path.relative_to(ROOT)).read_bytes()
    ]
    assert [path.name for path in changed] == ["__init__.py"]
    demo_task.write(root / "data", num_sft=300, num_rl=20, num_heldout=8)
    demo_task.make_model(root / "model", root / "data")
    demo_task.make_weights(root / "model")
    write(
        root / "data/pairs.jsonl",
        *({"prompt": f"{n} and {n}?", "chosen": f" {2 * n}", "rejected": " none"} for n in range(9)),
    )
    return root


def call(root: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_help_knows_them(copy: Path) -> None:
    text = call(copy, "--help")
    assert "  kto        Kahneman-Tversky optimisation: " in text
    assert "  reinforce  REINFORCE: " in text
    assert "kto.beta=0.1 " in call(copy, "kto", "--help")


@pytest.mark.parametrize(
    ("mode", "train", "samples", "phases"),
    [
        ("kto", "pairs", "4 prompts x 2 responses = 8 samples", ["score/policy", "score/reference", "learn/policy"]),
        (
            "reinforce",
            "train_rl",
            "4 prompts x 4 responses = 16 samples",
            ["rollout", "publish", "score/policy", "learn/policy"],
        ),
    ],
)
def test_dry_run(copy: Path, mode: str, train: str, samples: str, phases: list[str]) -> None:
    text = call(copy, mode, "--dry-run", *KEYS, "policy.load=model", f"data.train=data/{train}.jsonl")
    assert samples in text
    assert next(line for line in text.splitlines() if line.startswith("GiB per rank")).split()[3:] == phases


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_kto_runs(copy: Path) -> None:
    """The first loss is that of equal models: sigmoid(0) is one half. Learning lowers the held-out loss."""
    said = call(
        copy,
        "kto",
        *KEYS,
        "policy.load=model",
        "data.train=data/pairs.jsonl",
        "data.eval=data/pairs.jsonl",
        "out=runs/kto",
    )
    assert said.count("first record, template plain (>>> and <<< enclose what is learned):\n  | <s>") == 2, (
        "of both data sets"
    )
    rows = metrics(copy / "runs/kto")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert math.isclose(rows[0]["eval_loss"], 0.5, abs_tol=1e-5)
    assert rows[1]["kl"] == 0.0
    assert rows[-1]["eval_loss"] < 0.5
    assert (copy / "runs/kto/hf/config.json").exists()
    assert said.splitlines()[-1] == "the trained model: runs/kto/step_000003/hf"


def test_reinforce_runs(copy: Path) -> None:
    """A random model fulfils the reward function in some responses, so the baseline is between 0 and 1."""
    (copy / "even.py").write_text("def reward(prompt, response, record):\n    return len(response) % 2 == 0\n")
    data = ["data.train=data/train_rl.jsonl", "data.eval=data/heldout.jsonl", "reward.function=even.py:reward"]
    call(copy, "reinforce", *KEYS, "policy.load=model", *data, "out=runs/reinforce")
    rows = metrics(copy / "runs/reinforce")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["baseline"] == row["reward"] and row["reward_failed"] == 0 for row in rows[1:])
    assert any(0 < row["baseline"] < 1 and row["grad_norm"] > 0 for row in rows[1:])
    assert all(math.isfinite(row["loss"]) for row in rows[1:])
