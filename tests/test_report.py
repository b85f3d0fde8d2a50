"""The report of runs, in Debian's headless chromium: what it shows, how fast it opens, and that it loads nothing."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser

from rlhf import configuration
from rlhf.__main__ import main
from rlhf.report import background, page, runs, samples
from rlhf.report.background import Reporter

STEPS, KEPT = 5000, 20_000  # of the large run
WORDS = ("the", "shop", "carpet", "lamp", "arrives", "on", "Monday", "please", "wait", "and", "thank", "you", "x = 12")
HOSTILE = [
    "</script><script>window.broken=1</script>",
    "<img src=x onerror='window.broken=1'>",
    "<!--<script>",
    "line\u2028and\u2029paragraph",
    "\u202eright to left\u202c שלום عربي",
    "NUL \0 and bell \a",
    "long" * 3000,
    "{{scripts}} ${window.broken=1} `",
    "\ud800 half",
    "",
]
needs_library = pytest.mark.skipif(page.library() is None, reason="the package bokeh is not installed")
needs_browser = pytest.mark.skipif(
    not shutil.which("chromium"), reason="chromium is not installed (apt install chromium)"
)


def sample(step: int, group: int, response: str, reward: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """Return a line of a sample file, as rlhf.recorder writes it."""
    line = {
        "step": step,
        "use": "train",
        "row": group,
        "group": group,
        "prompt": f"prompt {group}",
        "response": response,
    }
    line |= {"turns": [{"role": "assistant", "content": response}], "reward": reward, "rule": reward, "score": 0.0}
    line |= {"parts": {"style": 0.5}, "failed": reward is None, "advantage": 0.1, "finish": "stop", "versions": [step]}
    return line | {"prompt_tokens": [1] * 5, "response_tokens": [1] * 15} | more


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(out: Path, steps: int = 12, mode: str = "grpo", *overrides: str) -> Path:
    """Write the files of a run of some steps, with an evaluation every 5 steps, without training."""
    names = ("reward", "loss", "kl", "entropy", "response_tokens", "mismatch", "grad_norm", "odd/metric")
    rows: list[dict[str, Any]] = [{"step": 0, "eval_reward": 0.1, "time/step": 0.5}]
    for step in range(1, steps + 1):
        row = {name: math.sin(step / 50 + i) + random.random() / 5 for i, name in enumerate(names)}
        row |= {"time/rollout": 1.0, "time/learn": 2.0, "time/step": 3.5, "memory/rollout": 10 + step / steps}
        row |= {f"extra_{i}": random.random() for i in range(20)} | ({"eval_math_reward": 0.2} if step % 5 == 0 else {})
        rows.append({"step": step, **row})
    write_lines(out / "metrics.jsonl", rows)
    toml = configuration.to_toml(configuration.load(mode, [f"out={out}", f"steps={steps}", *overrides]))
    (out / "config.toml").write_text(f"# ./launch.sh {mode} {out}/config.toml\n{toml}")
    (out / "ledger.json").write_text(
        '{"rollout": {"context": 2.5, "engine cache": 8.0}, "learn/policy": {"work": 3.0}}'
    )
    return out


def large(out: Path) -> Path:
    """Write a run of STEPS steps and KEPT samples of about 1,000 characters."""
    draw = random.Random(1)
    write_run(out, STEPS)
    each = 4 * KEPT // STEPS
    for step in range(4, STEPS + 1, 4):
        texts = [" ".join(draw.choices(WORDS, k=180)) for _ in range(each)]
        lines = [
            sample(step, step + i // 4, text, draw.random(), prompt=f"{step} {i // 4}") for i, text in enumerate(texts)
        ]
        write_lines(out / "samples" / f"step_{step:06}.jsonl", lines)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def opened(browser: Browser, file: Path, tab: str = "curves") -> float:
    """Open a report, wait until its first charts are drawn, and return the seconds that this took."""
    began = time.perf_counter()
    browser.open(file, f"#{tab}")
    until(browser, "document.body.dataset.ready")
    return time.perf_counter() - began


def until(browser: Browser, condition: str) -> Any:
    """Return the value of an expression as soon as it is true."""
    end = time.monotonic() + 20
    while not (value := browser.run(condition)):
        assert time.monotonic() < end, f"{condition}: {browser.messages}"
        time.sleep(0.02)
    return value


def text(browser: Browser, place: str) -> str:
    return browser.run(f"document.querySelector({json.dumps(place)}).textContent")


def sound(browser: Browser, file: Path) -> None:
    """Assert that the page has reported no error, has requested only itself, and has run no foreign script."""
    assert browser.messages == []
    assert [address.partition("#")[0] for address in browser.requests] == [file.as_uri()]
    assert browser.run("window.broken") is None


@needs_library
@needs_browser
def test_a_large_run_opens_quickly(tmp_path: Path, browser: Browser) -> None:
    """5,000 steps and 20,000 samples open within two seconds, in a file of less than 20 MB, and the search answers.

    The seconds are those of the page's main thread, because other programs use the cores of the test, too.
    """
    out = large(tmp_path / "large")
    assert main(["report", str(out)]) == 0
    file = out / "report.html"
    assert file.stat().st_size < 20_000_000
    browser.show(1400, 1000)
    before, wall = browser.spent(), opened(browser, file)
    taken = browser.spent() - before
    print(f"opened in {wall:.2f} s, {taken:.2f} s of processor time, {file.stat().st_size / 1e6:.1f} MB")
    assert taken < 2
    assert text(browser, "#notes") == "", "nothing is left out"
    assert browser.run("document.querySelectorAll('#topics figure canvas, #topics figure > div > div').length") > 3
    browser.run("document.getElementById('tab-samples').click()")
    assert until(browser, "Number(document.body.dataset.samples)") == KEPT
    assert browser.run("document.querySelectorAll('.row').length") < 50, "only the rows in view are in the page"
    ticks = browser.run(
        "new Promise(found => { let ticks = 0; const clock = setInterval(() => { ticks++; if (/^4 of 20,000/.test("
        "document.querySelector('#samples .bar .hint').textContent)) { clearInterval(clock); found(ticks) } }); "
        "const box = document.getElementById('search'); box.value = '4996 1'; box.dispatchEvent(new Event('input')) })"
    )
    assert ticks > 1, "the page works while it searches"
    assert browser.run("document.querySelectorAll('.siblings article').length") == 4
    sound(browser, file)


@needs_library
@needs_browser
def test_what_the_tabs_show(tmp_path: Path, browser: Browser) -> None:
    """Two runs: curves, zoom, smoothing, times, memory, the keys that differ, samples, both themes, and 700 pixels."""
    folders = [write_run(tmp_path / name, 60, "grpo", f"optim.lr={lr}") for name, lr in (("one", 0.5), ("two", 0.25))]
    for folder in folders:
        group = [sample(4, 7, f"answer {i}", reward=float(i), set="math") for i in range(3)]
        turns = [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "42"}]
        write_lines(folder / "samples" / "step_000004.jsonl", [*group, sample(4, 8, "", reward=None, turns=turns)])
    file = tmp_path / "both.html"
    assert main(["report", *map(str, folders), "--out", str(file)]) == 0
    browser.show(1400, 1000)
    opened(browser, file)
    assert "60 of 60" in text(browser, "#summary")
    assert browser.run("[...document.querySelectorAll('#topics h2')].map(h => h.textContent)")[0] == "Reward and KL"
    assert "eval_math_reward" in text(browser, "#topics")
    assert "odd/metric" in browser.run("document.querySelector('#topics details').textContent")

    box = browser.run("JSON.parse(JSON.stringify(document.querySelector('.plot').getBoundingClientRect()))")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for kind, at, pressed in (("mousePressed", x, 1), ("mouseMoved", x + 90, 1), ("mouseReleased", x + 90, 0)):
        mouse = {"type": kind, "x": at, "y": y, "button": "left", "buttons": pressed, "clickCount": 1}
        browser.call("Input.dispatchMouseEvent", **mouse)
    assert 20 < until(browser, "Number(document.getElementById('from').value)") < 40
    assert browser.run("Number(document.getElementById('to').value)") < 60
    browser.run("document.getElementById('reset').click()")
    until(browser, "document.getElementById('from').value === '0'")
    browser.run(
        "const slider = document.getElementById('smoothing'); slider.value = 0.9; "
        "slider.dispatchEvent(new Event('input'))"
    )
    assert browser.run("slider.nextElementSibling.textContent") == "0.90"

    browser.run("document.getElementById('tab-curves').focus()")
    browser.press("ArrowRight")
    resources = text(browser, "#resources")
    assert "10.50" in resources, "predicted GiB of the phase rollout"
    assert "11.00" in resources, "measured GiB of the phase rollout"
    assert "-4.5 %" in resources
    browser.press("ArrowRight")
    keys = browser.run("[...document.querySelectorAll('#configuration tbody tr')].map(row => row.cells[0].textContent)")
    assert keys == ["out", "optim.lr"]
    browser.run("document.getElementById('only').click()")
    assert "rollout.group" in text(browser, "#configuration")

    browser.press("ArrowRight")
    assert until(browser, "Number(document.body.dataset.samples)") == 8
    browser.run("document.getElementById('list').focus()")
    browser.press("ArrowDown")
    assert browser.run("document.querySelector('.row[aria-selected=true]').id") == "row-1"
    shown = browser.run("[...document.querySelectorAll('.siblings article')].map(card => card.innerText)")
    assert [card.split()[0] for card in shown] == ["2", "1", "0"], "the siblings, highest reward first"
    assert all(word in shown[0] for word in ("answer 2", "style", "math", "15"))
    for _ in range(2):
        browser.press("ArrowDown")
    assert browser.run("document.querySelectorAll('.siblings .answer').length") == 1
    assert "failed" in text(browser, ".siblings")

    backs = []
    for dark in (True, False):
        browser.show(700, 900, dark)
        until(browser, f"document.documentElement.dataset.theme === '{'dark' if dark else 'light'}'")
        backs.append(browser.run("getComputedStyle(document.body).backgroundColor"))
        for tab in ("curves", "resources", "configuration", "samples"):
            browser.run(f"document.getElementById('tab-{tab}').click()")
            assert browser.run("document.scrollingElement.scrollWidth") <= 700, tab
    assert len(set(backs)) == 2
    browser.run("document.getElementById('theme').click()")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    sound(browser, file)


@needs_library
@needs_browser
def test_hostile_and_damaged_files(tmp_path: Path, browser: Browser) -> None:
    """Texts of a run never become HTML or scripts. Missing and damaged files leave the rest, with a note."""
    hostile = write_run(tmp_path / "<img src=x onerror=window.broken=1>")
    lines = [
        sample(3, i, words, prompt=words, finish=words, parts={words: 1.0}, more=words)
        for i, words in enumerate(HOSTILE)
    ]
    write_lines(hostile / "samples" / "step_000003.jsonl", lines)
    with (hostile / "metrics.jsonl").open("a") as file:
        for step, words in enumerate(HOSTILE, 20):
            file.write(json.dumps({"step": step, words: 1.0, "loss": words}) + "\n")
    damaged, empty, evaluated = tmp_path / "damaged", tmp_path / "empty", tmp_path / "evaluated"
    empty.mkdir()
    damage(damaged)
    write_lines(evaluated / "evaluate.jsonl", [{"step": 0, "eval_reward": 0.75}])
    write_lines(evaluated / "samples" / "evaluate.jsonl", [sample(0, 1, "found", use="evaluate")])
    file = tmp_path / "all.html"
    folders = [hostile, damaged, empty, evaluated]
    assert main(["report", *map(str, folders), "--out", str(file)]) == 0
    browser.show(1400, 1000)
    opened(browser, file)
    notes = text(browser, "#notes")
    assert "damaged: metrics.jsonl: damaged lines are left out: 1, 3, 5, 11" in notes
    assert "damaged: metrics.jsonl: 2 lines of steps that ran again are left out" in notes
    assert "damaged: config.toml is damaged" in notes
    assert "empty: metrics.jsonl is missing" in notes
    assert "0.7500" in text(browser, "#summary")
    box = browser.run("JSON.parse(JSON.stringify(document.querySelector('.plot').getBoundingClientRect()))")
    for at in range(5):  # the tooltip has the name of the run
        place = {"x": box["x"] + 60 + 40 * at, "y": box["y"] + 60}
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    for tab in ("resources", "configuration", "samples"):
        browser.run(f"document.getElementById('tab-{tab}').click()")
    until(browser, "document.body.dataset.samples")
    for _ in HOSTILE:
        browser.press("ArrowDown")
        browser.run("document.getElementById('list').focus()")
    assert "␀" in browser.run("document.getElementById('samples').textContent")
    sound(browser, file)


def damage(out: Path) -> None:
    """Write a run whose files are damaged. It was killed after step 6, and went on after step 4."""
    write_run(out)
    rows = [json.dumps({"step": step, "loss": float(step)}) for step in (1, 2, 3, 4, 5, 6, 5, 7)]
    odd = [
        "\0\0\0\0",
        rows[0],
        "[1]",
        rows[1],
        "{" * 2000,
        *rows[2:],
        '{"step": 8, "loss": NaN, "kl": 1e999, "x": true}',
    ]
    (out / "metrics.jsonl").write_text(
        "\n".join(odd[:7] + odd[7:10] + ['{"step": "x"}'] + odd[10:]) + '\n{"step": 9, "lo'
    )
    (out / "config.toml").write_text("# ./launch.sh grpo x\n[cut")
    write_lines(out / "samples" / "step_000002.jsonl", [sample(2, 1, "kept"), {"step": [], "turns": 3, "prompt": 7}])
    with (out / "samples" / "step_000002.jsonl").open("a") as file:
        file.write('{"step": 2, "prom')


def test_damaged_files_leave_the_rest(tmp_path: Path) -> None:
    damage(tmp_path / "run")
    run = runs.read(tmp_path / "run")
    assert run.steps == [1, 2, 3, 4, 5, 7, 8]
    assert run.metrics == {"loss": [1, 2, 3, 4, 5, 7, None]}
    found = samples.read(run, 10)
    assert [row["turns"] for row in found] == [[["assistant", ""]], [["assistant", "kept"]]]
    assert any(remark == "samples: damaged lines are left out: 1" for remark in run.remarks)
    assert runs.read(tmp_path / "nowhere").steps == []


def test_what_does_not_fit_is_left_out_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many steps every n-th one is shown, and all evaluations. Of many sample files, those that divide the run."""
    monkeypatch.setattr(runs, "STEPS", 10)
    run = runs.read(write_run(tmp_path / "run", 40))
    assert run.steps == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert any("9 of 41 steps" in remark for remark in run.remarks)
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
    monkeypatch.setattr(page, "library", lambda: None)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "rlhf: the report needs the package bokeh: install it (pip install bokeh)\n"
    reporter = Reporter(tmp_path, wanted=True)
    reporter.update()
    reporter.finish(10)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "bokeh is missing" in out
    assert not list(tmp_path.iterdir())


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
    reporter.update()
    assert children() == 1
    reporter.finish(60)
    written = (run / "report.html").stat().st_ino
    reporter.update()  # too soon
    assert children() == 0
    reporter.finish(60)
    assert (run / "report.html").stat().st_ino != written, "the end of the run does not wait for its turn"
    assert capsys.readouterr().out == ""

    monkeypatch.setattr(background, "REST", 0)
    slow = Reporter(run, wanted=True)
    slow.update()
    slow.finish(0)
    assert capsys.readouterr().out == f"{run}/report.html is not up to date: it took more than 0 s\n"
    assert children() == 0
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    reporter.finish(60)
    out = capsys.readouterr().out
    assert out.startswith(f"{run}/report.html is not written: {run}/report.html.")
    assert out.count("\n") == 1
    assert [path.name for path in run.glob("*.partial")] == []

    Reporter(run, wanted=False).update()
    assert children() == 0


def children() -> int:
    """Return the number of processes that this process has started and not waited for, except for the browser's."""
    listed = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()
    return sum(b"rlhf.report" in Path("/proc", pid, "cmdline").read_bytes() for pid in listed)
