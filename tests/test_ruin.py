"""Updates and models with values that are not finite are reported in one line, and never saved."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf import folders
from rlhf.errors import failure
from rlhf.weights import pt
from rlhf.weights.entries import Entry, store

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import demo_task  # noqa: E402

KEYS = [
    "data.max_tokens=64",
    "rollout.max_tokens=16",
    "rollout.group=2",
    "rollout.engine=kvcache",
    "batch.prompts=4",
    "batch.tokens=256",
]
KEYS += ["checkpoint.every=1", "evaluate.prompts=4", "evaluate.every=0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ruin")
    demo_task.write(root / "data", num_sft=300, num_rl=20, num_heldout=8)
    demo_task.make_model(root / "model", root / "data")
    demo_task.make_weights(root / "model")
    return root


def call(made: Path, mode: str, *overrides: str, room: int = resource.RLIM_INFINITY) -> tuple[int, str]:
    """Return exit code and stderr. room: the largest file that can be written, in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    data = {"sft": "train=data/train_sft", "grpo": "train=data/train_rl", "evaluate": "eval=data/heldout"}[mode]
    command = [sys.executable, "-m", "rlhf", mode, *KEYS, "policy.load=model", f"data.{data}.jsonl", *overrides]
    done = subprocess.run(
        command,
        cwd=made,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    return done.returncode, done.stderr


def rows(out: Path) -> list[dict]:
    def no_number(text: str) -> None:
        pytest.fail(f"{text} is not JSON")

    return [json.loads(line, parse_constant=no_number) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_first_update_that_is_no_number(made: Path) -> None:
    """AdamW without epsilon divides 0 by 0 where a gradient is 0."""
    code, said = call(made, "sft", "out=epsilon", "steps=1", "optim.eps=0")
    assert code == 1
    (line,) = said.splitlines()
    assert line.startswith("rlhf: step 1: the policy's weights are no longer finite")
    assert line.endswith("No checkpoint was made before: start again with a lower optim.lr, or optim.eps above 0")
    assert not list((made / "epsilon").glob("step_*"))
    assert not (made / "epsilon/hf").is_symlink()


@pytest.mark.parametrize("layout", ["parallel.dp=1", "parallel.dp=2"])
def test_an_update_that_ruins_the_weights(made: Path, layout: str) -> None:
    """The checkpoint before stays the newest. The message names it, and its advice works. All ranks end."""
    keys = [f"out={layout}", layout, "checkpoint.keep=1"]
    assert call(made, "sft", *keys, "steps=2")[0] == 0
    code, said = call(made, "sft", *keys, "steps=4", "optim.eps=0")
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if not line.startswith("rlhf: rank")]
    assert line.startswith("rlhf: step 3: ")
    assert f"{layout}/step_000002" in line
    assert (made / layout / "latest").read_text() == "step_000002"
    assert all(tensor.isfinite().all() for tensor in load_file(made / layout / "hf/model.safetensors").values())
    assert call(made, "sft", *keys, "steps=3")[0] == 0
    assert [row["step"] for row in rows(made / layout)] == [1, 2, 3]
    if layout == "parallel.dp=2":
        check_a_full_disk(made, layout, *keys)


def check_a_full_disk(made: Path, out: str, *keys: str) -> None:
    """Check that both ranks fail in the next checkpoint, and one rank reports it.

    Older checkpoints stay, and the run continues from them.
    """
    code, said = call(made, "sft", *keys, "steps=4", room=100_000)
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if not line.startswith("rlhf: rank")]
    assert re.match(
        rf"rlhf: {out}/step_000004.partial/[a-z_0-9/]*.safetensors: File too large; fix this and start again", line
    ), line
    assert (made / out / "latest").read_text() == "step_000003"


@pytest.mark.parametrize("write", ["torch.save", "a tree", "a tensor", "its end"])
def test_a_file_that_cannot_be_written(write: str) -> None:
    """For any exception of torch, the error is that of the system, with the path."""
    path, tree = Path("/dev/full"), {"weights": torch.ones(100_000 if write == "torch.save" else 1)}
    with pytest.raises(OSError, match="/dev/full") as error:  # noqa: PT012
        if write == "a tree":
            pt.write(tree, path)
        if write == "a tensor":
            store(Entry(path, "F32", (1,), 0, 4), tree["weights"])
        with folders.writing(path) as file:
            torch.save(tree, file) if write == "torch.save" else file.write(b"1")
    assert failure(error.value).startswith("/dev/full: ")


@pytest.mark.parametrize(
    ("mode", "value", "keys"),
    [
        ("sft", torch.nan, ["policy.load={0}"]),
        ("sft", -torch.inf, ["policy.load={0}"]),
        ("grpo", 1e30, ["reference.load={0}", "grpo.kl=0.1"]),
        ("evaluate", torch.nan, ["policy.load={0}"]),
        ("evaluate", torch.inf, ["policy.load={0}", "rollout.engine=vllm"]),
    ],
)
def test_a_model_of_no_numbers(made: Path, tmp_path: Path, mode: str, value: float, keys: list[str]) -> None:
    """Every role is tested, and an engine that reads the folder itself."""
    shutil.copytree(made / "model", tmp_path / "model")
    tensors = load_file(made / "model/model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    code, said = call(made, mode, *(key.format(tmp_path / "model") for key in keys), f"out={tmp_path}/run")
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("rlhf: ")]
    assert f"{tmp_path}/model: its weights are not finite" in line
    assert "Traceback" not in said
