"""A file that is wrong or cannot be read is reported in one line, with exit code 2, before any rank starts.

The line is on stderr. It names the file, and says what to do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.data import forms
from rlhf.errors import UserError


@pytest.mark.parametrize("number", range(10))
def test_what_may_not_be_read_or_written(refusals: list[tuple[int, str, str]], number: int) -> None:
    """The one line contains the path. It never advises to delete a file that only lacks permissions."""
    code, path, said = refusals[number]
    assert code == 2, said
    (line,) = said.splitlines()
    assert line.startswith("rlhf: ")
    assert path in line
    assert re.search("Permission denied|Not a directory", line), line
    assert "delete" not in line


@pytest.fixture(scope="module")
def refusals(made: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, str]]:
    """Return (exit code, path, stderr) of calls with a file or folder that lacks permissions.

    Root runs them without its capabilities.
    """
    root = tmp_path_factory.mktemp("permissions")
    data = f"{made}/data/train_sft.jsonl"
    for name in ("config", "weights"):
        shutil.copytree(made / "model", root / name)
    (root / "weights/model.safetensors").write_bytes(bytes(16))
    (root / "folder").mkdir()
    ranks = "iter/mp_rank_00/model_optim_rng.pt"
    runs = ["latest/latest", "meta/latest", "meta/step_000001/meta.json"]
    for name in [ranks, *runs, "c.toml", "d.jsonl", "folder/d.jsonl"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("step_000001")
    closed = ["config/config.json", "weights/model.safetensors", ranks, "latest/latest", "meta/step_000001"]
    closed += ["c.toml", "d.jsonl", "folder"]
    for name in closed:
        (root / name).chmod(0)
    calls = [
        ("c.toml", [f"{root}/c.toml"]),
        ("d.jsonl", [f"data.train={root}/d.jsonl"]),
        ("folder", [f"data.train={root}/folder"]),
        ("folder/d.jsonl", [f"data.train={root}/folder/d.jsonl"]),
        ("config/config.json", [f"policy.load={root}/config"]),
        ("weights/model.safetensors", [f"policy.load={root}/weights", "policy.init=load"]),
        (ranks, [f"policy.load={root}/iter", "policy.init=load"]),
        ("latest/latest", [f"out={root}/latest"]),
        ("meta/step_000001", [f"out={root}/meta"]),
        ("d.jsonl/", [f"out={root}/d.jsonl/run"]),
    ]
    good = ["sft", f"policy.load={made}/model", "policy.init=random", f"data.train={data}"]
    good += ["data.max_tokens=128", f"out={root}/run"]
    program = "import contextlib, io, json, sys\nfrom rlhf.__main__ import main\n"
    program += "for call in json.load(sys.stdin):\n"
    program += "    with contextlib.redirect_stderr(io.StringIO()) as said: code = main(call)\n"
    program += "    print(json.dumps([code, said.getvalue()]))"
    bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    given = json.dumps([[*good, *more] for _, more in calls])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    command = [*bare, sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, env=environment, input=given, capture_output=True, text=True)
    for name in closed:
        (root / name).chmod(0o755)
    assert done.returncode == 0, done.stderr
    return [
        (code, path, said)
        for (path, _), (code, said) in zip(calls, map(json.loads, done.stdout.splitlines()), strict=True)
    ]


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
    """A pipe is refused: it could be read only once, and reading could wait for ever."""
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "lines.jsonl")
    os.mkfifo(tmp_path / "latest")
    (tmp_path / "megatron").mkdir()
    os.mkfifo(tmp_path / "megatron/latest_checkpointed_iteration.txt")
    for mistake in (
        str(tmp_path / "config.json"),
        f"data.train={tmp_path}/lines.jsonl",
        f"data.train={tmp_path}",
        f"policy.load={tmp_path}",
        f"out={tmp_path}",
        f"policy.load={tmp_path}/megatron",
    ):
        assert "not a regular file" in fail("sft", mistake)


def test_pointers_of_git_lfs(fail, made: Path, tmp_path: Path) -> None:
    """A clone without git-lfs has them in place of the large files."""
    shutil.copytree(made / "model", tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer.model"):
        path = tmp_path / name
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 13476839\n")
        assert f"{path}: a pointer of git-lfs, not the file itself; fetch" in fail("sft", f"policy.load={tmp_path}")
        path.unlink()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n', [":2", "JSON"]),
        ('{"prompt": "a", "response": "b", "more": ' + "[" * 150 + "]" * 150 + "}", [":1", "nested too deeply"]),
        ("[" * 100_000, ["element 1", "nested too deeply"]),
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
    """All files of a folder are read, but not those of several splits, as in a folder that prepare_data writes."""
    for name, said in (("b.jsonl", "contains b.jsonl, which data.eval="), ("dev.jsonl", "of the splits train, dev; ")):
        folder = tmp_path / name.removesuffix(".jsonl")
        folder.mkdir()
        for file in ("train.jsonl", name):
            (folder / file).write_text('{"prompt": "a", "response": "b"}\n')
        assert said in fail("sft", f"data.train={folder}", f"data.eval={folder}/{name}")


def test_several_data_sets(fail, made: Path, tmp_path: Path) -> None:
    """Each has a name of its own and files of its own, and a weight has the name of one. Every line is checked."""
    data, bad = made / "data", tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Q?", "response": "A."}\n{"prompt": 1, "response": "A."}\n')

    def said(*train: object, more: str = "data.eval=") -> str:
        return fail("sft", f"data.train={json.dumps([str(each) for each in train])}", more)

    both = said(f"{data}/heldout.jsonl", bad, f"{tmp_path}/../{tmp_path.name}/bad.jsonl")
    assert f"data.train: {bad} and {tmp_path}/../{tmp_path.name}/bad.jsonl both have the name bad; give one" in both
    shared = said(f"a={bad}", f"b={tmp_path}/*.jsonl")
    assert f"data.train: a={bad} and b={tmp_path}/*.jsonl both contain bad.jsonl: remove one of them" in shared
    held_out = said(f"a={data}/train_sft.jsonl", f"b={tmp_path}", more=f"data.eval={bad}")
    assert f"data.train={tmp_path} contains bad.jsonl, which data.eval={bad} holds out" in held_out
    assert f"{bad}:2: 'prompt' is 1; give a string" in said(f"{data}/train_sft.jsonl", bad)
    unknown = said(f"a={data}/train_sft.jsonl", bad, more="data.weights.b=2")
    assert "data.weights.b: no data set of data.train has this name; its names are a, bad; correct it" in unknown
    assert "data set b=none.jsonl" not in said(bad, "b=none.jsonl")
    assert "data set none.jsonl: no such file or folder" in said(bad, "b=none.jsonl")


def test_answer_is_needed_by_the_verifier(fail, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "a"}\n')
    line = fail("grpo", f"data.train={path}")
    assert "bad.jsonl:2" in line
    assert "answer" in line
    for answer in ('{"x": 1}', "[[1]]", "[1, null]", "true", '" "', "NaN", "1e400"):
        path.write_text(f'{{"prompt": "a", "answer": {answer}}}\n')
        assert "bad.jsonl:1: 'answer' is" in fail("grpo", f"data.train={path}")


@pytest.mark.parametrize("score", ["1" + "0" * 400, "NaN", "-Infinity", "true"])
def test_scores(tmp_path: Path, score: str) -> None:
    with pytest.raises(UserError, match=r"'score' 2 is .*; give a number"):
        forms.read(f'{{"query": "a", "response": ["b", "c"], "score": [1, {score}]}}'.encode(), "scored")
