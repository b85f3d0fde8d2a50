"""launch.sh: the installation of packages, the choice of the interpreter, and Slurm's copy of the script."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import HERE, ROOT, launch, seconds


def test_nothing_in_the_current_folder_is_run(fresh, tmp_path):
    """Neither launch.sh nor the ranks nor an installation import modules from the current folder."""
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
    """Make a checkout of launch.sh with an empty lock file and a package that prints its arguments.

    Nothing is installed.
    """
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
    """Of two first calls, one installs. Later calls start at once.

    A changed lock file is installed again, and a wrong one is reported. Help and dry runs install nothing.
    """
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
    """Return inode and time of all files, which change if anything is written."""
    paths = [path for path in (folder, *folder.rglob("*")) if "__pycache__" not in path.parts]
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in paths}


def test_an_environment_of_another_lock_is_left_alone(fresh, tmp_path):
    """Each kind has its own folder: install gpu, a mode on a node without a GPU, and a mode on a node with one.

    An old .venv is never changed.
    """
    root, env = fresh[0] / "two", fresh[1]
    shutil.copytree(fresh[0], root, ignore=shutil.ignore_patterns(".venv*", "two"))
    script = (root / "launch.sh").read_text()
    assert script.count("'/dev/nvidia[0-9]*'") == 1
    (root / "launch.sh").write_text(script.replace("'/dev/nvidia[0-9]*'", f"'{tmp_path}/nvidia[0-9]*'"))
    (tmp_path / "nvidia0").touch()
    on_gpus = {key: value for key, value in env.items() if key != "CUDA_VISIBLE_DEVICES"}

    said = launch("install", "gpu", root=root, env=env)  # as on a login node
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
    """PATH is not used for it."""
    code = "import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
    if (
        not Path("/usr/bin/python3").exists()
        or subprocess.run(["/usr/bin/python3", "-c", code], capture_output=True).returncode
    ):
        pytest.skip("/usr/bin/python3 is none that is supported, with venv")
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    for name, line in (
        ("launch.sh", "command -v python3"),
        ("python3", "exit 1"),
        ("slurmctld", "exit 1"),
        ("chromium", "exit 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {**HERE, "PATH": f"{tmp_path}:{HERE['PATH']}"}
    done = subprocess.run([tmp_path / ".ci" / "run"], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "/usr/bin/python3\n")


def test_sbatch_runs_a_copy(fresh, tmp_path):
    """Slurm copies the batch script to another folder.

    The checkout is the folder of the job's command, and its name may contain a space.
    """
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
