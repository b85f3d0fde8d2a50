"""A file of a checkpoint was changed: one line names the file and the undamaged checkpoint before it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from errno import EACCES, EIO
from pathlib import Path

import pytest
import torch
from saved import Run, check_resumes_at

from rlhf import folders
from rlhf.errors import UserError


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"step": 2'])
def test_a_damaged_description(tmp_path: Path, text: str | None) -> None:
    """The line also names the undamaged checkpoint before it, and says how to continue from there."""
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
    (tmp_path / "step_000002/meta.json").unlink()
    if text is not None:
        (tmp_path / "step_000002/meta.json").write_text(text)
    with pytest.raises(UserError, match=rf"step_000002/meta.json is damaged .*: echo step_000001 > {tmp_path}/latest$"):
        run.checkpoints.resume(run.roles.items(), {})
    (tmp_path / "latest").write_text("step_000001\n")
    check_resumes_at(tmp_path, 1)


def flip(file: Path) -> None:
    """Flip one bit in the middle."""
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)


def zero(file: Path) -> None:
    held = bytearray(file.read_bytes())
    first = max(0, len(held) // 2 - 2048)
    held[first : first + 4096] = bytes(len(held[first : first + 4096]))
    file.write_bytes(held)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def add(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def swap(file: Path) -> None:
    """Exchange the file with that of another checkpoint of the same size.

    This may happen when a backup is restored.
    """
    file.write_bytes((file.parents[1] / "step_000001" / file.name).read_bytes())


FILES = [
    "policy_rank0.safetensors",
    "critic_rank0.safetensors",
    "random_rank0.pt",
    "meta.json",
]


@pytest.mark.parametrize("spoil", [flip, zero, cut, add, swap, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_told(tmp_path: Path, spoil: Callable[[Path], None], name: str) -> None:
    """For every file, one line has its name and the undamaged checkpoint before it.

    The run then continues from there.
    """
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
        torch.rand(1)  # makes the random states differ
    spoil(tmp_path / "step_000002" / name)
    with pytest.raises(
        UserError,
        match=rf"^{tmp_path}/step_000002/.* is (damaged|missing).*; .*: echo step_000001 > {tmp_path}/latest$",
    ):
        Run(tmp_path).checkpoints.resume(Run(tmp_path).roles.items(), {})
    (tmp_path / "latest").write_text("step_000001")
    check_resumes_at(tmp_path, 1)


def test_damage_to_what_was_in_flight(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoints.save(1, run.roles.items(), run.state, flight={"drawn": 1})
    run.checkpoints.settle(wait=True)
    assert run.checkpoints.flight() == {"drawn": 1}
    flip(tmp_path / "step_000001/flight.pt")
    with pytest.raises(UserError, match=r"step_000001/flight.pt is damaged: its checksum is wrong"):
        run.checkpoints.flight()


def test_damage_without_an_older_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    cut(tmp_path / "step_000001/random_rank0.pt")
    with pytest.raises(
        UserError, match=rf"no older complete checkpoint is left: delete {tmp_path} to start again, or set another out$"
    ):
        run.checkpoints.resume(run.roles.items(), {})


@pytest.mark.parametrize(("spoil", "said"), [(add, "it has 8 bytes, 7 were written"), (flip, "its checksum is wrong")])
def test_exported_folders_are_covered(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    """Several ranks write one file of an export. A user may delete a whole export."""
    run = Run(tmp_path)
    run.save(1, export=True)
    spoil(tmp_path / "step_000001/hf/model")
    with pytest.raises(UserError, match=f"step_000001/hf/model is damaged: {said}"):
        run.checkpoints.resume(run.roles.items(), {})
    shutil.rmtree(tmp_path / "step_000001/hf")
    check_resumes_at(tmp_path, 1)


@pytest.mark.parametrize("error", [PermissionError(EACCES, "Permission denied"), OSError(EIO, "Input/output error")])
def test_a_file_that_cannot_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """One rank cannot read a file: one line has the path, and no rank advises to go back to an older checkpoint."""
    run = Run(tmp_path)
    run.save(1)

    def refuse(path: Path) -> None:
        error.filename = str(path)
        raise error

    monkeypatch.setattr(folders, "checksum", refuse)
    with pytest.raises(UserError, match=rf"^{tmp_path}/step_000001/random_rank0.pt: {error.strerror}$"):
        run.checkpoints.resume(run.roles.items(), {})


def test_checkpoints_of_before_are_refused(tmp_path: Path) -> None:
    """Older checkpoints have other files."""
    run = Run(tmp_path)
    run.save(1)
    meta = json.loads((tmp_path / "step_000001/meta.json").read_text())
    for name in [name for name in meta["files"] if name.endswith(".safetensors")]:
        meta["files"][f"model_{name}"] = meta["files"].pop(name)
        (tmp_path / "step_000001" / name).rename(tmp_path / "step_000001" / f"model_{name}")
    del meta["crc32"]
    (tmp_path / "step_000001/meta.json").write_text(folders.describe(meta))
    with pytest.raises(UserError, match=r"step_000001 was saved by an older version of rlhf: .*, or set another out$"):
        run.checkpoints.resume(run.roles.items(), {})
