"""Checkpoint files of Megatron-LM are read. Files with code in them, and damaged or incomplete ones, are refused."""

import argparse
import io
import json
import os
import pickle
import signal
import sys
import types
import zipfile
from dataclasses import replace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from test_convert import run, tensors_of
from test_tiles import LLAMA, mcore_rank, random_hf

from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.weights import files, names, pt
from rlhf.weights.formats import FORMATS, Target, args, hf, megatron


def foreign(monkeypatch: pytest.MonkeyPatch, name: str) -> Enum:
    """Return a member of an enum that the installed megatron-core does not have.

    An older or a newer release has written it.
    """
    module, _, title = name.rpartition(".")
    enum = Enum(title, ["first", "second"], module=module)
    for parent in ("megatron", "megatron.core", module):
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setattr(sys.modules[module], title, enum, raising=False)
    return enum["second"]


def save_as_megatron_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arch: architecture.Architecture, rows: int, **changes: object
) -> None:
    """Write a trained TP2 checkpoint as Megatron-LM does.

    Parameters are views into one buffer. The files also have optimizer and random state, and enums in args.
    """
    hf_tensors = random_hf(arch)
    target = Target(FORMATS["mcore-local"], arch, torch.float32, tp=2, iteration=3, divisor=rows // 2)
    described = args.describe(target) | {"rotary_base": 10000}
    described |= {
        "exit_signal": signal.SIGTERM,
        "cache": Path("/x"),
        "rope": types.SimpleNamespace(theta=1),
        "samples": np.float64(3),
    }
    described |= {
        "model_type": foreign(monkeypatch, pt.CLASSES[0]),
        "attention_backend": foreign(monkeypatch, "megatron.core.transformer.enums.AttnBackend"),
        **changes,
    }
    for rank in range(2):
        held = mcore_rank(arch, hf_tensors, (rank, 2), (0, 1))
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            table = hf_tensors["lm_head.weight" if "output" in name else "model.embed_tokens.weight"]
            held[name] = torch.cat([table, torch.full((rows - arch.vocab, arch.hidden), 7.0)]).chunk(2)[rank]
        buffer, model, at = torch.empty(sum(t.numel() for t in held.values()) + 100), {}, 100
        for name, tensor in held.items():
            model[name] = buffer[at : at + tensor.numel()].view(tensor.shape).copy_(tensor)
            at += tensor.numel()
        model["decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"as Transformer Engine writes it")
        random = {"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}
        tree = {
            "args": argparse.Namespace(**described), "checkpoint_version": 3.0, "iteration": 3, "model": model,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(5)}}}, "rng_state": [random],
            "opt_param_scheduler": {"max_lr": 1e-5},
        }  # fmt: skip
        path = folder / f"iter_0000003/mp_rank_{rank:02}/model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(tree, path)
    (folder / megatron.TRACKER).write_text("3\n")


def test_megatrons_own_files_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Any padding of the vocabulary is read.

    config.json overrides args, and the difference is printed. Without config.json, args describe the model.
    """
    arch, wanted = replace(LLAMA, rope_theta=5e5), random_hf(LLAMA)
    folder = tmp_path / "core"
    save_as_megatron_does(folder, monkeypatch, arch, rows=160)
    assert files.read_architecture(folder) == replace(arch, rope_theta=10000.0)
    assert not files.config_folder(folder)
    (folder / "config.json").write_text(json.dumps(hf.description(arch)))
    run("--from", folder, "--to", tmp_path / "hf", "--format", "hf")
    assert "rotary_base 10000" in capsys.readouterr().err
    got = tensors_of(tmp_path / "hf")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert architecture.read(tmp_path / "hf") == arch
    for rank, tiling in enumerate(names.tilings(arch, "vllm", 2, 2)):  # directly into an engine's parameters
        held = {name: torch.zeros(shape) for name, shape in names.shapes(tiling).items()}
        files.read(folder, arch, tiling, held)
        assert torch.equal(
            held["model.layers.2.mlp.down_proj.weight"],
            wanted["model.layers.2.mlp.down_proj.weight"].chunk(2, dim=1)[rank],
        )


class Malice:
    def __init__(self, call: object, *arguments: object):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("call", "named"), [(os.system, "posix.system"), (eval, "builtins.eval"), (pickle.loads, "pickle.loads")]
)
def test_a_file_that_asks_for_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: object, named: str
):
    mark = tmp_path / "executed"
    harm = {
        os.system: f"touch {mark}",
        eval: f"open({str(mark)!r}, 'w')",
        pickle.loads: pickle.dumps(Malice(os.system, f"touch {mark}")),
    }[call]
    save_as_megatron_does(tmp_path / "core", monkeypatch, LLAMA, 102, exit_hook=Malice(call, harm))
    with torch.serialization.safe_globals([call]):  # the user's list of allowed globals does not apply here
        with pytest.raises(
            UserError, match=f"model_optim_rng.pt: it asks for {named}, but only weights and numbers are read"
        ):
            files.open_folder(tmp_path / "core", LLAMA)
        assert call in torch.serialization.get_safe_globals()
    assert not mark.exists()


def no_archive_of_torch(folder: Path) -> None:
    with zipfile.ZipFile(folder / "iter_0000003/mp_rank_01/model_optim_rng.pt", "w") as archive:
        archive.writestr("hello", "world")


def spoilt_pickle(folder: Path) -> None:
    """Damage the pickle in an intact archive."""
    path = folder / "iter_0000003/mp_rank_01/model_optim_rng.pt"
    content = bytearray(path.read_bytes())
    start = content.index(b"checkpoint_version")
    content[start + 40 : start + 60] = bytes(range(230, 250))
    path.write_bytes(content)


def drop_rank(folder: Path) -> None:
    (folder / "iter_0000003/mp_rank_01/model_optim_rng.pt").unlink()
    (folder / "iter_0000003/mp_rank_01").rmdir()


def cut_short(folder: Path) -> None:
    path = folder / "iter_0000003/mp_rank_01/model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-2000])


def another_order(folder: Path) -> None:
    """Set the version of early releases of Megatron-LM, which did not group q, k and v by heads."""
    path = folder / "iter_0000003/mp_rank_00/model_optim_rng.pt"
    tree = torch.load(path, weights_only=False)
    torch.save(tree | {"checkpoint_version": 1.0}, path)


WRONG = {
    "rows in another order": (
        another_order,
        "iter_0000003: checkpoint_version 1.0 has another order of the rows of q, k and v",
    ),
    "a rank missing": (drop_rank, "iter_0000003: mp_rank_01 is missing for 2 x 1 ranks"),
    "cut short": (cut_short, "not a file of torch.save, or cut short at"),
    "another archive": (no_archive_of_torch, "damaged, or not a checkpoint"),
    "a spoilt pickle": (spoilt_pickle, "damaged, or not a checkpoint"),
    "no such iteration": (
        lambda folder: (folder / megatron.TRACKER).write_text("8"),
        "no folder iter_0000008; there are iter_0000003",
    ),
    "no tracker": (
        lambda folder: (folder / megatron.TRACKER).unlink(),
        "no latest_checkpointed_iteration.txt, so iter_0000003 may be",
    ),
    "an odd tracker": (
        lambda folder: (folder / megatron.TRACKER).write_text("?"),
        r"'\?' is neither a number nor release",
    ),
    "a damaged tracker": (
        lambda folder: (folder / megatron.TRACKER).write_bytes(b"\xb8"),
        "not UTF-8",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_incomplete_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil, message: str):
    save_as_megatron_does(tmp_path / "core", monkeypatch, LLAMA, 102)
    files.open_folder(tmp_path / "core", LLAMA)
    spoil(tmp_path / "core")
    with pytest.raises(UserError, match=message):
        files.open_folder(tmp_path / "core", LLAMA)
