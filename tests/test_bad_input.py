"""A user's mistake costs a moment: one line on stderr naming file or key, value and remedy, exit code 2, before any rank starts."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rlhf import configuration
from rlhf.__main__ import main
from rlhf.data import forms
from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.variables import VARIABLES
from rlhf.weights import names

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    demo_task.write(root / "data", num_sft=300, num_rl=20, num_heldout=20)
    demo_task.make_model(root / "model", root / "data")
    return root


@pytest.fixture
def fail(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """fail(mode, *overrides) runs the command line on good inputs but for the overrides, and returns its one line on stderr."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "GPUS_PER_NODE", "SLURM_JOB_ID", "SLURM_STEP_ID", *VARIABLES):
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
        ("sft", "optim.beta2=1", ["optim.beta2", "at most 0.99999", "got 1"]),
        ("grpo", "rollout.temperature=0", ["rollout.temperature=0", "above 0"]),
        ("grpo", "rollout.top_p=0", ["rollout.top_p", "at least 0.01 and at most 1", "got 0"]),
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
        ("sft", "optim.lr=inf", ["optim.lr", "at most", "inf"]),
        ("sft", "optim.eps=inf", ["optim.eps", "at most", "inf"]),
        ("sft", "optim.lr=" + "9" * 400, ["optim.lr", "at most", "999"]),
        ("sft", "optim.lr=" + "9" * 5000, ["optim.lr", "must be float", "999"]),
        ("sft", "optim.lr=0x" + "f" * 5000, ["optim.lr", "at most", "a number of thousands of digits"]),
        ("sft", "optim.lr=" + "[" * 5000, ["optim.lr", "must be float"]),
        ("grpo", "rollout.temperature=inf", ["rollout.temperature", "at most 100", "inf"]),
        ("grpo", "evaluate.temperature=inf", ["evaluate.temperature", "at most 100", "inf"]),
        ("grpo", "rollout.temperature=1e-3", ["rollout.temperature=0.001", "0.01 or more"]),
        ("grpo", "reward.timeout=0", ["reward.timeout", "at least 0.01"]),
        ("grpo", "reward.workers=100000", ["reward.workers", "at most 256"]),
        ("grpo", 'rollout.stop=["a", ""]', ["rollout.stop", "not empty"]),
        ("grpo", "rollout.stop=", ["rollout.stop", "not empty"]),
        ("sft", 'checkpoint.format=["hf", "hf"]', ["checkpoint.format", "different", "['hf', 'hf']"]),
        ("sft", "checkpoint.format=[]", ["checkpoint.format", "1 or more"]),
        ("sft", "checkpoint.format=pt", ["checkpoint.format", "hf, mcore, mcore-local, legacy, torch_dist", "'pt'"]),
        ("sft", f"seed={2**32}", ["seed", "at most 4294967295"]),
        ("sft", f"seed={10**400}", ["seed", "at most 4294967295"]),
        ("sft", f"steps={10**30}", ["steps", "at most 2147483647"]),
        ("sft", "parallel.dp=1000000", ["1000000 ranks on a node", "256"]),
        ("sft", "policy.load=a\0b", ["policy.load", "without NUL"]),
        ("sft", "data.train=\udcff", ["data.train", "UTF-8"]),
        ("sft", "data.train=" + "a" * 300, ["aaa", "File name too long"]),
        ("sft", "out=" + "a" * 300, ["aaa", "File name too long"]),
        ("sft", "data.train=/dev/zero", ["/dev/zero", "not a regular file"]),
        ("sft", "/dev/zero", ["/dev/zero", "not a regular file"]),
        ("grpo", "rollout.cache=0.0001", ["rollout.cache gives the engine 0.0001 GiB", "one sequence", "set rollout.cache=0"]),
        ("grpo", "rollout.cache=1000000", ["phase rollout needs 1000000.0 GiB", "rollout.cache"]),
    ],
)
def test_keys(fail, mode: str, override: str, wanted: list[str]) -> None:
    line = fail(mode, override)
    assert line.startswith("rlhf: ")
    assert all(part in line for part in wanted), line


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
    ("variables", "wanted"),
    [
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a number from 1 to 65535"),
        ({"MASTER_PORT": "9" * 5000}, "is not a number from 1 to 65535"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "MASTER_PORT=0 is not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a number from 1"),
        ({"GPUS_PER_NODE": "100000"}, "GPUS_PER_NODE=100000 is not a number from 0 to 256"),
        ({"SLURM_STEP_ID": "x"}, "SLURM_STEP_ID=x is not a number"),
        ({"SLURM_STEP_ID": "0"}, "SLURM_STEP_NUM_TASKS is not set, though other variables of Slurm are"),
        ({"SLURM_JOB_ID": "1"}, "SLURM_NNODES is not set, though other variables of Slurm are"),
        ({"GPUS_PER_NODE": "3"}, "rollout.tp=3 does not divide the attention heads 4"),
        ({"model_size": "a" * 300}, "File name too long"),
    ],
)
def test_variables_out_of_range(fail, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wanted in fail("grpo", *(["rollout.tp=3"] if "GPUS_PER_NODE" in variables else []))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ('out = "é"'.encode("latin-1"), "not UTF-8"),
        (b"a=" + b"[" * 100_000, "not TOML"),
        (b"seed=" + b"9" * 5000, "not TOML"),
        (b"[optim]\nlr=" + b"9" * 400, "optim.lr must be at least 0 and at most"),
        (b'out = "a\\u0000b"', "out must be text in UTF-8 without NUL"),
    ],
)
def test_toml(fail, tmp_path: Path, content: bytes, wanted: str) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    assert wanted in fail("sft", str(tmp_path / "bad.toml"))


def test_pipes(fail, made: Path, tmp_path: Path) -> None:
    """They would be read once, and by nobody else; and where nobody writes, never."""
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "lines.jsonl")
    for mistake in (
        str(tmp_path / "config.json"),
        f"data.train={tmp_path}/lines.jsonl",
        f"data.train={tmp_path}",
        f"policy.load={tmp_path}",
    ):
        assert "not a regular file" in fail("sft", mistake)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n', [":2", "JSON"]),
        ('{"prompt": "a", "response": "b", "more": ' + "[" * 150 + "]" * 150 + "}", [":1", "nested too deeply"]),
        ("[" * 100_000, [":1", "nested too deeply"]),
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
    for answer in ('{"x": 1}', "[1]", "true", '" "', "NaN", "1e400"):
        path.write_text(f'{{"prompt": "a", "answer": {answer}}}\n')
        assert "bad.jsonl:1: 'answer' is" in fail("grpo", f"data.train={path}")


@pytest.mark.parametrize("score", ["1" + "0" * 400, "NaN", "-Infinity", "true"])
def test_scores(tmp_path: Path, score: str) -> None:
    with pytest.raises(UserError, match=r"'score' 2 is .*; give a number"):
        forms.read(f'{{"query": "a", "response": ["b", "c"], "score": [1, {score}]}}'.encode(), "scored")


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
        ({"rms_norm_eps": math.nan}, ["rms_norm_eps nan is not a number above 0"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps -1e-05 is not a number above 0"]),
        ({"rms_norm_eps": True}, ["rms_norm_eps True is not a number above 0"]),
        ({"rope_theta": 0}, ["rope_theta 0 is not a number above 0"]),
        ({"rope_theta": 10**400}, ["rope_theta 1000", "is not a number above 0"]),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, ["factor 0 is not a number above 0"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, ["low_freq_factor 4 is not below"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers 1000000000", "up to 4096"]),
        ({"vocab_size": 10**30}, ["vocab_size 1000", "up to 2147483647"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads 0 is not"]),
        ({"head_dim": 31}, ["31 dimensions"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings 'false' is neither true nor false"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5 is not supported"]),
        ({"architectures": [[1]]}, ["not what a model's config.json says"]),
    ],
)
def test_config_json(fail, made: Path, tmp_path: Path, changes: dict, wanted: list[str]) -> None:
    (tmp_path / "tokenizer.model").write_bytes((made / "model/tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL | changes))
    line = fail("sft", f"policy.load={tmp_path}")
    assert str(tmp_path / "config.json") in line
    assert all(part in line for part in wanted), line


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"head_dim": 48}, "has a head_dim of 48, and vLLM on a CPU knows 32, 64"),
        ({"seq_length": 64}, "data.max_tokens=128 is longer than the context of"),
        ({"model_type": "gpt2"}, "has the model_type 'gpt2', and vLLM needs 'llama'"),
    ],
)
def test_what_vllm_would_refuse(fail, made: Path, tmp_path: Path, changes: dict, wanted: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((made / "model/tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(demo_task.MODEL | changes))
    assert wanted in fail("grpo", f"policy.load={tmp_path}")


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


def test_tensors_that_share_bytes(fail, made: Path, tmp_path: Path) -> None:
    """Of two tensors of one shape: no bytes may be read twice, none left out, none be behind the last."""
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((made / "model" / name).read_bytes())
    demo_task.make_weights(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    norm, other = (f"model.layers.{i}.input_layernorm.weight" for i in range(2))

    def said(changed: dict, data: bytes) -> str:
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return fail("sft", "policy.init=load", f"policy.load={tmp_path}")

    assert "the tensor before it ends at" in said(header | {norm: header[other]}, content[start:])
    assert "longer than it says" in said(header, content[start:] + b"0000")
    moved = {name: at | {"data_offsets": [x + 4 for x in at["data_offsets"]]} for name, at in header.items() if "dtype" in at}
    assert "the tensor before it ends at" in said(moved, b"0000" + content[start:])


def test_an_index_names_files_of_its_folder(fail, made: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((made / "model" / name).read_bytes())
    for title in ("../model/model.safetensors", "/etc/passwd", "a\0b", "a" * 300):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": title}}))
        assert "is no name of a file in this folder" in fail("sft", "policy.init=load", f"policy.load={tmp_path}")
