"""launch.sh, and the command line behind it, as a person meets them."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.algorithms import ALGORITHMS
from rlhf.config import Config
from rlhf.configuration import manual

ROOT = Path(__file__).parents[1]
# The interpreter of these tests runs the command line; nothing is installed.
HERE = {**os.environ, "RLHF_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}


def launch(*arguments: str, root: Path = ROOT, env: dict[str, str] = HERE) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(root / "launch.sh"), *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("arguments", [("--help",), ()])
def test_help_lists_the_modes(arguments):
    result = launch(*arguments)
    assert result.returncode == 0, result.stderr
    for mode, algorithm in ALGORITHMS.items():
        assert re.search(rf"^\s*{mode}\s+{re.escape(algorithm.summary)}$", result.stdout, re.MULTILINE), (
            f"{mode} is missing:\n{result.stdout}"
        )
    for command in ("convert", "prepare_data", "demo", "tutorial", "test"):  # what launch.sh and the command line know beside modes
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE), f"{command} is missing:\n{result.stdout}"


def test_help_of_a_mode_prints_every_key():
    result = launch("grpo", "--help")
    assert result.returncode == 0, result.stderr
    assert manual(Config) in result.stdout


@pytest.mark.parametrize(("name", "mode"), [("ppo", "rlhf"), ("online_dpo", "online-dpo")])
def test_modes_by_another_name(name, mode):
    assert launch(name, "--help").stdout.startswith(f"{mode}: {ALGORITHMS[mode].summary}\n")


@pytest.mark.parametrize("arguments", [("--help",), ("grpo", "--help")])
def test_help_is_quick(arguments):
    """Under a second at the best of three, because it loads neither torch nor an engine."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        launch(*arguments)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
    trace = subprocess.run([sys.executable, "-X", "importtime", "-m", "rlhf", *arguments], cwd=ROOT, capture_output=True, text=True)
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
def fresh(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """launch.sh beside an empty lock and a package that prints its arguments, on a machine where nothing is installed yet."""
    root = tmp_path_factory.mktemp("fresh")
    shutil.copy(ROOT / "launch.sh", root)
    for folder in ("requirements", "rlhf"):
        (root / folder).mkdir()
    (root / "requirements" / "cpu.txt").write_text("# nothing\n")
    (root / "rlhf" / "__main__.py").write_text("import sys\nprint(sys.prefix, *sys.argv[1:])\n")
    env = {key: value for key, value in HERE.items() if key not in ("RLHF_PYTHON", "PYTHONPATH", "VIRTUAL_ENV")}
    return root, env


def test_installation(fresh):
    """Help needs none; of two first calls one installs; later calls start at once; a changed lock installs anew, a broken one says so."""
    root, env = fresh
    lock, venv = root / "requirements" / "cpu.txt", root / ".venv"

    assert launch(root=root, env=env).stdout.endswith(" --help\n")
    assert not venv.exists()

    first = [subprocess.Popen([root / "launch.sh", "sft"], cwd=root, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in first]
    assert [process.returncode for process in first] == [0, 0]
    assert sorted(line.count("installing requirements/cpu.txt into .venv") for line in said) == [0, 1]

    again, seconds = launch("sft", "a b.toml", "steps=1", root=root, env=env), []
    assert again.stdout == f"{venv} sft a b.toml steps=1\n"
    assert again.stderr == ""
    for _ in range(3):
        start = time.perf_counter()
        launch("sft", root=root, env=env)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3

    lock.write_text("absent @ file:///no/such/absent-1-py3-none-any.whl\n")
    broken = launch("sft", root=root, env=env)
    assert broken.returncode == 2
    assert "launch.sh: pip: ERROR: " in broken.stderr.splitlines()[-1]

    lock.write_text("# nothing, and nothing is broken\n")
    assert "installing" in launch("sft", root=root, env=env).stderr
    assert launch("sft", root=root, env=env).stderr == ""


def test_sbatch_runs_a_copy(fresh, tmp_path):
    """Slurm puts the batch script somewhere else; the checkout is where the job's command says, and that may have a space in it."""
    root, env = fresh
    checkout = tmp_path / "my checkout"
    shutil.copytree(root / "rlhf", checkout / "rlhf")
    shutil.copy(ROOT / "launch.sh", tmp_path / "slurm_script")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\n[ "$*" = "show job 7" ] && echo "   Command={checkout}/launch.sh sft steps=1"\n')
    (tmp_path / "scontrol").chmod(0o755)
    env = {**env, "RLHF_PYTHON": sys.executable, "SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{env['PATH']}"}
    done = subprocess.run([tmp_path / "slurm_script", "sft", "steps=1"], cwd="/", env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"{sys.prefix} sft steps=1\n", "")


def test_locks_name_one_version_of_everything():
    for lock in ("cpu.txt", "gpu.txt"):
        lines = [line for line in (ROOT / "requirements" / lock).read_text().splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[a-z0-9-]+==\S+(; \S+ (>|==|<=) \"\S+\")?", line) for line in lines)
        unconditional = [line.split("==")[0] for line in lines if ";" not in line]
        assert len(unconditional) == len(set(unconditional))
