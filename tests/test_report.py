"""The report of runs, in Debian's headless chromium: what it shows, how fast it opens, and that it loads nothing."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
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
WORDS = "the a shop carpet lamp chair ladder arrives on Monday please wait and thank you for asking x = 12".split()
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
needs_browser = pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed (apt install chromium)")


def sample(step: int, group: int, response: str, reward: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """Return a line of a sample file, as rlhf.recorder writes it."""
    line = {"step": step, "use": "train", "row": group, "group": group, "prompt": f"prompt {group}", "response": response}
    line |= {"turns": [{"role": "assistant", "content": response}], "reward": reward, "rule": reward, "score": 0.0}
    line |= {"parts": {"style": 0.5}, "failed": reward is None, "advantage": 0.1, "finish": "stop", "versions": [step]}
    return line | {"prompt_tokens": [1] * 50, "response_tokens": [1] * 150} | more


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
    (out / "ledger.json").write_text('{"rollout": {"context": 2.5, "engine cache": 8.0}, "learn/policy": {"work": 3.0}}')
    return out


def large(out: Path) -> Path:
    """Write a run of STEPS steps and KEPT samples of about 1,000 characters."""
    draw = random.Random(1)
    write_run(out, STEPS)
    each = 4 * KEPT // STEPS
    for step in range(4, STEPS + 1, 4):
        texts = [" ".join(draw.choices(WORDS, k=180)) for _ in range(each)]
        lines = [sample(step, step + i // 4, text, draw.random(), prompt=f"{step} {i // 4}") for i, text in enumerate(texts)]
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
    return browser.run(f"document.querySelector({json.dumps(place)}).innerText")


def sound(browser: Browser, file: Path) -> None:
    """Assert that the page has reported no error, has requested only itself, and has run no foreign script."""
    assert browser.messages == []
    assert [address.partition("#")[0] for address in browser.requests] == [file.as_uri()]
    assert browser.run("window.broken") is None


@needs_library
@needs_browser
def test_a_large_run_opens_quickly(tmp_path: Path, browser: Browser) -> None:
    """5,000 steps and 20,000 samples open within two seconds, in a file of less than 20 MB, and the search answers."""
    out = large(tmp_path / "large")
    began = time.process_time()
    assert main(["report", str(out)]) == 0
    print(f"written in {time.process_time() - began:.1f} s of processor time")
    file = out / "report.html"
    assert file.stat().st_size < 20_000_000
    browser.show(1400, 1000)
    taken = [opened(browser, file) for _ in range(2)]
    print("opened in", *(f"{seconds:.2f}" for seconds in taken), f"s; {file.stat().st_size / 1e6:.1f} MB")
    sound(browser, file)
    browser.run("document.getElementById('tab-samples').click()")
    began = time.perf_counter()
    assert until(browser, "Number(document.body.dataset.samples)") == KEPT
    print(f"samples in {time.perf_counter() - began:.2f} s")
