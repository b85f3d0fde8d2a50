"""Responses are used as soon as they are complete: rewards during generation, early ends, progress, kept samples."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from meshes import ALONE
from rows import write

from rlhf import configuration
from rlhf.config import Reward
from rlhf.contracts import Completion, Request, Sample, Text, Verdict
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.output import Progress
from rlhf.recorder import Recorder
from rlhf.rewards import Rewards
from rlhf.rollout.grader import Rule
from rlhf.rollout.source import EngineSource
from rlhf.rollout.stops import Stops

SLOW = """
import time

def slow(prompt, response, record):
    time.sleep(0.5)
    return float(len(response))
"""


class SlowEngine:
    """Completes one request in every `pause` seconds."""

    version = 0
    withdraw = list

    def __init__(self, pause: float):
        self.pause = pause

    def stream(self, requests: list[Request]) -> Iterator[list[tuple[int, Completion]]]:
        for request in requests:
            for _ in range(5):
                time.sleep(self.pause / 5)
                yield []
            yield [(request.key, Completion([5 + request.key], [-1.0], "stop"))]


def test_rewards_are_given_beside_generation(tmp_path: Path, llama2: Tokenizer) -> None:
    """12 responses need 0.5 s each in two processes, and one is complete every 0.3 s.

    After the last token the step waits only for the rest of the queue.
    """
    (tmp_path / "slow.py").write_text(SLOW)
    data = write(tmp_path / "train.jsonl", *({"prompt": f"What is {n}?"} for n in range(12)))
    config = configuration.load(
        "grpo", ["batch.prompts=6", "rollout.group=2", "data.max_tokens=64", "rollout.max_tokens=4"]
    )
    records = Records.load(data, "prompts", llama2, config.data, max_prompt=60)
    with Rewards([f"{tmp_path}/slow.py:slow"], Reward(timeout=10, workers=2)) as rewards:
        source = EngineSource(config, ALONE, SlowEngine(0.3), llama2, records, Rule(rewards, ALONE), 64)  # type: ignore[arg-type]
        source.take(0)  # starts the processes
        start = time.perf_counter()
        samples, sums = source.take(1)
        seconds = time.perf_counter() - start
    assert [s.reward for s in samples] == [float(len(s.text.response)) for s in samples]
    waited, _ = sums["time/reward"]
    assert waited < 2, "two rewards may be under way when the last response comes, and its own is still to be given"
    assert seconds < 12 * 0.3 + 2.4, "6 x 0.5 s of rewards would come behind 3.6 s of generation"


def test_scores_are_taken_when_they_are_there(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with Rewards([f"{tmp_path}/slow.py:slow"], Reward(timeout=10, workers=1)) as rewards:
        rewards.score([("", "a", {})])
        rewards.give(7, ("", "abc", {}))
        assert rewards.take() == {}
        deadline = time.monotonic() + 10
        while not (found := rewards.take()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {key: score.value for key, score in found.items()} == {7: 3.0}
        rewards.give(1, ("", "a", {}))
        rewards.give(2, ("", "ab", {}))
        assert {key: score.value for key, score in rewards.take(block=True).items()} == {1: 1.0, 2: 2.0}
        assert rewards.take(block=True) == {}


@pytest.mark.parametrize("stop", ["ef g", "g", "öß", "<|im_end|>\n"])
def test_a_stop_string_is_seen_when_its_last_token_comes(qwen: Tokenizer, stop: str) -> None:
    """A check after each token ends a response at the same place as a cut of the whole response."""
    stops = Stops(qwen, [stop])
    tokens = qwen.encode(f"abc d öä {stop[:-1]} and then ef {stop} and more {stop}", control=True)
    end = next(n for n in range(1, len(tokens) + 1) if stop in qwen.decode(tokens[:n], skip_special=False))
    assert [stops.ends(tokens[:n]) for n in range(1, end + 1)] == [False] * (end - 1) + [True]
    assert stops.end(tokens[:end]) == end
    if stops.watched:
        for held in range(end):  # a withdrawn response continues with its own tokens
            asked = stops.after(tokens[:held])
            assert [asked(tokens[held:n]) for n in range(held + 1, end + 1)] == [False] * (end - held - 1) + [True]


def test_a_stop_string_behind_4096_tokens_is_found_quickly(qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bisection decodes the response about log2(4096) times, and the check after each token decodes a few tokens."""
    stops, decode, sizes = Stops(qwen, ["STOP"]), qwen.decode, list[int]()
    monkeypatch.setattr(
        qwen, "decode", lambda ids, skip_special=True: sizes.append(len(ids)) or decode(ids, skip_special)
    )
    tokens = [*qwen.encode("a b " * 2048, control=True)[:4096], *qwen.encode("STOP", continues=True)]
    assert stops.end(tokens) == len(tokens)
    assert len(sizes) <= 20
    sizes.clear()
    assert [n for n in range(1, len(tokens) + 1) if stops.ends(tokens[:n])] == [len(tokens)]
    assert max(sizes) <= stops.reach


def test_weights_that_fit_no_part_are_noted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "judge.py").write_text("def parts(*_):\n    return {'style': 0.5, 'right': True}\n")
    with Rewards([f"{tmp_path}/judge.py:parts"], Reward(weights={"right": 2, "stile": 1})) as function:
        grader = Rule(function, ALONE)
        for _ in range(2):
            sample = sampled(1.0)
            grader.give(sample)
            grader.collect(block=True)
            assert sample.verdict == Verdict(rule=3.5, parts={"style": 0.5, "right": 1.0})
    said = capsys.readouterr().out
    source = f"{tmp_path}/judge.py:parts"
    assert said == f"note: reward.weights.stile fits no part of the first rewards of {source}, which are right, style\n"


def test_progress_is_one_line_of_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 0.1, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with Progress("rollout", "responses", 4, shown=True) as progress:
        progress.add(1, 10)
        progress.add(1, 30)
    shown = capsys.readouterr().out
    assert shown == "\r\033[Krollout: 2 of 4 responses, 20 tokens/s, about 2 s to go\r\033[K"


def test_progress_is_silent_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("rollout", "responses", 4, shown=True) as progress:
        progress.said -= 10
        progress.add(1, 10)
    assert capsys.readouterr().out == ""


def sampled(reward: float, failed: bool = False, name: str = "math", **more: object) -> Sample:
    tokens, mask = np.array([1, 2, 3, 4], np.int32), np.array([False, True, True])
    text, verdict = (
        Text(3, {"answer": "4"}, "2 + 2?", "\ud800 4", set=name),
        Verdict(rule=reward, score=None, parts={"length": 2 * reward}, failed=failed),
    )
    version = np.array([-1, 5, 6], np.int32)
    return Sample(tokens, mask, group=1, reward=reward, text=text, verdict=verdict, version=version, **more)  # type: ignore[arg-type]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_was_sampled_is_kept(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, start=0)
    recorder.keep("train", [sampled(0.5, advantages=np.array([0, 2, 4], np.float32)), sampled(1.0)])
    recorder.keep("evaluate", [sampled(3.0, name="dev"), sampled(0.0, failed=True, name="dev")])
    recorder.write(7)
    recorder.finish()
    [file] = (tmp_path / "samples").iterdir()
    first, *others = lines(file)
    assert file.name == "step_000007.jsonl"
    assert first == {
        "step": 7,
        "use": "train",
        "set": "math",
        "row": 3,
        "group": 1,
        "prompt": "2 + 2?",
        "response": "\ud800 4",
        "turns": [{"role": "assistant", "content": "\ud800 4"}],
        "reward": 0.5,
        "rule": 0.5,
        "score": None,
        "parts": {"length": 1.0},
        "failed": False,
        "advantage": 3.0,
        "finish": "stop",
        "versions": [5, 6],
        "prompt_tokens": [1, 2],
        "response_tokens": [3, 4],
    }
    assert [(line["use"], line["set"], line["reward"], line["advantage"]) for line in others] == [
        ("train", "math", 1.0, None),
        ("evaluate", "dev", 3.0, None),
        ("evaluate", "dev", None, None),
    ]


@pytest.mark.parametrize(("start", "left"), [(0, []), (2, [1, 2]), (-1, [1, 2, 3])])
def test_a_run_writes_no_step_twice(tmp_path: Path, start: int, left: list[int]) -> None:
    """A resumed run removes the files of steps that it will do again, and a new run removes all.

    Mode evaluate (-1) removes nothing.
    """
    recorder = Recorder(tmp_path, start=0)
    for step in (1, 2, 3):
        recorder.keep("train", [sampled(float(step))] * 3)
        recorder.write(step)
    recorder.finish()
    assert len(lines(tmp_path / "samples/step_000003.jsonl")) == 3
    (tmp_path / "samples/step_best.jsonl").touch()  # not written by a run
    Recorder(tmp_path, start=start)
    kept = [*(f"step_{step:06}.jsonl" for step in left), "step_best.jsonl"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == kept


def test_a_reward_function_is_added_to_what_the_environment_gives():
    def sample(response: str, failed: bool) -> Sample:
        text, verdict = Text(0, {"answer": "4"}, "2 + 2?", response), Verdict(rule=0.25, failed=failed)
        return Sample(np.arange(3), np.ones(2, bool), 0, reward=0.25, text=text, verdict=verdict)

    samples = [sample("#### 4", False), sample("#### 5", False), sample("#### 4", True)]
    with Rewards(["math"], Reward(timeout=1, workers=1)) as function:
        grader = Rule(function, ALONE)  # type: ignore[arg-type]
        for s in samples:
            grader.give(s)
        grader.collect(block=True)
    assert [(s.reward, s.verdict.failed) for s in samples] == [(1.25, False), (0.25, False), (0.25, True)]
    assert samples[0].verdict == Verdict(rule=1.25, parts={"math": 1.0})
    assert samples[2].verdict.parts == {}, "a response that has failed is not graded"
