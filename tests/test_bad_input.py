"""A user's mistake costs a moment: one line on stderr naming file or key, value and remedy, exit code 2, before any rank starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rlhf import configuration
from rlhf.__main__ import main
from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.variables import VARIABLES
from rlhf.weights import names

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    demo_task.write(root / "data", num_sft=300, num_rl=20, num_heldout=20)
    demo_task.make_model(root / "model", root / "data")
    return root


@pytest.fixture
def fail(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """fail(mode, *overrides) runs the command line on good inputs but for the overrides, and returns its one line on stderr."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "GPUS_PER_NODE", "SLURM_JOB_ID", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("rlhf.launcher.run", lambda *_: pytest.fail("ranks were started in spite of the mistake"))

    def run(mode: str, *overrides: str) -> str:
        data = {"sft": "train_sft", "grpo": "train_rl", "rlhf": "train_rl", "evaluate": "train_rl"}[mode]
        good = [f"policy.load={made}/model", "policy.init=random", f"data.train={made}/data/{data}.jsonl", "data.max_tokens=128"]
        assert main([mode, *good, "rollout.max_tokens=32", *overrides]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("mode", "override", "wanted"),
    [
        ("sft", "policy.load=/nowhere", ["/nowhere/config.json", "No such file"]),
        ("sft", "data.train=/nowhere.jsonl", ["/nowhere.jsonl"]),
        ("sft", "data.trian=x", ["unknown key 'data.trian'", "data.train"]),
        ("sft", "steps=many", ["steps must be int", "'many'"]),
        ("sft", "optim.lr=-1", ["optim.lr", "at least 0", "-1"]),
        ("sft", "batch.prompts=0", ["batch.prompts", "at least 1", "0"]),
        ("sft", "optim.lr=nan", ["optim.lr", "at least 0", "nan"]),
        ("sft", "optim.beta2=1", ["optim.beta2", "at most 0.99999", "1.0"]),
        ("grpo", "rollout.temperature=0", ["rollout.temperature=0", "above 0"]),
        ("grpo", "rollout.top_p=0", ["rollout.top_p", "at least 0.01 and at most 1", "0.0"]),
        ("grpo", "rollout.top_p=1.5", ["rollout.top_p", "at most 1", "1.5"]),
        ("sft", "optim.schedule=fast", ["optim.schedule", "constant, linear, cosine", "'fast'"]),
        ("sft", "missing.toml", ["missing.toml", "No such file"]),
        ("sft", "parallel.tp=3", ["parallel.tp=3", "attention heads 4"]),
        ("sft", "parallel.pp=3", ["parallel.pp=3", "layers"]),
        ("sft", "data.max_tokens=100000", ["data.max_tokens=100000", "context"]),
        ("grpo", "rollout.max_tokens=128", ["rollout.max_tokens=128", "no room"]),
        ("grpo", "rollout.tp=2", ["rollout.tp=2", "1 ranks"]),
        ("grpo", "rollout.max_tokens=120", ["train_rl.jsonl:1", "8"]),  # prompts of about 20 tokens are left 8
        ("grpo", "reward.function=nonsense", ["reward.function='nonsense'"]),
        ("grpo", "reward.function=json:no_such", ["reward.function='json:no_such'"]),
        ("grpo", "batch.minibatches=65", ["batch.minibatches=65", "batch.prompts=64"]),
    ],
)
def test_keys(fail, mode: str, override: str, wanted: list[str]) -> None:
    line = fail(mode, override)
    assert line.startswith("rlhf: ")
    assert all(part in line for part in wanted), line


@pytest.mark.parametrize(
    ("environment", "template", "wanted"),
    [
        ("Calculator", "plain", "is unknown: give module:Class or path/file.py:Class"),
        ("tools/calculator_task.py:Abacus", "plain", "has no attribute 'Abacus'"),
        ("tools/calculator_task.py:write", "plain", "not a class with the methods reset(record) and step(text)"),
        ("tools/calculator_task.py:Calculator", "human", "data.template=human does not end the assistant's turns"),
    ],
)
def test_environments(fail, environment: str, template: str, wanted: str) -> None:
    assert wanted in fail("grpo", f"rollout.environment={environment}", f"data.template={template}")


def test_rounds_need_groups(fail, made: Path) -> None:
    """Every group of one has equal rewards, so each step would sample all of its rounds and keep none of them."""
    line = fail("rlhf", f"critic.load={made}/model", "rollout.rounds=3", "rollout.group=1")
    assert "rollout.rounds > 1" in line
    assert "rollout.group=1" in line


@pytest.mark.parametrize("latest", [True, False])
def test_fresh_run_over_old_checkpoints(fail, tmp_path: Path, latest: bool) -> None:
    (tmp_path / "step_000007").mkdir()
    if latest:
        (tmp_path / "latest").write_text("step_000007")
    assert f"out={tmp_path}" in fail("sft", f"out={tmp_path}", "resume=false")


def test_a_run_without_a_whole_checkpoint(fail, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_000007")
    assert f"{tmp_path} holds no whole checkpoint: delete" in fail("sft", f"out={tmp_path}")


@pytest.mark.parametrize(
    ("key", "saved", "here"),
    [
        ("mode", "sft", "reward"),
        ("seed", 2, 1),
        ("dtype", "torch.bfloat16", "torch.float32"),
        ("zero", False, True),
        ("tp", 4, 2),
        ("pp", 2, 1),
        ("cp", 2, 1),
        ("dp", 2, 1),
    ],
)
def test_resuming_another_run(made: Path, tmp_path: Path, key: str, saved: object, here: object) -> None:
    """The remedy is one that works: resume=false over old checkpoints is a mistake as well."""
    from rlhf.checkpoint import Checkpoints
    from rlhf.parallel.mesh import Layout

    config = configuration.load("reward", [f"out={tmp_path}", f"policy.load={made}/model"])
    checkpoints = Checkpoints(config, SimpleNamespace(layout=Layout(2, 1, 1, 1), rank=0), torch.float32)
    (tmp_path / "latest").write_text("step_000007")
    (tmp_path / "step_000007").mkdir()
    (tmp_path / "step_000007/meta.json").write_text(json.dumps({**checkpoints.meta, "step": 7, "state": {}, key: saved}))
    with pytest.raises(
        UserError, match=rf"step_000007 was saved with {key}={saved}, this run has {here}: run it alike, or set another out$"
    ):
        checkpoints.resume([], {})


def test_world_that_does_not_divide(fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUS_PER_NODE", "3")
    assert "3 ranks" in fail("sft", "parallel.tp=2")


@pytest.mark.parametrize("name", ["GPUS_PER_NODE", "WORLD_SIZE"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_counts_that_are_no_numbers(fail, monkeypatch: pytest.MonkeyPatch, name: str, more: list[str]) -> None:
    monkeypatch.setenv(name, "two")
    assert f"{name}=two is not a number" in fail("sft", *more)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n', [":2", "JSON"]),
        ('{"prompt": "a", "response": "b"}\n{"prompt": 7, "response": "b"}\n', [":2", "prompt"]),
        ('{"question": "a"}\n', [":1"]),
        ("", ["no records"]),
        ("\n\n", ["no records"]),
    ],
)
def test_data(fail, tmp_path: Path, content: str, wanted: list[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    line = fail("sft", f"data.train={path}")
    assert "bad.jsonl" in line
    assert all(part in line for part in wanted), line


def test_a_folder_to_train_on_with_what_is_held_out(fail, tmp_path: Path) -> None:
    """As prepare_data makes it; all files of a folder are read."""
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "response": "b"}\n')
    line = fail("sft", f"data.train={tmp_path}", f"data.eval={tmp_path}/dev.jsonl")
    assert f"data.train={tmp_path} is a folder with dev.jsonl in it, which data.eval holds out" in line


def test_answer_is_needed_by_the_verifier(fail, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "a"}\n')
    line = fail("grpo", f"data.train={path}")
    assert "bad.jsonl:2" in line
    assert "answer" in line


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM is not supported", "LlamaForCausalLM"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'"]),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, ["sliding_window 64"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"hidden_act": "gelu"}, ["'gelu'"]),
        ({"quantization_config": {}}, ["quantized"]),
        ({"vocab_size": 16}, ["vocab_size of 16"]),
        ({"num_attention_heads": 0}, ["num_attention_heads 0 is not a whole number above 0"]),
        ({"num_hidden_layers": "2"}, ["num_hidden_layers '2' is not a whole number above 0"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps '1e-5' is not a number"]),
        ({"rope_scaling": 2}, ["not what a model's config.json says"]),
    ],
)
def test_config_json(fail, made: Path, tmp_path: Path, changes: dict, wanted: list[str]) -> None:
    (tmp_path / "tokenizer.model").write_bytes((made / "model/tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL | changes))
    line = fail("sft", f"policy.load={tmp_path}")
    assert str(tmp_path / "config.json") in line
    assert all(part in line for part in wanted), line


@pytest.mark.parametrize("mode", ["grpo", "evaluate"])
def test_a_reward_model_needs_its_head(fail, made: Path, tmp_path: Path, mode: str) -> None:
    """A language model in its place would score everything 0. Whoever learns may begin with a head of zeros."""
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((made / "model" / name).read_bytes())
    demo_task.make_weights(tmp_path)
    load = ("policy.init=load", f"reward.load={tmp_path}", f"data.eval={made}/data/heldout.jsonl")
    assert f"{tmp_path} has no scalar head" in fail(mode, *load, f"policy.load={tmp_path}")
    assert f"{made}/model: no *.safetensors file" in fail(mode, *load)


def test_every_model_reads_whole_texts(fail, made: Path, tmp_path: Path) -> None:
    """A reward model of a shorter context than the policy's would be asked about positions that it never saw."""
    (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL | {"max_position_embeddings": 64}))
    assert f"data.max_tokens=128 is longer than the context of {tmp_path}, 64" in fail("grpo", f"reward.load={tmp_path}")


def test_safetensors(fail, made: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((made / "model" / name).read_bytes())
    load = ("policy.init=load", f"policy.load={tmp_path}")
    assert "safetensors" in fail("sft", *load)
    shapes = names.hf_shapes(architecture.read(tmp_path))
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors" in fail("sft", *load)
    save_file({name: torch.zeros(shape) for name, shape in list(shapes.items())[1:]}, path)
    assert next(iter(shapes)) in fail("sft", *load)
    save_file({name: torch.zeros(*shape, 2) for name, shape in shapes.items()}, path)
    assert "shape" in fail("sft", *load)
