"""The report of runs, in Debian's headless chromium: what it shows, how fast it opens, and that it loads nothing."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from reports import damage, needs_library, sample, write_lines, write_run

from rlhf.__main__ import main

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
needs_browser = pytest.mark.skipif(
    not shutil.which("chromium"), reason="chromium is not installed (apt install chromium)"
)


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


def middle(browser: Browser, place: str) -> tuple[float, float]:
    """Return the middle of an element in pixels of the window."""
    box = browser.run(
        f"JSON.parse(JSON.stringify(document.querySelector({json.dumps(place)}).getBoundingClientRect()))"
    )
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


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


@pytest.fixture
def two(tmp_path: Path, browser: Browser) -> Path:
    """Write and open the report of two runs with samples. Return the page."""
    folders = [write_run(tmp_path / name, 60, "grpo", f"optim.lr={lr}") for name, lr in (("one", 0.5), ("two", 0.25))]
    for folder in folders:
        group = [sample(4, 7, f"answer {i}", reward=float(i), set="math") for i in range(3)]
        turns = [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "42"}]
        write_lines(folder / "samples" / "step_000004.jsonl", [*group, sample(4, 8, "", reward=None, turns=turns)])
    file = tmp_path / "both.html"
    assert main(["report", *map(str, folders), "--out", str(file)]) == 0
    browser.show(1400, 1000)
    opened(browser, file)
    return file


@needs_library
@needs_browser
def test_curves(two: Path, browser: Browser) -> None:
    """They are in topics. A drag zooms all of them, and a button shows all steps again."""
    assert "60 of 60" in text(browser, "#summary")
    assert browser.run("[...document.querySelectorAll('#topics h2')].map(h => h.textContent)")[0] == "Reward and KL"
    assert "eval_math_reward" in text(browser, "#topics")
    assert "odd/metric" in text(browser, "#topics details")
    x, y = middle(browser, ".plot")
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
    assert text(browser, "#controls output") == "0.90"
    assert browser.run("smoothed([1, null, 3], 0.5)") == [1, None, pytest.approx(1.75 / 0.75, 1e-5)]
    browser.run("const steps = [...Array(5000).keys()], values = steps.map((step) => step === 777 ? 9 : step % 2)")
    kept = browser.run("decimated(steps, values, 100, 4000, 50)")
    assert 9 in kept["y"], "a single peak is kept"
    assert kept["x"] == sorted(kept["x"])
    assert len(kept["x"]) <= 103
    sound(browser, two)


@needs_library
@needs_browser
def test_other_tabs(two: Path, browser: Browser) -> None:
    """Times, memory, keys that differ, and samples with their group. The arrow keys move between tabs and samples."""
    browser.run("document.getElementById('tab-curves').focus()")
    browser.press("ArrowRight")
    resources = text(browser, "#resources")
    assert "10.50" in resources, "predicted GiB of the phase rollout"
    assert "11.00" in resources, "measured GiB of the phase rollout"
    assert "-4.5 %" in resources
    assert "used 90.00 GiB of host memory at the fullest step (mean over ranks)" in resources
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
    assert all(word in shown[0] for word in ("answer 2", "style", "15"))
    assert "math" in text(browser, ".facts")
    for _ in range(2):
        browser.press("ArrowDown")
    assert browser.run("document.querySelectorAll('.siblings .answer').length") == 1
    assert "failed" in text(browser, ".siblings")
    assert browser.run("[...document.querySelector('select[aria-label=set]').options].map(o => o.value)") == [
        "",
        "math",
    ]
    browser.run(
        "const set = document.querySelector('select[aria-label=set]'); set.value = 'math'; "
        "set.dispatchEvent(new Event('change'))"
    )
    until(browser, "/^6 of 8/.test(document.querySelector('#samples .bar .hint').textContent)")
    sound(browser, two)


@needs_library
@needs_browser
def test_the_steps_of_epochs_are_not_known(tmp_path: Path, browser: Browser) -> None:
    """The key steps of the configuration does not count then."""
    file = tmp_path / "report.html"
    assert main(["report", str(write_run(tmp_path / "run", 60, "grpo", "epochs=2")), "--out", str(file)]) == 0
    opened(browser, file)
    assert "60 of" not in text(browser, "#summary")


@needs_library
@needs_browser
def test_light_and_dark_and_narrow(two: Path, browser: Browser) -> None:
    """The colours are those that the browser asks for, until the button is used. 700 pixels are enough."""
    backs = []
    for dark in (True, False):
        browser.show(700, 900, dark)
        until(browser, f"document.documentElement.dataset.theme === '{'dark' if dark else 'light'}'")
        backs.append(browser.run("getComputedStyle(document.body).backgroundColor"))
        for tab in ("curves", "resources", "configuration", "samples"):
            browser.run(f"document.getElementById('tab-{tab}').click()")
            assert browser.run("document.scrollingElement.scrollWidth") <= 700, tab
            if tab == "curves":
                width = browser.run("document.querySelector('.summary .run b').offsetWidth")
                assert width > 60, "names of runs are not broken into letters"
    assert len(set(backs)) == 2
    browser.run("document.getElementById('tab-curves').click()")
    for _ in range(4):  # faster than charts are drawn
        browser.run("document.getElementById('theme').click()")
    counts = "[...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('.bk-Figure').length)"
    until(browser, f"{counts}[0] === 1 && Math.max(...{counts}) === 1")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    sound(browser, two)


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
    x, y = middle(browser, ".plot")
    for at in range(5):  # the tooltip has the name of the run
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + 20 * at, y=y)
    for tab in ("resources", "configuration", "samples"):
        browser.run(f"document.getElementById('tab-{tab}').click()")
    until(browser, "document.body.dataset.samples")
    for _ in HOSTILE:
        browser.press("ArrowDown")
        browser.run("document.getElementById('list').focus()")
    assert "␀" in browser.run("document.getElementById('samples').textContent")
    sound(browser, file)
