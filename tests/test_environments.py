"""Environments of the user: what they may do wrong, in real processes, and what responses that they answer look like."""

from __future__ import annotations

import pytest

from rlhf import rewards
from rlhf.errors import UserError
from rlhf.rewards import Environments, Reply

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
        if text == "end":
            return None, 1
        said = {"role": "user", "content": f"{self.start + self.turns} in {os.getpid()}"}
        wrong = {
            "text": "hello", "pair": ("hello", 1.0), "empty": ([], 1.0), "nan": ([said], float("nan")), "words": ([{"role": "user"}], 0.0),
            "assistant": ([{"role": "assistant", "content": "I"}], 0.0),
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


def ask(environments: Environments, *turns: rewards.worker.Turn) -> list[Reply]:
    for i, turn in enumerate(turns):
        environments.give(i, turn)
    found = environments.take(block=True)
    return [found[i] for i in range(len(turns))]


def said(reply: Reply) -> tuple[int, int]:
    """The count, and the process."""
    assert reply.messages
    count, _, process = reply.messages[0]["content"].split()
    return int(count), int(process)


def test_a_dialogue_stays_in_its_process(counting):
    with Environments(counting, timeout=5, workers=2) as environments:
        assert ask(environments, ("a", {"start": 3}, []), ("b", {"silent": True}, [])) == [
            Reply([{"role": "user", "content": "from 3"}], 0.0, False),
            Reply(None, 0.0, False),
        ]
        keys = list(range(6))
        first = [said(reply) for reply in ask(environments, *((key, {"start": key}, ["x"]) for key in keys))]
        second = [said(reply) for reply in ask(environments, *((key, {"start": key}, ["x", "y"]) for key in reversed(keys)))][::-1]
        assert [count for count, _ in first] == [key + 1 for key in keys]
        assert second == [(count + 1, process) for count, process in first]


def test_a_dialogue_is_told_again_after_its_process_has_ended(counting):
    """And where others have its key, as after a restart."""
    with Environments(counting, timeout=1, workers=1) as environments:
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
        with Environments(counting, timeout=0.5, workers=1) as environments:
            assert ask(environments, ("a", {}, ["x"]))[0].value == 0.5
            assert ask(environments, ("a", {}, ["x", text])) == [Reply(None, 0.0, True)]
            assert says in environments.failure
            assert ask(environments, ("b", {}, ["print"]), ("c", {}, ["end"]))[1] == Reply(None, 1.0, False)
            assert environments.late == (text == "hang")
    assert "x" * 100_000 in capfd.readouterr().out


def test_an_environment_that_answers_otherwise_when_told_again_fails(counting):
    with Environments(counting, timeout=5, workers=1) as environments:
        assert ask(environments, ("a", {}, ["forgetful"]))[0].messages == [{"role": "user", "content": "go on"}]
        assert ask(environments, ("b", {}, ["forgetful", "x"])) == [Reply(None, 0.0, True)]
        assert "told the same as before" in environments.failure


def test_ended_dialogues_are_dropped(counting):
    with Environments(counting, timeout=5, workers=1) as environments:
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
    rewards.check(counting, "environment")
    with pytest.raises(UserError) as error:
        rewards.check(spec.format(folder=tmp_path), "environment")
    assert says in str(error.value)
    assert str(error.value).startswith("rollout.environment=")
