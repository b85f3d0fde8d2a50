"""The tutorial's variables: the keys that they set in each mode, and their priority."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf import configuration, variables
from rlhf.algorithms import ALGORITHMS, SECTIONS
from rlhf.config import Config, Parallel
from rlhf.errors import UserError

ROOT = Path(__file__).parents[1]
ONE = {
    "LOAD_PATH": "/m/base",
    "POLICY_LOAD": "/m/sft",
    "REWARD_LOAD": "/m/rm",
    "TOKENIZER_MODEL": "/m/tokenizer.model",
    "DATASET_PATH": "/d/train",
    "EVAL_DATASET_PATH": "/d/eval.jsonl",
    "CHECKPOINT_PATH": "/out/stage",
    "output_dir": "/out",
    "exp_name": "first",
    "JUDGE_URL": "http://judge/v1",
    "JUDGE_MODEL": "007",
    "TP": "4",
    "PP": "2",
}


def load(mode: str, env: dict[str, str], *given: str) -> Config:
    return configuration.load(mode, variables.arguments(mode, list(given), env))


def test_every_variable_is_for_modes_that_exist():
    for modes, _, _ in variables.VARIABLES.values():
        assert all(mode in ALGORITHMS or mode.startswith("convert") for mode in modes.split(", "))


@pytest.mark.parametrize("mode", ALGORITHMS)
def test_keys(mode: str):
    config = load(mode, ONE)
    assert config.policy.load == ("/m/base" if mode in ("sft", "reward") else "/m/sft")
    assert config.reward.load == ("/m/rm" if mode in ("rlhf", "online-dpo", "grpo") else "")
    assert config.reward.function == (("math",) if mode == "grpo" else ())
    assert config.policy.tokenizer == "/m/tokenizer.model"
    online = mode in ("rlhf", "online-dpo", "grpo", "evaluate", "mtbench")
    assert (config.judge.url, config.judge.model) == (("http://judge/v1", "007") if online else ("", ""))
    assert config.data.eval == "/d/eval.jsonl"
    if mode in ("evaluate", "mtbench"):  # they make no run, and must not write into one
        assert (config.data.train, config.out, config.parallel.tp) == ("", f"runs/{mode}", 1)
    else:
        assert (config.data.train, config.parallel.tp, config.parallel.pp) == ("/d/train", 4, 2)
        assert config.out == ("/out/stage" if mode in ("sft", "reward") else "/out/first")


def test_file_then_variable_then_key(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text('out = "file"\nsteps = 7\n[parallel]\ntp = 1\n[reward]\nfunction = "my:own"\n')
    assert load("grpo", ONE, str(file)).reward.function == ("my:own",)
    config = load("grpo", ONE, "parallel.tp=8", str(file))
    assert (config.steps, config.parallel.tp, config.out) == (7, 8, "/out/first")
    config = load("grpo", {**ONE, "exp_name": ""}, str(file), "out=mine")
    assert config.out == "mine"
    assert load("grpo", {}, str(file)).out == "file"


def test_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(variables, "CONFIGS", tmp_path)
    (tmp_path / "llama2-7B.toml").write_text("steps = 5\nseed = 3\n[parallel]\ntp = 2\n")
    mine = tmp_path / "mine.toml"
    mine.write_text("seed = 4\n")
    config = load("rlhf", {"model_size": "llama2-7B", "output_dir": "/out"}, str(mine))
    assert (config.steps, config.seed, config.parallel.tp, config.out) == (5, 4, 2, "/out/llama2-7B-rlhf")
    with pytest.raises(UserError, match=r"model_size=llama9: .*llama9\.toml does not exist"):
        load("rlhf", {"model_size": "llama9"})


def test_folders(tmp_path: Path):
    """The folders are those of the tutorial:

    train.jsonl and dev.jsonl in a data folder, iterations in a checkpoint folder.
    """
    (tmp_path / "train.jsonl").write_text("")
    assert variables.settings("sft", {"DATASET_PATH": str(tmp_path)}) == {"data.train": f"{tmp_path}/train.jsonl"}
    (tmp_path / "dev.jsonl").write_text("")
    both = {"data.train": f"{tmp_path}/train.jsonl", "data.eval": f"{tmp_path}/dev.jsonl"}
    assert variables.settings("sft", {"DATASET_PATH": str(tmp_path)}) == both
    assert variables.settings("sft", {"DATASET_PATH": f"{tmp_path}/train.jsonl"}) == {
        "data.train": f"{tmp_path}/train.jsonl"
    }
    assert (
        variables.settings("sft", {"DATASET_PATH": "/x", "EVAL_DATASET_PATH": str(tmp_path)})["data.eval"]
        == f"{tmp_path}/dev.jsonl"
    )
    for name in ("iter_0001000", "step_000020/hf"):
        (tmp_path / "rm" / name).mkdir(parents=True)
    reward = {"REWARD_LOAD": f"{tmp_path}/rm"}
    for iteration, folder in (("1000", "rm/iter_0001000"), ("20", "rm/step_000020"), ("", "rm")):
        assert variables.settings("rlhf", {**reward, "REWARD_LOAD_ITERATION": iteration}) == {
            "reward.load": f"{tmp_path}/{folder}"
        }
    with pytest.raises(UserError, match="contains neither iter_0000007 nor step_000007"):
        variables.settings("rlhf", {**reward, "REWARD_LOAD_ITERATION": "7"})
    for wrong in ("last", "9" * 5000):
        with pytest.raises(UserError, match=f"REWARD_LOAD_ITERATION={wrong[:80]} is not a number"):
            variables.settings("rlhf", {**reward, "REWARD_LOAD_ITERATION": wrong})


def test_values_are_texts_whatever_they_look_like():
    for text in ("a = b", "1e5", "2024-05-17", "true", "007"):
        assert load("sft", {"LOAD_PATH": "7", "CHECKPOINT_PATH": text}).out == text


def test_the_readme_has_the_table():
    lines = (ROOT / "README.md").read_text().splitlines()
    table = [f"| `{name}` | `{key}` | {modes} | {meaning} |" for name, key, modes, meaning in variables.rows()]
    first = lines.index(table[0])
    assert lines[first : first + len(table) + 1] == [*table, ""]


def test_a_layout_by_variables_leaves_data_parallel_open(tmp_path: Path):
    file = tmp_path / "size.toml"
    file.write_text("[parallel]\ntp = 4\ndp = 2\n")
    assert load("sft", {"TP": "8"}, str(file)).parallel == Parallel(tp=8, dp=0)
    assert load("sft", {"PP": "2"}, str(file), "parallel.dp=1").parallel == Parallel(tp=4, pp=2, dp=1)


@pytest.mark.parametrize("size", ["llama2-7B", "llama2-13B", "llama2-70B"])
def test_sizes_that_are_shipped(size: str):
    assert load("rlhf", {"model_size": size}).parallel.tp >= 4


def test_demo_and_tutorial_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """These commands use their own models and data, also if the tutorial's variables are exported."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import demo
    import tutorial

    given: list[dict[str, str]] = []

    def started(*_: object, env: dict[str, str], **__: object) -> SimpleNamespace:
        given.append(env)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(demo, "RUNS", tmp_path)
    monkeypatch.setattr(demo.demo_task, "make_model", lambda *_: None)
    monkeypatch.setattr("subprocess.run", started)
    monkeypatch.setattr("subprocess.Popen", started)
    for name, value in ONE.items():
        monkeypatch.setenv(name, value)
    assert demo.main([]) == 1
    tutorial.start(tutorial.Stage("convert", [], environment={"TP": "1"}), tmp_path, (0, ""))
    assert [{name: env[name] for name in ONE if name in env} for env in given] == [{}, {"TP": "1"}]
    assert all(env["PATH"] for env in given)


def test_modes_that_are_shipped():
    """The shipped files have the values of the tutorial's scripts where these differ from the defaults."""
    grpo, online = (configuration.load(mode, [f"{ROOT}/configs/{mode}.toml"]) for mode in ("grpo", "online-dpo"))
    assert (grpo.sections["grpo"].kl, grpo.sections["grpo"].mean) == (
        0.1,
        "token",
    )  # its KL has the weight of dpo, its mean is over the tokens of a micro-batch
    assert (SECTIONS["grpo"]().kl, SECTIONS["grpo"]().mean) == (0.04, "sequence")
    assert (online.sections["dpo"].pairs, online.sections["dpo"].beta) == ("all", 0.1)
