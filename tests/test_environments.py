"""Environments of the user: their mistakes, in real processes, and the responses with their answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from graders import FREE
from meshes import ALONE
from rows import write

from rlhf import configuration, rewards
from rlhf.config import Reward
from rlhf.contracts import Completion, Request, Sample
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import RewardError, UserError
from rlhf.rewards import Environments, Reply
from rlhf.rollout.source import EngineSource

ENVIRONMENT = """
import os, re

asked = []

class Counting:
    \"\"\"Counts its turns, and does what they say.\"\"\"

    def reset(self, record):
        self.start, self.turns = record.get("start", 0), 0
        record["start"] = "changed here alone"
        if record.get("silent"):
            return None
        return [{"role": "user", "content": f"from {self.start}"}]

    def step(self, text):
        self.turns += 1
        if text == "hang":
            re.match("(a+)+$", "a" * 60 + "b")
        if text == "raise":
            raise ZeroDivisionError("on purpose")
        if text == "print":
            print("x" * 100_000)
        if text == "kill":
            os._exit(3)
        if text == "forgetful":
            asked.append(text)
            return ([{"role": "user", "content": "go on"}] if len(asked) == 1 else None), 0.0
        if text == "once" and text not in asked:
            asked.append(text)
            raise ValueError("the first time")
        if text == "end":
            return None, 1
        said = {"role": "user", "content": f"{self.start + self.turns} in {os.getpid()}"}
        wrong = {
            "text": "hello", "pair": ("hello", 1.0), "empty": ([], 1.0), "nan": ([said], float("nan")),
            "words": ([{"role": "user"}], 0.0), "assistant": ([{"role": "assistant", "content": "I"}], 0.0),
        }
        return wrong.get(text, ([said], 0.5))

class Stepless:
    def reset(self, record):
        return None
"""


@pytest.fixture
def counting(tmp_path) -> str:
    (tmp_path / "counting.py").write_text(ENVIRONMENT)
    return f"{tmp_path}/counting.py:Counting"


def ask(environments: Environments, *turns: rewards.environments.Turn) -> list[Reply]:
    for i, turn in enumerate(turns):
        environments.give(i, turn)
    found = environments.take(block=True)
    return [found[i] for i in range(len(turns))]


def said(reply: Reply) -> tuple[int, int]:
    """Return the count, and the process id."""
    assert reply.messages
    count, _, process = reply.messages[0]["content"].split()
    return int(count), int(process)


def test_a_dialogue_stays_in_its_process(counting):
    with Environments(counting, Reward(timeout=5, workers=2)) as environments:
        assert ask(environments, ("a", {"start": 3}, []), ("b", {"silent": True}, [])) == [
            Reply([{"role": "user", "content": "from 3"}], 0.0, False),
            Reply(None, 0.0, False),
        ]
        keys = list(range(6))
        first = [said(reply) for reply in ask(environments, *((key, {"start": key}, ["x"]) for key in keys))]
        second = [
            said(reply) for reply in ask(environments, *((key, {"start": key}, ["x", "y"]) for key in reversed(keys)))
        ][::-1]
        assert [count for count, _ in first] == [key + 1 for key in keys]
        assert second == [(count + 1, process) for count, process in first]


def test_a_dialogue_is_told_again_after_its_process_has_ended(counting):
    """A new process gets the earlier turns again. The same happens if the key was used for another dialogue."""
    with Environments(counting, Reward(timeout=1, workers=1)) as environments:
        (before,) = ask(environments, ("a", {"start": 3}, ["x"]))
        assert ask(environments, ("b", {}, ["hang"])) == [Reply(None, 0.0, True)]
        (again,) = ask(environments, ("a", {"start": 3}, ["x", "y"]))
        assert said(again)[0] == 5
        assert said(again)[1] != said(before)[1]
        assert said(ask(environments, ("a", {"start": 3}, ["x", "z", "y"]))[0])[0] == 6, "it has been told other texts"
        assert said(ask(environments, ("a", {"start": 7}, ["x", "z", "y", "z"]))[0])[0] == 11, "and another record"


def test_what_a_step_may_not_do_ends_the_dialogue_as_failed(counting, capfd):
    wrong = {
        "raise": "on purpose",
        "hang": "time limit",
        "kill": "exit code 3",
        "text": "(messages or None, reward)",
        "pair": "list of messages or None",
        "empty": "list of messages or None",
        "nan": "finite number",
        "words": "'role' and 'content'",
        "assistant": "assistant",
    }
    for text, says in wrong.items():
        with Environments(counting, Reward(timeout=0.5, workers=1)) as environments:
            assert ask(environments, ("a", {}, ["x"]))[0].value == 0.5
            assert ask(environments, ("a", {}, ["x", text])) == [Reply(None, 0.0, True)]
            assert says in environments.failure
            printed, ended = ask(environments, ("b", {}, ["print"]), ("c", {}, ["end"]))
            assert (printed.value, printed.failed, ended) == (0.5, False, Reply(None, 1.0, False))
            assert bool(environments.late) == (text == "hang")
    assert "x" * 100_000 in capfd.readouterr().out


def test_a_turn_that_fails_is_tried_once_more(counting):
    """A new instance gets all turns again."""
    with Environments(counting, Reward(timeout=5, workers=1)) as environments:
        ask(environments, ("a", {"start": 3}, ["x"]))
        assert said(ask(environments, ("a", {"start": 3}, ["x", "once"]))[0])[0] == 5
        assert said(ask(environments, ("a", {"start": 3}, ["x", "once", "y"]))[0])[0] == 6
        assert environments.failure == ""


def test_an_environment_that_answers_otherwise_when_told_again_fails(counting):
    with Environments(counting, Reward(timeout=5, workers=1)) as environments:
        assert ask(environments, ("a", {}, ["forgetful"]))[0].messages == [{"role": "user", "content": "go on"}]
        assert ask(environments, ("b", {}, ["forgetful", "x"])) == [Reply(None, 0.0, True)]
        assert "the environment is not deterministic" in environments.failure


def test_ended_dialogues_are_dropped(counting):
    with Environments(counting, Reward(timeout=5, workers=1)) as environments:
        ask(environments, ("a", {}, ["x"]))
        environments.end("a")
        environments.end("never seen")
        assert ask(environments, ("b", {}, ["x"]))[0].value == 0.5
        assert set(environments._homes) == {"b"}
        environments.pool[0].kill()
        assert said(ask(environments, ("b", {}, ["x", "y"]))[0])[0] == 2


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("math", "is unknown: give module:Class or path/file.py:Class"),
        ("{folder}/counting.py:Stepless", "reset(record) and step(text)"),
        ("{folder}/counting.py:Absent", "no attribute 'Absent'"),
    ],
)
def test_check_names_what_is_wrong_with_an_environment(counting, tmp_path, spec, says):
    rewards.check(counting, kind="environment")
    with pytest.raises(UserError) as error:
        rewards.check(spec.format(folder=tmp_path), kind="environment")
    assert says in str(error.value)
    assert str(error.value).startswith("rollout.environment=")


def test_the_example_of_the_documentation(tmp_path):
    text = (Path(__file__).parents[1] / "docs/environments.md").read_text()
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match
    (tmp_path / "guess.py").write_text(match[1])
    with Environments(f"{tmp_path}/guess.py:Guess", Reward(timeout=5, workers=1)) as environments:
        told, replies = ["Is it 50?", "hm", "It is 70."], []
        for n in range(len(told) + 1):
            replies += ask(environments, ("a", {"answer": "70"}, told[:n]))
    assert [reply.messages[0]["content"] if reply.messages else None for reply in replies] == [
        "I think of a number between 1 and 100. What is it?",
        "It is larger.",
        "Say a number.",
        None,
    ]
    assert [reply.value for reply in replies] == [0.0, 0.0, -0.1, 1 / 3]


class Engine:
    """Completes one request per step with the next of its texts, and a stop token if there is room for it."""

    version = 3
    withdraw = list

    def __init__(self, tokenizer: Tokenizer, *texts: str):
        self.tokenizer, self.texts = tokenizer, texts
        self.waiting: list[Request] = []
        self.keys: list[int] = []

    def stream(self, requests: list[Request]) -> Iterator[list[tuple[int, Completion]]]:
        self.submit(requests)
        while self.waiting:
            request = self.waiting.pop(0)
            turn = self.tokenizer.decode(request.prompt).count("ANSWER")
            tokens = [
                *self.tokenizer.encode(self.texts[min(turn, len(self.texts) - 1)], continues=True),
                self.tokenizer.eos,
            ]
            cut = len(tokens) > request.sampling.max_tokens
            tokens = tokens[: request.sampling.max_tokens]
            yield [(request.key, Completion(tokens, [-1.0] * len(tokens), "length" if cut else "stop"))]

    def submit(self, requests: list[Request]) -> None:
        self.waiting += requests
        self.keys += [request.key for request in requests]

    @property
    def idle(self) -> bool:
        return not self.waiting


TALKING = """
class Talking:
    def reset(self, record):
        self.turns = 0
        how = record.get("reset")
        if how == "raise":
            raise ValueError("no container")
        return [{"role": "user", "content": how}] if how else None

    def step(self, text):
        self.turns += 1
        if "bad role" in text:
            return [{"role": "system", "content": "ANSWER"}], 1.0
        if "fail" in text:
            raise ValueError("no such tool")
        if "over" in text:
            return None, 0.25
        return [{"role": "user", "content": "ANSWER" + " and so on" * text.count("more")}], 1.0
"""


def talk(
    folder: Path, tokenizer: Tokenizer, *texts: str, keys: tuple[str, ...] = (), record: dict | None = None
) -> list[Sample]:
    """Return two prompts with two responses each."""
    (folder / "talking.py").write_text(TALKING)
    data = write(folder / "train.jsonl", *({"prompt": f"What is {n}?", **(record or {})} for n in range(2)))
    given = ["batch.prompts=2", "rollout.group=2", "data.max_tokens=128", "rollout.max_tokens=64"]
    given.append(f"rollout.environment={folder}/talking.py:Talking")
    config = configuration.load("grpo", [*given, *keys])
    records = Records.load(data, "prompts", tokenizer, config.data, name="train", max_prompt=64)
    engine = Engine(tokenizer, *texts)
    with Environments(config.rollout.environment, config.reward) as environments:
        source = EngineSource(config, ALONE, engine, tokenizer, records, FREE, 64, environments=environments)  # type: ignore[arg-type]
        samples, _ = source.take(0)
        assert not environments._homes, "no dialogue is left"
    assert len(set(engine.keys)) == len(engine.keys), "keys of requests are unique"
    assert len(samples) == 4
    return samples


def roles(sample: Sample) -> list[str]:
    return [turn["role"] for turn in sample.text.turns]


def test_turns_until_the_environment_ends(tmp_path, llama2):
    for s in talk(tmp_path, llama2, "one", "two", "over"):
        assert (s.reward, s.verdict.rule, s.verdict.failed, s.truncated) == (2.25, 2.25, False, False)
        assert roles(s) == ["assistant", "user"] * 2 + ["assistant"]
        assert llama2.decode(s.tokens[1:][s.mask]).split() == ["onetwoover"]


@pytest.mark.parametrize(
    ("texts", "keys", "expected"),
    [
        (["one"], ["rollout.turns=3"], (3.0, 5)),
        (["one"], ["rollout.turns=1"], (1.0, 1)),
        (["one", "more more more more more"], ["rollout.max_tokens=40"], (2.0, 3)),  # no room for the second answer
        (["one " * 80], [], (0.0, 1)),  # the first turn does not end
        (["one", "more more more more more"], ["data.max_tokens=48", "rollout.max_tokens=40"], (2.0, 3)),
    ],
)
def test_limits_cut_a_response(tmp_path, llama2, texts, keys, expected):
    for s in talk(tmp_path, llama2, *texts, keys=tuple(keys)):
        assert (s.reward, len(s.text.turns)) == expected
        assert s.truncated
        assert not s.verdict.failed
        assert s.mask[-1], "the last token is the model's"
        assert len(s.tokens) - s.mask.argmax() - 1 <= 64


@pytest.mark.parametrize(
    ("texts", "record", "says"),
    [
        (["one", "fail"], {}, "ValueError: no such tool"),
        (["one", "bad role"], {}, "expected 'user'"),
        (["one"], {"reset": "raise"}, "ValueError: no container"),
    ],
)
def test_a_failure_is_counted_and_shown_once(tmp_path, llama2, capsys, texts, record, says):
    """It is shown again when more of them fail than the limit allows, and the step ends."""
    for s in talk(tmp_path, llama2, *texts, record=record, keys=("reward.max_failed=1",)):
        assert (s.reward, s.verdict.failed, s.truncated) == (0.0, True, False)
    shown = capsys.readouterr().out
    assert says in shown
    assert shown.count(": the environment failed: ") == 1
    with pytest.raises(RewardError, match=r"4 of 4 rewards of step 1 failed, and reward.max_failed=0.5; .* was: .*"):
        talk(tmp_path, llama2, *texts, record=record)
    assert capsys.readouterr().out.count(says) == 2


def test_reset_gives_the_prompt(tmp_path, llama2):
    for s in talk(tmp_path, llama2, "over", record={"reset": "Begin."}):
        assert s.text.prompt == "Begin."
        assert s.tokens[: s.mask.argmax() + 1].tolist() == [llama2.bos, *llama2.encode("Begin.")]
    with pytest.raises(
        UserError,
        match=r"reset\(\) of line 1 of data set train: a prompt of \d+ tokens is longer than .*=64; shorten it",
    ):
        talk(tmp_path, llama2, "over", record={"reset": "Begin. " * 80})


def test_turns_have_the_template_of_their_prompt(tmp_path, qwen):
    """By default, it is the tokenizer's own for prompts of messages, and plain for texts."""
    said = [{"role": role, "content": text} for role, text in (("assistant", "one"), ("user", "ANSWER"))]
    asked = [{"role": "user", "content": "Begin."}]
    dialogue = qwen.chat([*asked, *said, {"role": "assistant", "content": "over"}], cue=False)[:-1]
    for record in ({"prompt": asked}, {"reset": "Begin."}):
        assert [s.tokens.tolist() for s in talk(tmp_path, qwen, "one", "over", record=record)] == [dialogue] * 4
    text = qwen.encode("Begin.one<|im_end|>ANSWERover<|im_end|>", control=True)
    assert talk(tmp_path, qwen, "one", "over", record={"prompt": "Begin."})[0].tokens.tolist() == text
