"""Conversion from any format and layout to any other is bitwise, needs bounded memory, and is never left half done."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tiles import FAMILIES, LLAMA, random_hf

from rlhf import convert
from rlhf.__main__ import main
from rlhf.errors import StorageError, UserError
from rlhf.model import architecture
from rlhf.weights import export, files
from rlhf.weights.formats import hf, inspect, megatron

ROOT = Path(__file__).parents[1]
MODELS = {
    **FAMILIES,
    "reward model": replace(LLAMA, lm=False, scalar=True, pad=2),
    "tied reward model": replace(LLAMA, lm=False, scalar=True, tied=True),
    "a vocabulary that divides": replace(LLAMA, vocab=128),
}


def hf_folder(
    folder: Path, arch: architecture.Architecture, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Write a Hugging Face folder with the safetensors package. Return its tensors."""
    tensors = {name: tensor.to(dtype) for name, tensor in random_hf(arch).items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf.description(arch)))
    (folder / "tokenizer.json").write_text("{}")
    return tensors


def run(*arguments: object) -> None:
    convert.main([str(argument) for argument in arguments])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS)
def test_hf_mcore_legacy_hf_is_bitwise(tmp_path: Path, arch):
    wanted = hf_folder(tmp_path / "hf", arch)
    assert architecture.read(tmp_path / "hf") == arch
    for (tp, pp), (other_tp, other_pp) in zip(
        product((1, 2, 4), (1, 2, 4)), product((4, 1, 2), (2, 1, 4)), strict=True
    ):
        step = tmp_path / f"{tp}-{pp}"
        run(
            "--from",
            tmp_path / "hf",
            "--to",
            step / "core",
            "--format",
            ("mcore", "mcore-local")[pp // 2 % 2],
            "--tp",
            tp,
            "--pp",
            pp,
        )
        if tp == pp:
            run("--from", step / "core", "--to", step / "sharded", "--format", "torch_dist", "--verify")
        run(
            "--from",
            step / ("sharded" if tp == pp else "core"),
            "--to",
            step / "old",
            "--format",
            "legacy",
            "--tp",
            other_tp,
            "--pp",
            other_pp,
            "--verify",
        )
        run("--from", step / "old", "--to", step / "hf", "--format", "hf", "--verify")
        got = tensors_of(step / "hf")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted), (tp, pp)
        assert architecture.read(step / "hf") == arch
        assert (step / "hf/tokenizer.json").exists()


@pytest.mark.parametrize(
    ("format", "refused"),
    [("legacy", "may be incomplete"), ("torch_dist", "may be incomplete"), ("hf", "config.json: No such file")],
)
def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path: Path, format: str, refused: str):
    hf_folder(tmp_path / "hf", LLAMA)
    arguments = ["--from", tmp_path / "hf", "--to", tmp_path / "old", "--format", format]
    script = f"""
import os, signal
from rlhf import convert
from rlhf.weights import export
convert.BUCKET, store, count = 1, export.store, []
def killing(entry, tensor):
    count.append(store(entry, tensor))
    if len(count) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
export.store = killing
convert.main({[str(a) for a in arguments]!r})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "old").exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name != "hf")
    with pytest.raises(UserError, match=refused):
        files.open_folder(left, files.read_architecture(left, tmp_path / "hf"))
    run(*arguments, "--verify")
    assert not left.exists()


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (OSError(28, "No space left on device"), 2, "--to .*old: .*No space left on device"),
        (KeyboardInterrupt(), 130, "ended by SIGINT"),
    ],
    ids=["disk full", "Ctrl-C"],
)
def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, failure, code: int, said: str
):
    hf_folder(tmp_path / "hf", LLAMA)
    stored = export.store

    def failing(entry, tensor):
        stored(entry, tensor)
        raise failure

    monkeypatch.setattr(export, "store", failing)
    assert main(["convert", "--from", f"{tmp_path}/hf", "--to", f"{tmp_path}/old", "--format", "legacy"]) == code
    assert re.fullmatch(rf"rlhf: .*{said}.*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hf_folder(tmp_path / "hf", LLAMA)
    size = (tmp_path / "hf/model.safetensors").stat().st_size
    for total, free in ((1 << 30, size), (0, 0)):
        monkeypatch.setattr(
            convert.shutil, "disk_usage", lambda _, found=(total, free): SimpleNamespace(total=found[0], free=found[1])
        )
        run("--from", tmp_path / "hf", "--to", tmp_path / f"a/{total}", "--format", "hf")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 30, free=1000))
    with pytest.raises(UserError, match=rf"^{tmp_path} has 0.0 GB left, but the new folder takes 0.0 GB: delete"):
        run("--from", tmp_path / "hf", "--to", tmp_path / "b/new", "--format", "hf")
    assert not (tmp_path / "b").exists()


def test_a_reward_model_without_its_head_is_none(tmp_path: Path):
    """A reward model without its head is refused: readers of the new folder could not see that the head is missing."""
    hf_folder(tmp_path / "hf", LLAMA)
    (tmp_path / "hf/config.json").write_text(json.dumps(hf.description(replace(LLAMA, lm=False, scalar=True))))
    with pytest.raises(UserError, match=r"hf has no scalar head \(score.weight\)"):
        run("--from", tmp_path / "hf", "--to", tmp_path / "old", "--format", "legacy")


def test_what_float16_cannot_hold_is_refused(tmp_path: Path):
    tensors = hf_folder(tmp_path / "hf", LLAMA)
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError, match=r"hf: model.norm.weight has values above 65504, the largest of float16"):
        run("--from", tmp_path / "hf", "--to", tmp_path / "new", "--format", "hf", "--dtype", "fp16")
    assert not (tmp_path / "new").exists()


def test_a_release_is_of_no_iteration(tmp_path: Path):
    hf_folder(tmp_path / "hf", LLAMA)
    run("--from", tmp_path / "hf", "--to", tmp_path / "old", "--format", "legacy")
    (tmp_path / "old/iter_0000001").rename(tmp_path / "old/release")
    (tmp_path / "old" / megatron.TRACKER).write_text("release")
    path = tmp_path / "old/release/mp_rank_00/model_optim_rng.pt"
    torch.save(load(path) | {"iteration": "release"}, tmp_path / "changed.pt")
    (tmp_path / "changed.pt").rename(path)
    run("--from", tmp_path / "old", "--to", tmp_path / "new", "--format", "mcore")
    assert inspect(tmp_path / "new").iteration == 1


def test_a_tensor_that_is_passed_over_has_no_say_in_the_dtype(tmp_path: Path):
    """An example is the inverse frequencies in Llama 2's folders."""
    wanted = hf_folder(tmp_path / "hf", LLAMA)
    save_file(
        wanted | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "hf/model.safetensors"
    )
    run("--from", tmp_path / "hf", "--to", tmp_path / "old", "--format", "legacy")
    assert inspect(tmp_path / "old").args["params_dtype"] == torch.bfloat16


@pytest.mark.parametrize("format", ["hf", "mcore", "legacy", "torch_dist"])
def test_verify_finds_a_flipped_bit(tmp_path: Path, format: str):
    hf_folder(tmp_path / "hf", LLAMA)
    run("--from", tmp_path / "hf", "--to", tmp_path / "new", "--format", format)
    source, written = (files.open_folder(tmp_path / name, LLAMA) for name in ("hf", "new"))
    convert.verify(source, LLAMA, tmp_path / "new")
    local, entry = next((local, entry) for local, entry in written.contents.shards[0].items() if "layers.2" in local)
    with entry.path.open("r+b") as file:
        file.seek(entry.stop - 1)
        byte = file.read(1)[0]
        file.seek(entry.stop - 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(StorageError, match=f"{re.escape(local)} differs from what was written"):
        convert.verify(source, LLAMA, tmp_path / "new")


def test_memory_is_bounded_by_the_bucket(tmp_path: Path):
    """The conversion of 200 MB of weights takes 10 MB of memory, also from a file of torch.save.

    It never holds a whole file of an output shard, and releases what it has read.
    """
    arch = replace(LLAMA, hidden=1024, ffn=2048, vocab=2000, layers=12, heads=16, kv_heads=16, head_dim=64)
    torch.save(hf_folder(tmp_path / "hf", arch), tmp_path / "hf/pytorch_model.bin")
    (tmp_path / "hf/model.safetensors").unlink()
    assert (tmp_path / "hf/pytorch_model.bin").stat().st_size > 200e6
    script = f"""
import torch, resource
from rlhf import convert
convert.BUCKET = 1 << 20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
root = {str(tmp_path)!r}
run = lambda *a: convert.main(["--from", root + a[0], "--to", root + a[1], "--format", *a[2:]])
(torch.ones(1 << 20) * 2).sum()
start = peak()
run("/hf", "/old", "legacy")
run("/old", "/core", "mcore", "--tp", "2")
run("/core", "/again", "hf")
run("/again", "/last", "legacy")
assert peak() - start < 40, f"{{start}} -> {{peak()}} MB"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_tutorials_variables(tmp_path: Path):
    hf_folder(tmp_path / "hf", LLAMA)
    there = {
        "LOAD_PATH": str(tmp_path / "hf"),
        "SAVE_PATH": str(tmp_path / "old"),
        "TP": "2",
        "PP": "2",
        "TOKENIZER_MODEL": str(tmp_path),
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **there, "target_params_dtype": "fp32"}
    subprocess.run([sys.executable, "-m", "rlhf", "convert_hf_to_megatron"], env=environment, check=True)
    checkpoint = inspect(tmp_path / "old")
    assert (checkpoint.layout, checkpoint.tp, checkpoint.pp, checkpoint.args["params_dtype"]) == (
        "legacy",
        2,
        2,
        torch.float32,
    )
    assert convert.tutorial("convert_hf_to_megatron", {**there, "USE_LEGACY_MODELS": "False"})[5] == "mcore"
    (tmp_path / "old/config.json").unlink()  # as in Megatron-LM's own folders
    (tmp_path / "old/tokenizer.json").unlink()
    back = {
        "LOAD_PATH": str(tmp_path / "old"),
        "SAVE_PATH": str(tmp_path / "back"),
        "VOCAB_PATH": str(tmp_path / "hf/tokenizer.json"),
        "TP": "2",
        "PP": "2",
    }
    run(*convert.tutorial("convert_megatron_to_hf", {**back, "target_params_dtype": "bf16"}))
    assert all(
        torch.equal(tensor, random_hf(LLAMA)[name].bfloat16()) for name, tensor in tensors_of(tmp_path / "back").items()
    )
    assert (tmp_path / "back/tokenizer.json").exists()
    (tmp_path / "words/additional_chat_templates").mkdir(parents=True)
    (tmp_path / "words/tokenizer.model").write_text("the user's")
    (tmp_path / "words/additional_chat_templates/tool_use.jinja").write_text("tools")
    run(
        *convert.tutorial(
            "convert_megatron_to_hf",
            {
                "LOAD_PATH": str(tmp_path / "hf"),
                "SAVE_PATH": str(tmp_path / "again"),
                "VOCAB_PATH": str(tmp_path / "words"),
            },
        )
    )
    found = {str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*.*")}
    assert found == {"config.json", "model.safetensors", "tokenizer.model", "additional_chat_templates/tool_use.jinja"}
    for variables, message in (
        ({"LOAD_PATH": "x"}, "set SAVE_PATH"),
        ({**there, "VOCAB_PATH": str(tmp_path / "nowhere")}, "--config .*nowhere: no such folder"),
        ({**there, "USE_LEGACY_MODELS": "maybe"}, "USE_LEGACY_MODELS=maybe"),
        ({**there, "target_params_dtype": "int8"}, "target_params_dtype=int8"),
    ):
        with pytest.raises(UserError, match=message):
            run(*convert.tutorial("convert_hf_to_megatron", variables))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "hf", "--format", "legacy"], "exists: give a new folder"),
        (["--to", "x", "--format", "hf", "--tp", "2"], "a folder of format hf is not split"),
        (
            ["--to", "x", "--format", "hf", "--vocab-divisor", "8"],
            "--vocab-divisor 8: a vocabulary of format hf is not padded",
        ),
        (["--to", "x", "--format", "mcore", "--tp", "3"], "--tp 3 does not divide the attention heads 8"),
        (["--to", "x", "--format", "mcore", "--pp", "3"], "--pp 3 does not divide the 4 layers"),
        (["--to", "x", "--format", "mcore", "--tp", "0"], "must be at least 1"),
        (
            ["--to", "x", "--format", "mcore", "--tp", "two"],
            "argument --tp: invalid int value: 'two'; see ./launch.sh convert --help",
        ),
        (["--to", "x"], "the following arguments are required: --format"),
        (["--to", "hf/model.safetensors/x", "--format", "mcore"], "--to hf/model.safetensors/x: .*Not a directory"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str):
    hf_folder(tmp_path / "hf", LLAMA)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run("--from", "hf", *arguments)
