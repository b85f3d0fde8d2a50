"""The report of runs without a browser: damaged and missing files, limits, mistakes, and the process that writes it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from commands import ROOT
from reports import damage, needs_library, sample, write_lines, write_run

from rlhf import progress
from rlhf.__main__ import main
from rlhf.algorithms import ALGORITHMS
from rlhf.report import background, page, runs, samples
from rlhf.report.background import Reporter


def test_damaged_files_leave_the_rest(tmp_path: Path) -> None:
    damage(tmp_path / "run")
    run = runs.read(tmp_path / "run")
    assert run.steps == [1, 2, 3, 4, 5, 7, 8]
    assert run.metrics == {"loss": [1, 2, 3, 4, 5, 7, None]}
    found = samples.read(run, 10)
    assert [row["turns"] for row in found] == [[["assistant", ""]], [["assistant", "kept"]]]
    assert any(remark == "samples: damaged lines are left out: 1" for remark in run.remarks)
    assert runs.read(tmp_path / "nowhere").steps == []


def test_what_does_not_fit_is_left_out_evenly(tmp_path: Path) -> None:
    """Of many steps, every n-th one is shown, and all evaluations if they are few. Of many files, some are read."""
    out = write_run(tmp_path / "run", 40)
    width = len(runs.read(out).metrics)
    assert runs.read(out, 41 * width).steps == [*range(41)]
    assert runs.read(out, 11 * width).steps == [0, 4, 5, 8, 10, 12, 15, 16, 20, 24, 25, 28, 30, 32, 35, 36, 40]
    run = runs.read(out, 4 * width)
    assert run.steps == [0, 11, 22, 33, 40], "too many evaluations to keep all"
    assert any("5 of 41 steps" in remark for remark in run.remarks)
    for step in range(1, 17):
        write_lines(run.folder / "samples" / f"step_{step:06}.jsonl", [sample(step, i, "x" * 50) for i in range(2)])
    kept = samples.read(run, 8)
    assert sorted({row["step"] for row in kept}) == [4, 8, 12, 16]
    assert "samples: 8 of 8 in 4 of 16 files are in this page; out/samples has all" in run.remarks
    write_lines(run.folder / "samples" / "evaluate.jsonl", [sample(0, i, "", use="evaluate") for i in range(9)])
    assert [row["use"] for row in samples.read(run, 8)] == ["evaluate"] * 4 + ["train"] * 4
    (packed,), _, cuts = samples.pack([kept], 20)
    assert cuts == 8
    assert packed["samples"][0]["turns"][0][1] == f"{'x' * 15}\n[… 30 characters are left out …]\n{'x' * 5}"
    assert sorted(samples_order := samples.spread(1000)) == list(range(1000))
    assert samples_order[:2] == [999, 487]


def test_a_page_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts are cut more and more, and then samples are left out, until the block has its size."""
    draw = random.Random(1)
    run = runs.read(write_run(tmp_path / "run"))
    rows = [sample(1, i, "".join(draw.choices("0123456789", k=3000))) for i in range(40)]
    write_lines(run.folder / "samples" / "step_000001.jsonl", rows)
    kept = [samples.read(run, 100)]
    assert page._samples([run], kept)[1] == 0
    for limit, cut in ((30_000, 1000), (6000, 100), (1500, 100)):
        monkeypatch.setattr(page, "BYTES", limit)
        block, longest = page._samples([run], kept)
        assert (len(block) <= limit, longest) == (True, cut)
    assert "more are left out" in run.remarks[-1]


def test_the_process_starts_quickly() -> None:
    """A run starts it often, so it imports neither torch nor numpy nor the configuration."""
    program = "import sys, rlhf.report.command; print(*{'torch', 'numpy', 'rlhf.config', 'bokeh'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout == "\n"


@needs_library
def test_mistakes_of_a_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, said in (
        ([str(tmp_path / "no")], "no: no such folder"),
        ([], "RUN"),
        ([str(tmp_path), "--x"], "--x"),
    ):
        assert main(["report", *arguments]) == 2
        line = capsys.readouterr().err
        assert said in line
        assert line.count("\n") == 1
    monkeypatch.setattr(page, "plotting", lambda: None)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "rlhf: the report needs the package bokeh: install it (pip install bokeh)\n"
    reporter = Reporter(tmp_path, wanted=True)
    reporter.update()
    reporter.finish(10)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "bokeh is missing" in out
    assert not list(tmp_path.iterdir())


def test_only_files_of_runs_count(tmp_path: Path) -> None:
    """A folder may also have data and configurations of the user."""
    write_lines(tmp_path / "train.jsonl", [{"step": 1, "x": 1}, {"prompt": "p"}])
    (tmp_path / "mine.toml").write_text("steps = 3\n")
    write_lines(tmp_path / "evaluate.jsonl", [{"step": 0, "eval_reward": 0.5}])
    run = runs.read(tmp_path)
    assert (run.evaluations, run.config) == ({"evaluate": {"eval_reward": 0.5}}, {})
    assert run.remarks == ["config.toml is missing"]
    (tmp_path / "evaluate.toml").write_text("steps = 4\n")
    assert runs.read(tmp_path).config == {"steps": "4"}
    assert [*runs.EVALUATIONS] == [mode for mode, row in ALGORITHMS.items() if not row.trains and not row.judged]


def test_samples_name_their_set(tmp_path: Path) -> None:
    """Rows and groups count within a set, whose name may be long."""
    run = runs.read(write_run(tmp_path / "run"))
    write_lines(run.folder / "samples" / "step_000001.jsonl", [sample(1, 0, "", set="s" * 200)])
    (row,) = samples.read(run, 10)
    assert row["set"] == "s" * 200
    assert "more" not in row


def test_a_folder_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "bokeh").mkdir()
    program = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; from rlhf.report import page; "
    done = subprocess.run(
        [sys.executable, "-c", f"{program}print(page.plotting())"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "None\n", done.stderr


@needs_library
def test_a_run_writes_its_report_in_another_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process at a time, none too soon after another. A failure or a long wait is one line."""
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setattr(background, "REST", 10_000)
    run = write_run(tmp_path / "run")
    (run / "report.html.1.partial").touch()  # of a run that was killed
    reporter = Reporter(run, wanted=True)
    assert not list(run.glob("*.partial"))
    reporter.update()
    first = reporter._process
    assert first
    reporter.update()
    assert reporter._process in (first, None), "the first one still runs, or has ended"
    before = progress.read()
    reporter.finish(300)
    assert progress.read().moves > before.moves, "the watchdog does not end a run that waits for its report"
    assert progress.read().phases == before.phases
    written = (run / "report.html").stat().st_ino
    reporter.update()  # too soon
    assert children(run) == 0
    reporter.finish(300)
    assert (run / "report.html").stat().st_ino != written, "the end of the run does not wait for its turn"
    assert capsys.readouterr().out == ""

    monkeypatch.setattr(background, "REST", 0)
    slow = Reporter(run, wanted=True)
    slow.update()
    slow.finish(0)
    assert capsys.readouterr().out == f"{run}/report.html is not up to date: it took more than 0 s\n"
    assert children(run) == 0
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    reporter.finish(300)
    out = capsys.readouterr().out
    assert out.startswith(f"{run}/report.html is not written: {run}/report.html: a folder; give a file")
    assert out.count("\n") == 1
    assert [path.name for path in run.glob("*.partial")] == []

    Reporter(run, wanted=False).update()
    assert children(run) == 0


def children(run: Path) -> int:
    """Return the number of processes that write the report of this run. Other tests may have left processes."""
    found = 0
    for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text().split():
        with suppress(OSError):  # it may end meanwhile
            found += os.fsencode(run) in Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
    return found
