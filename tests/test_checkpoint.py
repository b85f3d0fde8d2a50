"""The checkpoints of a run: which are kept, the targets of `latest` and the links, and the folder after a crash."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace

import psutil
import pytest
import torch
from saved import MESH, Run, check_resumes_at

from rlhf.errors import UserError
from rlhf.parallel.layout import Layout
from rlhf.weights.shards import LiveShard


def test_a_run_without_checkpoints_starts_from_the_first_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.checkpoints.resume(run.roles.items(), run.state) == 0
    assert run.state == {"coefficient": 0.0}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    run = Run(tmp_path, f"checkpoint.keep={keep}")
    for step in (8, 9, 10, 100):  # their names sort like their numbers
        run.save(step)
        check_resumes_at(tmp_path, step)
    assert run.folders() == [8, 9, 10, 100][-keep:]


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    """For example after the run went back to an earlier checkpoint."""
    run = Run(tmp_path)
    for step in (1, 2, 2):
        run.save(step)
    assert run.folders() == [1, 2]
    check_resumes_at(tmp_path, 2)


def test_links_name_the_newest_export(tmp_path: Path) -> None:
    """The newest export is not always in the newest checkpoint."""
    run = Run(tmp_path, 'checkpoint.format=["hf", "mcore"]', "checkpoint.keep=3")
    for step, export in ((1, True), (2, True), (3, False)):
        run.save(step, export)
    for name in ("hf", "mcore"):
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name / "model").read_text() == f"{name} of 2"
        assert (tmp_path / "step_000001" / name / "model").read_text() == f"{name} of 1"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert (moved / "hf/model").read_text() == "hf of 2", "a run's folder may be moved"


def crash(*_: object, **__: object) -> None:
    raise InterruptedError("the machine is gone")


def during_a_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", crash)


def during_a_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", crash)


def during_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "export", crash)


def during_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", crash)


def during_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "symlink_to", crash)


def during_the_deletion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crash during the deletion of the old checkpoint. Calls with ignore_errors do not count."""
    remove = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, ignore_errors=False: remove(path, True) if ignore_errors else crash()
    )


def while_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crash in the second file of the checkpoint, after a part of it is written."""
    written = []

    def write(shard: LiveShard, call: Callable[[bytes], object]) -> None:
        written.append(shard)
        if len(written) == 2:
            call(b"half")
            crash()
        whole(shard, call)

    whole = LiveShard.write
    monkeypatch.setattr(LiveShard, "write", write)


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        (while_writing, 1),
        (during_the_export, 1),
        (during_the_description, 1),
        (during_a_rename, 1),
        (during_a_replacement, 1),
        (during_a_link, 2),
        (during_the_deletion, 2),
    ],
)
def test_a_crash_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: Callable[[pytest.MonkeyPatch], None], left: int
) -> None:
    """After a crash at any moment, `latest` names a complete folder.

    The next run continues from it, and overwrites incomplete folders.
    """
    run = Run(tmp_path, "checkpoint.keep=1")
    run.save(1, export=True)
    with monkeypatch.context() as patch:
        moment(patch)
        with pytest.raises(InterruptedError):
            run.save(2, export=True)
        run.checkpoints.writer.call(lambda: None).result()  # a crash also ends the thread that writes its files
    check_resumes_at(tmp_path, left)
    assert (tmp_path / "hf/model").read_text().startswith("hf of ")
    again = Run(tmp_path, "checkpoint.keep=1")
    again.checkpoints.resume(again.roles.items(), again.state)
    again.save(2, export=True)
    check_resumes_at(tmp_path, 2)
    assert again.folders() == [2]
    assert (tmp_path / "hf/model").read_text() == "hf of 2"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("rank", range(4))
def test_every_rank_saves_what_is_its_own(tmp_path: Path, rank: int, zero: bool) -> None:
    """Every rank saves its random state. Without ZeRO, one rank of each (tp, pp) place saves the training state."""
    layout = Layout(2, 1, 1, 2)
    tp, cp, dp, pp = layout.coordinates(rank)
    (tmp_path / "step_000001.partial").mkdir()
    run = Run(tmp_path, f"parallel.zero={zero}".lower())
    run.checkpoints.mesh = SimpleNamespace(  # type: ignore[assignment]
        **{**vars(MESH), "rank": rank, "layout": layout, "tp_rank": tp, "cp_rank": cp, "dp_rank": dp, "pp_rank": pp}
    )
    run.save(1)
    (folder,) = tmp_path.glob("step_*")
    wanted = {f"{role}_rank{rank}.safetensors" for role in run.roles} if zero or dp == 0 else set()
    assert {path.name for path in folder.glob("*_rank*")} == wanted | {f"random_rank{rank}.pt"}
    assert (folder / "meta.json").exists() == (tmp_path / "latest").exists() == (rank == 0)


class Slow:
    """Makes every write of a shard wait for release()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole, event = LiveShard.write, Event()

        def write(shard: LiveShard, call: Callable[[memoryview], object]) -> None:
            assert event.wait(10)
            whole(shard, call)

        monkeypatch.setattr(LiveShard, "write", write)
        self.release = event.set


def test_the_run_goes_on_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files have the state of the save, though the learners change in place before the files are written."""
    run, slow = Run(tmp_path), Slow(monkeypatch)
    saved = run.checkpoints
    saved.save(1, run.roles.items(), run.state)
    for learner in run.roles.values():
        learner.weight.add_(5)
    run.state["coefficient"] = 7.0
    saved.settle()
    assert saved.last is None
    assert not (tmp_path / "latest").exists()
    slow.release()
    while not saved.last:
        saved.settle()
    assert (tmp_path / "latest").read_text() == "step_000001"
    again = Run(tmp_path)
    assert again.checkpoints.resume(again.roles.items(), again.state) == 1
    assert [float(learner.weight) for learner in again.roles.values()] == [0.0, 100.0]
    assert again.state == {"coefficient": 0.0}


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, slow = Run(tmp_path), Slow(monkeypatch)
    run.checkpoints.save(1, run.roles.items(), run.state)
    Timer(0.2, slow.release).start()
    run.checkpoints.save(2, run.roles.items(), run.state)
    assert run.checkpoints.last == tmp_path / "step_000001"
    run.checkpoints.settle(wait=True)
    assert run.folders() == [1, 2]


@pytest.mark.parametrize("why", ["key", "memory"])
def test_without_copies_a_save_waits_for_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    """Without copies, the files are complete before the learners change. Too little memory is said once."""
    run = Run(tmp_path, *(["checkpoint.background=false"] if why == "key" else []))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    run.checkpoints.save(1, run.roles.items(), run.state)
    for learner in run.roles.values():
        learner.weight.add_(5)
    run.save(2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (why == "memory")
    said = "0.0 GiB of free host memory, and copies of the training state need 0.0: each save waits"
    assert all(said in line for line in lines)
    check_resumes_at(tmp_path, 2)
    (tmp_path / "latest").write_text("step_000001")
    again = Run(tmp_path)
    assert again.checkpoints.resume(again.roles.items(), again.state) == 1
    assert [float(learner.weight) for learner in again.roles.values()] == [0.0, 100.0]


def test_a_failed_write_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the thread is raised on the main thread, with the path, and `latest` stays."""
    run = Run(tmp_path)
    run.save(1)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    run.checkpoints.save(2, run.roles.items(), run.state)
    with pytest.raises(OSError, match=r"No space left on device: '.*step_000002.partial/policy_rank0.safetensors'"):
        run.checkpoints.settle(wait=True)
    assert (tmp_path / "latest").read_text() == "step_000001"


def test_another_layout_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The random state is not restored then, and one line says so."""
    run, other = Run(tmp_path), Run(tmp_path)
    run.save(1)
    state = torch.get_rng_state()
    other.checkpoints.layout |= {"dp": 2, "zero": False}
    torch.rand(3)
    moved = torch.get_rng_state()
    assert other.checkpoints.resume(other.roles.items(), {}) == 1
    assert torch.equal(torch.get_rng_state(), moved)
    (line,) = capsys.readouterr().out.splitlines()
    assert "was saved at tp 1 pp 1 cp 1 dp 1 zero 1; the run continues at tp 1 pp 1 cp 1 dp 2 zero 0, so" in line
    assert run.checkpoints.resume(run.roles.items(), {}) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert not capsys.readouterr().out


def test_what_was_just_written_stays(tmp_path: Path) -> None:
    """Folders of later steps, from before the run went back, are neither counted nor deleted."""
    run = Run(tmp_path, "checkpoint.keep=1")
    later = Run(tmp_path, "checkpoint.keep=3")
    for step in (6, 8):
        later.save(step)
    (tmp_path / "latest").unlink()
    for step in (2, 4):
        run.save(step, export=True)
        check_resumes_at(tmp_path, step)
        assert (tmp_path / "hf/model").read_text() == f"hf of {step}"
    assert run.folders() == [4, 6, 8]
    run.save(6, export=True)
    check_resumes_at(tmp_path, 6)
    assert run.folders() == [6, 8]


def test_a_kill_before_latest_moves_costs_no_later_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """keep=1: a folder that is renamed, but not yet in `latest`, must not delete the next run's checkpoint.

    The next run writes an earlier step.
    """
    run = Run(tmp_path, "checkpoint.keep=1")
    run.save(2)
    with monkeypatch.context() as patch:
        during_a_replacement(patch)
        with pytest.raises(InterruptedError):
            run.save(4)
    check_resumes_at(tmp_path, 2)
    run.save(3)
    check_resumes_at(tmp_path, 3)
    assert run.folders() == [3, 4]


@pytest.mark.parametrize("link", ["best", "hf"])
def test_what_a_link_names_stays(tmp_path: Path, link: str) -> None:
    """The newest export and the targets of a user's links stay."""
    run = Run(tmp_path, "checkpoint.keep=1")
    run.save(1, export=True)
    if link == "best":
        (tmp_path / "best").symlink_to((tmp_path / "step_000001").resolve())
        (tmp_path / "hf").unlink()
    for step in (2, 3):
        run.save(step)
    assert run.folders() == [1, 3]
    assert (tmp_path / link).exists()


@pytest.mark.parametrize("latest", [None, "step_000009", "", "../elsewhere", "\x00\xff"])
def test_the_newest_whole_checkpoint_is_found_without_latest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], latest: str | None
) -> None:
    run = Run(tmp_path, "checkpoint.keep=4")
    for step in (1, 2, 1_000_000):
        run.save(step)
    (tmp_path / "step_000003").mkdir()  # incomplete
    (tmp_path / "step_000004.partial").mkdir()
    if latest is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(latest)
    check_resumes_at(tmp_path, 1_000_000)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/latest" in line
    assert "step_1000000 is the newest complete checkpoint" in line
    run.save(1_000_001)
    assert not list(tmp_path.glob("*.partial"))


def test_no_whole_checkpoint_is_left(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_000002\n")
    for _ in range(2):
        with pytest.raises(
            UserError,
            match=rf"latest names 'step_000002', which does not exist, and {tmp_path} has no complete .* set another",
        ):
            Run(tmp_path).checkpoints.resume([], {})
        (tmp_path / "step_000001").mkdir(exist_ok=True)
    (tmp_path / "latest").unlink()
    with pytest.raises(UserError, match="latest is missing, and"):
        Run(tmp_path).checkpoints.resume([], {})
