"""launch.sh, and the command line behind it, as a person meets them."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import dryrun
from rlhf.__main__ import main
from rlhf.algorithms import ALGORITHMS
from rlhf.config import Config
from rlhf.configuration import manual

ROOT = Path(__file__).parents[1]
# The interpreter of these tests runs the command line; nothing is installed.
HERE = {**os.environ, "RLHF_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}


def launch(*arguments: str, root: Path = ROOT, env: dict[str, str] = HERE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(root / "launch.sh"), *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=300
    )


def seconds(*arguments: str, root: Path = ROOT, env: dict[str, str] = HERE) -> float:
    """Of a processor, at the best of three calls: the other work of the machine does not count."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        launch(*arguments, root=root, env=env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


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
        "prepare_data",
        "demo",
        "tutorial",
        "test",
    ):  # what launch.sh and the command line know beside modes
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
    """Because it loads neither torch nor an engine."""
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
    """A checkout of this package with nothing installed, on a machine whose Python has nothing but the standard library."""
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
    """No package and no installation."""
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
    """python -m rlhf, where nothing is found beside the package, not even by PYTHONPATH."""
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


def test_nothing_in_the_current_folder_is_run(fresh, tmp_path):
    """Not by launch.sh, nor by the ranks that it leads to; an installation does not run it either."""
    for name in ("rlhf", "json", "tomllib", "torch", "venv", "ensurepip", "pip"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.write(2, b'{name} was run\\n')\nos._exit(1)\n")
    for arguments, code in ((("--help",), 0), (("grpo", "--help"), 0), (("sft", "nowhere.toml"), 2)):
        done = subprocess.run(
            [ROOT / "launch.sh", *arguments], cwd=tmp_path, env=HERE, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, len(done.stderr.splitlines())) == (code, code // 2), done.stderr
    root = tmp_path / "checkout"
    shutil.copytree(fresh[0], root, ignore=shutil.ignore_patterns(".venv*", "two"))
    done = subprocess.run(
        [root / "launch.sh", "sft"], cwd=tmp_path, env=fresh[1], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, f"{root}/.venv-cpu sft\n"), done.stderr
    for flags in ([], ["-P"]):
        program = "from rlhf.__main__ import COMMAND; print(*COMMAND[1:])"
        done = subprocess.run(
            [sys.executable, *flags, "-c", program],
            cwd=ROOT,
            env={**HERE, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == [*flags, "-m", "rlhf"], done.stderr


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """launch.sh beside an empty lock and a package that prints its arguments, on a machine where nothing is installed yet."""
    root = tmp_path_factory.mktemp("fresh")
    shutil.copy(ROOT / "launch.sh", root)
    for folder in ("requirements", "rlhf"):
        (root / folder).mkdir()
    for kind in ("cpu", "gpu"):
        (root / "requirements" / f"{kind}.txt").write_text(f"# nothing for a {kind}\n")
    (root / "rlhf" / "__main__.py").write_text("import sys\nprint(sys.prefix, *sys.argv[1:])\n")
    env = {key: value for key, value in HERE.items() if key not in ("RLHF_PYTHON", "PYTHONPATH", "VIRTUAL_ENV")}
    return root, env


def test_installation(fresh):
    """Of two first calls one installs; later calls start at once; a changed lock installs anew, a broken one says so. Help and dry runs
    install nothing, before and after that."""
    root, env = fresh
    lock, venv = root / "requirements" / "cpu.txt", root / ".venv-cpu"

    for arguments in ("--help",), ("sft", "--help"), ("sft", "steps=1", "--dry-run"):
        result = launch(*arguments, root=root, env=env)
        assert result.stdout.endswith(f" {' '.join(arguments)}\n")
        assert result.stderr == ""
    assert not venv.exists()

    first = [
        subprocess.Popen([root / "launch.sh", "sft"], cwd=root, env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in first]
    assert [process.returncode for process in first] == [0, 0]
    assert sorted(line.count("installing requirements/cpu.txt into .venv-cpu ") for line in said) == [0, 1]

    again = launch("sft", "a b.toml", "steps=1", root=root, env=env)
    assert again.stdout == f"{venv} sft a b.toml steps=1\n"
    assert again.stderr == ""
    assert seconds("sft", root=root, env=env) < 0.3

    lock.write_text("# another lock\n")
    for argument in ("--help", "--dry-run"):
        assert launch("sft", argument, root=root, env=env).stdout == f"{venv} sft {argument}\n"
    assert (venv / "lock.txt").read_text() != lock.read_text()

    lock.write_text("absent @ file:///no/such/absent-1-py3-none-any.whl\n")
    broken = launch("sft", root=root, env=env)
    assert broken.returncode == 2
    assert "launch.sh: pip: ERROR: " in broken.stderr.splitlines()[-1]

    lock.write_text("# nothing, and nothing is broken\n")
    assert "installing" in launch("sft", root=root, env=env).stderr
    assert launch("sft", root=root, env=env).stderr == ""


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether anything was written there."""
    paths = [path for path in (folder, *folder.rglob("*")) if "__pycache__" not in path.parts]
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in paths}


def test_an_environment_of_another_lock_is_left_alone(fresh, tmp_path):
    """install gpu, a mode on a node without a GPU, and one on a node with: each has its folder, and an old .venv is read at most."""
    root, env = fresh[0] / "two", fresh[1]
    shutil.copytree(fresh[0], root, ignore=shutil.ignore_patterns(".venv*", "two"))
    script = (root / "launch.sh").read_text()
    assert script.count("'/dev/nvidia[0-9]*'") == 1
    (root / "launch.sh").write_text(script.replace("'/dev/nvidia[0-9]*'", f"'{tmp_path}/nvidia[0-9]*'"))
    (tmp_path / "nvidia0").touch()
    on_gpus = {key: value for key, value in env.items() if key != "CUDA_VISIBLE_DEVICES"}

    said = launch("install", "gpu", root=root, env=env)  # the login node
    assert said.stdout == f"launch.sh: requirements/gpu.txt is installed in {root}/.venv-gpu\n"
    gpu = contents(root / ".venv-gpu")
    assert launch("install", "gpu", root=root, env=env).stdout == said.stdout
    assert launch("sft", "--dry-run", root=root, env=env).stdout == f"{root}/.venv-gpu sft --dry-run\n"
    refused = launch("install", "gpu", root=root, env={**env, "RLHF_PYTHON": sys.executable})
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)

    assert launch("sft", root=root, env=env).stdout == f"{root}/.venv-cpu sft\n"
    assert launch("sft", root=root, env=on_gpus).stdout == f"{root}/.venv-gpu sft\n"

    (root / ".venv-cpu").rename(root / ".venv")  # as an earlier release left it
    old = contents(root / ".venv")
    assert launch("sft", root=root, env=env).stdout == f"{root}/.venv sft\n"
    (root / "requirements" / "cpu.txt").write_text("# a newer lock\n")
    assert "installing requirements/cpu.txt into .venv-cpu " in launch("sft", root=root, env=env).stderr
    assert launch("sft", root=root, env=on_gpus).stdout == f"{root}/.venv-gpu sft\n"
    assert (contents(root / ".venv"), contents(root / ".venv-gpu")) == (old, gpu)


def test_ci_takes_the_python_of_the_system(tmp_path):
    """Whatever stands first in PATH."""
    code = "import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
    if (
        not Path("/usr/bin/python3").exists()
        or subprocess.run(["/usr/bin/python3", "-c", code], capture_output=True).returncode
    ):
        pytest.skip("/usr/bin/python3 is none that is supported, with venv")
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    for name, line in (("launch.sh", "command -v python3"), ("python3", "exit 1"), ("slurmctld", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {**HERE, "PATH": f"{tmp_path}:{HERE['PATH']}"}
    done = subprocess.run([tmp_path / ".ci" / "run"], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "/usr/bin/python3\n")


def test_sbatch_runs_a_copy(fresh, tmp_path):
    """Slurm puts the batch script somewhere else; the checkout is where the job's command says, and that may have a space in it."""
    root, env = fresh
    checkout = tmp_path / "my checkout"
    shutil.copytree(root / "rlhf", checkout / "rlhf")
    shutil.copy(ROOT / "launch.sh", tmp_path / "slurm_script")
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\n[ "$*" = "show job 7" ] && echo "   Command={checkout}/launch.sh sft steps=1"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    env = {**env, "RLHF_PYTHON": sys.executable, "SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{env['PATH']}"}
    done = subprocess.run(
        [tmp_path / "slurm_script", "sft", "steps=1"], cwd="/", env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == (f"{sys.prefix} sft steps=1\n", "")


def test_locks_name_one_version_of_everything():
    for lock in ("cpu.txt", "gpu.txt"):
        lines = [
            line
            for line in (ROOT / "requirements" / lock).read_text().splitlines()
            if line and not line.startswith("#")
        ]
        assert all(re.fullmatch(r"[a-z0-9-]+==\S+(; \S+ (>|==|<=) \"\S+\")?", line) for line in lines)
        unconditional = [line.split("==")[0] for line in lines if ";" not in line]
        assert len(unconditional) == len(set(unconditional))
