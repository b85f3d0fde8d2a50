"""A mistake in keys or variables is reported in one line, with exit code 2, before any rank starts.

The line is on stderr. It names the key and the value, and says what to do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rows import write
from saved import MESH
from vocabularies import write_byte_level

from rlhf import configuration
from rlhf.__main__ import main
from rlhf.errors import UserError


@pytest.mark.parametrize(
    ("mode", "override", "wanted"),
    [
        ("sft", "policy.load=/nowhere", ["/nowhere/config.json", "No such file"]),
        ("sft", "data.train=/nowhere.jsonl", ["/nowhere.jsonl"]),
        ("sft", "data.trian=x", ["unknown key 'data.trian'", "data.train"]),
        ("sft", "data.template_variables=thinking", ["data.template_variables has 'thinking'", "write name=value"]),
        ("sft", "data.template_variables=a=1", ["data.template_variables has no effect", "no chat template: remove"]),
        ("sft", "steps=many", ["steps must be int", "'many'"]),
        ("sft", "optim.lr=-1", ["optim.lr", "at least 0", "-1"]),
        ("sft", "batch.prompts=0", ["batch.prompts", "at least 1", "0"]),
        ("sft", "optim.lr=nan", ["optim.lr", "at least 0", "nan"]),
        ("sft", "optim.beta2=1", ["optim.beta2", "at most 0.99999", "got 1"]),
        ("grpo", "rollout.temperature=0", ["rollout.temperature=0", "0.01 or more"]),
        ("grpo", "rollout.top_p=0", ["rollout.top_p", "at least 0.01 and at most 1", "got 0"]),
        ("grpo", "rollout.top_p=1.5", ["rollout.top_p", "at most 1", "1.5"]),
        ("sft", "optim.schedule=fast", ["optim.schedule", "constant, linear, cosine", "'fast'"]),
        ("sft", "missing.toml", ["missing.toml", "No such file"]),
        ("sft", "parallel.tp=3", ["parallel.tp=3", "attention heads 4"]),
        ("sft", "parallel.pp=3", ["parallel.pp=3", "layers"]),
        ("sft", "data.max_tokens=100000", ["data.max_tokens=100000", "context"]),
        ("grpo", "rollout.max_tokens=128", ["rollout.max_tokens=128", "no room"]),
        ("grpo", "rollout.tp=2", ["rollout.tp=2", "1 ranks"]),
        (
            "grpo",
            "rollout.max_tokens=120",
            ["train_rl.jsonl:1", "8"],
        ),  # about 8 tokens are left for prompts, which have about 20
        ("grpo", "reward.function=nonsense", ["reward.function='nonsense'"]),
        ("grpo", "reward.function=json:no_such", ["reward.function='json:no_such'"]),
        ("grpo", "evaluate.function=nonsense", ["evaluate.function='nonsense'"]),
        ("grpo", "reward.function=['math', 'nonsense']", ["reward.function='nonsense'"]),
        ("grpo", "reward.function=['math', 'tools/x.py:math']", ["two functions with the name 'math'", "rename one"]),
        ("grpo", "batch.minibatches=65", ["batch.minibatches=65", "batch.prompts=64"]),
        ("sft", "optim.lr=inf", ["optim.lr", "at most", "inf"]),
        ("sft", "optim.eps=inf", ["optim.eps", "at most", "inf"]),
        ("sft", "optim.lr=" + "9" * 400, ["optim.lr", "at most", "999"]),
        ("sft", "optim.lr=" + "9" * 5000, ["optim.lr", "must be float", "999"]),
        ("sft", "optim.lr=0x" + "f" * 5000, ["optim.lr", "at most", "a number of thousands of digits"]),
        ("sft", "optim.lr=" + "[" * 5000, ["optim.lr", "must be float"]),
        ("grpo", "rollout.temperature=inf", ["rollout.temperature", "at most 100", "inf"]),
        ("grpo", "evaluate.temperature=inf", ["evaluate.temperature", "at most 100", "inf"]),
        ("grpo", "evaluate.samples=4", ["evaluate.samples=4", "equal responses", "set evaluate.temperature=1"]),
        ("grpo", "rollout.temperature=1e-3", ["rollout.temperature=0.001", "0.01 or more"]),
        ("grpo", "reward.timeout=0", ["reward.timeout", "at least 0.01"]),
        ("grpo", "watchdog.timeout=10", ["watchdog.timeout=10 is not above reward.timeout=10", "raise it"]),
        ("grpo", "reward.workers=100000", ["reward.workers", "at most 256"]),
        ("grpo", 'rollout.stop=["a", ""]', ["rollout.stop", "not empty"]),
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
        (
            "grpo",
            "rollout.cache=0.0001",
            ["rollout.cache gives the engine 0.0001 GiB", "one sequence", "set rollout.cache=0"],
        ),
        ("grpo", "rollout.cache=1000000", ["phase rollout needs 1000000.0 GiB", "rollout.cache"]),
    ],
)
def test_keys(fail, mode: str, override: str, wanted: list[str]) -> None:
    line = fail(mode, override)
    assert line.startswith("rlhf: ")
    assert all(part in line for part in wanted), line


def test_variables_without_effect(fail, made: Path, tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    config = json.loads((made / "model/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    given = [f"policy.load={tmp_path}", "data.template_variables=enable_thinkin=false"]
    assert "sets enable_thinkin, which the tokenizer's chat template does not read: remove it" in fail("sft", *given)
    given.append("data.template=chatml")
    assert "no effect with data.template=chatml: remove it, or set data.template=tokenizer" in fail("sft", *given)


def test_a_dry_run_shows_the_first_record(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If the data is there, it is read. The tokenizer may be missing, as on a laptop."""
    file = tmp_path / "a.jsonl"
    data = "first record, template plain (>>> and <<< enclose what is learned):\n  | <s> 1+1>>>2</s><<<\n"
    given = ["sft", f"policy.load={made}/model", "policy.init=random", "data.max_tokens=128", f"data.train={file}"]
    for row, wanted in ((None, ""), ({"prompt": "1+1", "response": "2"}, data)):
        if row:
            write(file, row)
        assert main([*given, "--dry-run"]) == 0
        assert wanted in (said := capsys.readouterr().out)
        assert said.count("first record") == bool(row)
    assert main([*given, "policy.load=configs/models/llama2-7B", "memory.device=1000", "--dry-run"]) == 0
    assert "The first record is not shown: tokenizer configs/models/llama2-7B: neither" in capsys.readouterr().out
    pattern = [*given[:-1], f"data.train={tmp_path}/*.jsonl", "--dry-run"]
    assert main(pattern) == 0
    assert data in capsys.readouterr().out
    (tmp_path / "a.jsonl").rename(tmp_path / "a.txt")
    assert main(pattern) == 0
    assert "first record" not in capsys.readouterr().out
    write(file, {"prompt": 1, "response": "2"})
    assert main([*given, "--dry-run"]) == 2
    assert f"{file}:1: 'prompt' is 1; give a string" in capsys.readouterr().err


@pytest.mark.parametrize("data", [[], ["data.train={made}/data/train_sft.jsonl"]])
@pytest.mark.parametrize(
    ("tokens", "keys", "error"),
    [
        ({}, ["data.template_variables=enable_thinkin=false"], "data.template_variables has no effect, because the"),
        ({"tokenizer.model": "?"}, [], "tokenizer.model: not a sentencepiece model"),
        ({"generation_config.json": '{"eos_token_id": -1}'}, [], "generation_config.json: eos_token_id [-1] is not"),
        ({"added_tokens.json": "[]"}, [], "added_tokens.json: not a JSON object"),
        (
            {"special_tokens_map.json": '{"eos_token": "<end>"}', "added_tokens.json": '{"<end>": 128}'},
            [],
            "has vocab_size=128",
        ),
    ],
)
def test_a_dry_run_refuses_a_tokenizer_that_a_run_refuses(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: list, tokens: dict, keys: list, error: str
) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    for name, text in tokens.items():
        (tmp_path / "model" / name).write_text(text)
    given = ["sft", f"policy.load={tmp_path}/model", "policy.init=random", "data.max_tokens=128", *keys]
    given += [key.format(made=made) for key in data]
    assert main([*given, "--dry-run"]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_messages_without_a_template(fail, tmp_path: Path, template: str) -> None:
    asked, said = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
    file = write(tmp_path / "a.jsonl", {"prompt": "1 + 1?", "response": "2"}, {"messages": [asked, said]})
    line = fail("sft", f"data.train={file}", f"data.template={template}")
    assert f"{file}:2: " in line
    assert "several roles" in line
    assert "set data.template to human, llama2 or chatml, or policy.tokenizer to a folder with a chat template" in line


@pytest.mark.parametrize(
    ("environment", "template", "wanted"),
    [
        ("Calculator", "plain", "is unknown: give module:Class or path/file.py:Class"),
        ("tools/calculator_task.py:Abacus", "plain", "has no attribute 'Abacus'"),
        ("tools/calculator_task.py:write", "plain", "not a class with the methods reset(record) and step(text)"),
        (
            "tools/calculator_task.py:Calculator",
            "human",
            "data.template=human does not mark the end of the assistant's turns",
        ),
    ],
)
def test_environments(fail, environment: str, template: str, wanted: str) -> None:
    assert wanted in fail("grpo", f"rollout.environment={environment}", f"data.template={template}")


@pytest.mark.parametrize("train", ["data", "data/*.jsonl"])
def test_held_out_data_is_not_trained_on(fail, made: Path, train: str) -> None:
    line = fail("sft", f"data.train={made}/{train}", f"data.eval={made}/data/heldout.jsonl")
    assert f"data.train={made}/{train} contains heldout.jsonl, which data.eval=" in line
    assert line.endswith("holds out: set data.train to the file to train on")


def test_weights_need_a_function(fail) -> None:
    keys = ["rollout.environment=tools/calculator_task.py:Calculator", "reward.weights.math=2"]
    assert "reward.weights is for the parts of reward functions, but there are none" in fail("grpo", *keys)


def test_rounds_need_groups(fail, made: Path) -> None:
    """A group of one always has equal rewards, so each step would sample all of its rounds and keep no group."""
    line = fail("rlhf", f"critic.load={made}/model", "rollout.rounds=3", "rollout.group=1")
    assert "rollout.rounds > 1" in line
    assert "rollout.group=1" in line


@pytest.mark.parametrize(
    ("number", "moment", "said"),
    [
        (signal.SIGINT, "imports", "before anything began"),
        (signal.SIGTERM, "imports", "before anything began"),
        (signal.SIGINT, "checks", "; nothing more was saved"),
        (signal.SIGUSR1, "checks", "; nothing more was saved"),
    ],
)
def test_a_signal_before_there_are_ranks(
    made: Path, tmp_path: Path, number: signal.Signals, moment: str, said: str
) -> None:
    """The command line prints one line if the signal comes during its imports or its checks of inputs."""
    slow = "import os, time\nos.write(1, b'ready\\n')\ntime.sleep(60)\n"
    (tmp_path / {"imports": "difflib.py", "checks": "reward.py"}[moment]).write_text(slow)
    keys = [
        f"policy.load={made}/model",
        "policy.init=random",
        f"data.train={made}/data/train_rl.jsonl",
        f"out={tmp_path}/run",
    ]
    keys += ["data.max_tokens=128", "rollout.max_tokens=32", f"reward.function={tmp_path}/reward.py:f"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "rlhf", "grpo", *keys]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # shells ignore it in background
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.count("\n")) == (128 + number, 1), errors
    assert errors.startswith(f"rlhf: ended by {number.name}")
    assert said in errors


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_export_would_replace_what_is_no_link(fail, tmp_path: Path, kind: str) -> None:
    """This is the case if out is the folder of a model."""
    {"folder": Path.mkdir, "file": Path.touch}[kind](tmp_path / "hf")
    assert f"{tmp_path}/hf is not a link" in fail("sft", f"out={tmp_path}")


@pytest.mark.parametrize("latest", [True, False])
def test_fresh_run_over_old_checkpoints(fail, tmp_path: Path, latest: bool) -> None:
    (tmp_path / "step_000007").mkdir()
    if latest:
        (tmp_path / "latest").write_text("step_000007")
    assert f"out={tmp_path}" in fail("sft", f"out={tmp_path}", "resume=false")


def test_a_run_without_a_whole_checkpoint(fail, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_000007")
    assert f"{tmp_path} has no complete checkpoint: delete" in fail("sft", f"out={tmp_path}")


@pytest.mark.parametrize(
    ("key", "saved", "here"),
    [
        ("mode", "sft", "reward"),
        ("seed", 2, 1),
        ("dtype", "torch.bfloat16", "torch.float32"),
    ],
)
def test_resuming_another_run(made: Path, tmp_path: Path, key: str, saved: object, here: object) -> None:
    """The advice must work: resume=false is also refused if there are old checkpoints."""
    from rlhf.checkpoint import Checkpoints
    from rlhf.parallel.layout import Layout

    config = configuration.load("reward", [f"out={tmp_path}", f"policy.load={made}/model"])
    checkpoints = Checkpoints(config, SimpleNamespace(**{**vars(MESH), "layout": Layout(2, 1, 1, 1)}), torch.float32)
    (tmp_path / "latest").write_text("step_000007")
    (tmp_path / "step_000007").mkdir()
    (tmp_path / "step_000007/meta.json").write_text(
        json.dumps({**checkpoints.meta, **checkpoints.layout, "step": 7, "state": {}, key: saved})
    )
    with pytest.raises(
        UserError,
        match=rf"step_000007 was saved with {key}={saved}, this run has {here}: "
        "start with the same settings and files, or set",
    ):
        checkpoints.resume([], {})


@pytest.mark.parametrize(
    "variables",
    [
        {"GPUS_PER_NODE": "3"},
        {
            "LOCAL_RANK": "0",
            "RANK": "0",
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
        },  # set by torchrun
    ],
)
def test_world_that_does_not_divide(fail, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "parallel.tp=2 x pp=1 x cp=1 does not fit 3 ranks" in fail("sft", "parallel.tp=2")


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
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
            "MASTER_PORT=0 is not a number",
        ),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a number from 1"),
        ({"GPUS_PER_NODE": "100000"}, "GPUS_PER_NODE=100000 is not a number from 0 to 256"),
        ({"SLURM_STEP_ID": "x"}, "SLURM_STEP_ID=x is not a number"),
        ({"SLURM_STEP_ID": "0"}, "SLURM_STEP_NUM_TASKS is not set, but other Slurm variables are"),
        ({"SLURM_JOB_ID": "1"}, "SLURM_NNODES is not set, but other Slurm variables are"),
        ({"GPUS_PER_NODE": "3"}, "rollout.tp=3 does not divide the attention heads 4"),
        ({"model_size": "a" * 300}, "File name too long"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set, but RANK is not"),
        ({"GLOO_SOCKET_IFNAME": "nonsense"}, "GLOO_SOCKET_IFNAME=nonsense is not a network interface of this node"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "GPUS_PER_NODE": "4"}, "4 ranks on a node with 2 GPUs"),
    ],
)
def test_variables_out_of_range(fail, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wanted in fail("grpo", *(["rollout.tp=3"] if variables == {"GPUS_PER_NODE": "3"} else []))
