"""launch.sh and the command line: help, and messages for mistakes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import HERE, ROOT, launch, run_ranks, seconds

from rlhf import dryrun
from rlhf.__main__ import main
from rlhf.algorithms import ALGORITHMS
from rlhf.configuration import load, manual


@pytest.mark.parametrize("arguments", [("--help",), ()])
def test_help_lists_the_modes(arguments):
    result = launch(*arguments)
    assert result.returncode == 0, result.stderr
    for mode, algorithm in ALGORITHMS.items():
        assert re.search(rf"^\s*{mode}\s+{re.escape(algorithm.summary)}$", result.stdout, re.MULTILINE), (
            f"{mode} is missing:\n{result.stdout}"
        )
    for command in (
        "convert",
        "report",
        "prepare_data",
        "demo",
        "tutorial",
        "test",
    ):  # the commands of launch.sh besides the modes
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE), f"{command} is missing:\n{result.stdout}"


def test_help_of_a_mode_prints_every_key():
    result = launch("grpo", "--help")
    assert result.returncode == 0, result.stderr
    assert manual({}) in result.stdout
    own = launch("mtbench", "--help").stdout
    assert "  data.max_tokens=4096 " in own, "the default of the mode"
    assert load("mtbench", []).data.max_tokens == 4096
    assert load("mtbench", ["data.max_tokens=2048"]).data.max_tokens == 2048


@pytest.mark.parametrize(("name", "mode"), [("ppo", "rlhf"), ("online_dpo", "online-dpo")])
def test_modes_by_another_name(name, mode):
    assert launch(name, "--help").stdout.startswith(f"{mode}: {ALGORITHMS[mode].summary}\n")


@pytest.mark.parametrize("arguments", [("--help",), ("grpo", "--help")])
def test_help_is_quick(arguments):
    """It imports neither torch nor an engine."""
    assert seconds(*arguments) < 0.5
    trace = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rlhf", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    loaded = {line.rpartition("|")[2].strip() for line in trace.stderr.splitlines()}
    assert "rlhf.config" in loaded
    assert not loaded & {"torch", "megatron", "vllm", "transformers"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gprm",), "gprm"),
        (("grpo", "optim.lrr=1"), "optim.lrr"),
        (("grpo", "steps=many"), "steps"),
        (("grpo", "nowhere.toml"), "nowhere.toml"),
        (("grpo", "--fast"), "--fast"),
        (("convert", "--tp", "two"), "argument --tp: invalid int value: 'two'"),
        (("tutorial", "--seeds", "0"), "--seeds 0"),
        (("tutorial", "--out", str(ROOT / "docs")), "docs exists: give a new folder, or delete it"),
        (("prepare_data", "gsm8k"), "the following arguments are required: --from, --to"),
    ],
)
def test_a_mistake_is_one_line(arguments, said):
    result = launch(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr


def test_an_interpreter_that_is_not_there():
    result = launch("--help", env={**HERE, "RLHF_PYTHON": "/no/such/python"})
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "launch.sh: RLHF_PYTHON=/no/such/python is not an executable: give the path of a Python, or unset it"
    ]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Make a checkout without installed packages, and a Python that has only the standard library."""
    root = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "python"], check=True)
    shutil.copy(ROOT / "launch.sh", root)
    for folder in ("requirements", "rlhf", "tools"):
        (root / folder).symlink_to(ROOT / folder)
    env = {"PATH": f"{root}/python/bin:/usr/bin:/bin", "HOME": str(root), "CUDA_VISIBLE_DEVICES": ""}
    for package in ("numpy", "torch"):
        absent = subprocess.run(
            ["python3", "-c", f"import {package}"], env=env, cwd=root, capture_output=True, text=True
        )
        assert f"No module named '{package}'" in absent.stderr
    return root, env


HELP = [
    (),
    *(
        ("--help",),
        ("-h",),
        ("grpo", "--help"),
        ("sft", "nowhere.toml", "-h"),
        ("convert", "--help"),
        ("report", "--help"),
        ("prepare_data", "--help"),
    ),
]
HELP += [
    ("convert_hf_to_megatron", "--help"),
    ("demo", "--help"),
    ("tutorial", "--help"),
    ("test", "--help"),
    ("install", "--help"),
    ("install", "gpu", "--help"),
]


@pytest.mark.parametrize("arguments", HELP)
def test_help_needs_nothing_but_python(bare, arguments):
    """It needs no package and no installation."""
    root, env = bare
    result = launch(*arguments, root=root, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout
    assert seconds(*arguments, root=root, env=env) < 0.5
    assert not [path.name for path in root.iterdir() if path.name.startswith(".venv")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gprm",), "rlhf: unknown mode 'gprm': choose one of"),
        (("gprm", "steps=1", "--dry-run"), "rlhf: unknown mode 'gprm': choose one of"),
        (("grpo", "optim.lrr=1", "--dry-run"), "optim.lrr"),
        (("install",), "launch.sh: install takes cpu or gpu, not '': ./launch.sh install cpu"),
        (("install", "tpu"), "launch.sh: install takes cpu or gpu, not 'tpu': ./launch.sh install cpu"),
        (("install", "cpu", "gpu"), "launch.sh: install takes cpu or gpu, not 'cpu gpu': ./launch.sh install cpu"),
    ],
)
def test_a_mistake_is_told_before_an_installation(bare, arguments, said):
    root, env = bare
    result = launch(*arguments, root=root, env=env)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr
    assert not [path.name for path in root.iterdir() if path.name.startswith(".venv")]


def test_the_package_itself_helps_without_others(bare):
    """python -m rlhf works if no other package can be imported, not even with PYTHONPATH."""
    _, env = bare
    for arguments, code in ((("--help",), 0), (("grpo", "--help"), 0), (("gprm",), 2)):
        done = subprocess.run(["python3", "-m", "rlhf", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, code // 2), done.stderr


def test_a_dry_run_names_the_package_that_it_lacks(monkeypatch, capsys):
    def show(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(dryrun, "show", show)
    assert main(["grpo", "policy.load=model", "data.train=rows.jsonl", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"rlhf: the package numpy is not installed in {sys.prefix}: run ./launch.sh install cpu (or gpu)"
    )
    assert said.count("\n") == 1


def test_an_interpreter_without_packages(bare):
    root, env = bare
    keys = ("sft", "policy.load=model", "data.train=rows.jsonl")
    result = launch(*keys, root=root, env={**env, "RLHF_PYTHON": f"{root}/python/bin/python"})
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert re.match(f"rlhf: the package [a-z0-9]+ is not installed in {root}/python: run ./launch.sh install", line)


@pytest.mark.parametrize("reader", ["head -n 1", "true"])
@pytest.mark.parametrize("arguments", ["--help", "grpo --help", "convert --help"])
def test_help_ends_quietly_when_its_reader_does(arguments, reader):
    piped = subprocess.run(
        f"./launch.sh {arguments} | {reader}", shell=True, cwd=ROOT, env=HERE, capture_output=True, text=True
    )
    assert (piped.returncode, piped.stderr) == (0, "")


@pytest.mark.parametrize(
    ("after", "timeout", "said"),
    [("rank and sys.exit('lost')", 60, r"exit codes \[None, 1\]:\nlost"), ("print(rank)", 0.3, "after 0.3 s")],
)
def test_ranks_of_a_test_end_when_one_fails_and_at_the_time_limit(tmp_path, after, timeout, said):
    """A test that starts several ranks reports which one failed, and leaves no process behind."""
    program = (
        "import os, pathlib, sys, time; rank = int(os.environ['RANK']); "
        f"pathlib.Path('{tmp_path}', str(os.getpid())).touch(); {after}; time.sleep(600)"
    )
    with pytest.raises(AssertionError, match=said):
        run_ranks(2, "-c", program, timeout=timeout)
    assert not [path for path in tmp_path.iterdir() if Path("/proc", path.name).exists()]
