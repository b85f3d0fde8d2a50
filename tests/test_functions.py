"""What reward functions may be and return: numbers and parts, several of them, batched and async ones, second tries."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_rewards import gone

from rlhf import rewards
from rlhf.config import Reward
from rlhf.errors import UserError
from rlhf.rewards import Rewards, Score

NUMBERS = """
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

VALUES = {
    "bool": True, "numpy bool": np.True_, "numpy float": np.float32(0.25), "numpy int": np.int8(-3),
    "array": np.array(0.5), "tensor": torch.tensor(2), "bfloat16": torch.tensor(0.5, dtype=torch.bfloat16),
    "with gradient": torch.tensor(1.5, requires_grad=True), "decimal": Decimal("0.125"), "fraction": Fraction(1, 4),
    "parts": {"style": np.float64(0.5), "right": np.bool_(False)},
    "nan": np.float32("nan"), "infinite": torch.tensor(float("-inf")), "decimal nan": Decimal("NaN"), "none": None,
    "text": "1", "numpy text": np.array("1"), "list": [1.0], "vector": np.array([1.0]), "complex": np.complex64(1),
    "no parts": {}, "a part is none": {"style": None}, "a part is a list": {"style": [1.0]}, "no name": {3: 1.0},
    "odd name": {"\\x1b[1m": 1.0},
}

def value(prompt, response, record):
    return VALUES[response]
"""
WORTH = {
    "bool": 1.0,
    "numpy bool": 1.0,
    "numpy float": 0.25,
    "numpy int": -3.0,
    "array": 0.5,
    "tensor": 2.0,
    "bfloat16": 0.5,
    "with gradient": 1.5,
    "decimal": 0.125,
    "fraction": 0.25,
    "parts": 0.5,
}
WRONG = {
    "nan": "finite number, but is",
    "infinite": "finite number, but is",
    "decimal nan": "finite number, but is Decimal('NaN')",
    "none": "finite number, but is None",
    "text": "finite number, but is '1'",
    "numpy text": "finite number, but is array('1'",
    "list": "finite number, but is [1.0]",
    "vector": "finite number, but is array([1.])",
    "complex": "finite number, but is",
    "no parts": "the parts of a reward must have names",
    "a part is none": "the part 'style' of the reward must be a finite number, but is None",
    "a part is a list": "the part 'style' of the reward must be a finite number, but is [1.0]",
    "no name": "the parts of a reward must have names",
    "odd name": "names that are texts without control characters",
}
FUNCTIONS = """
import asyncio, os, time

def length(prompt, response, record):
    return len(response)

def parts(prompt, response, record):
    return {"style": 0.5, "right": response == "yes"}

def flaky(prompt, response, record):
    \"\"\"Fail at the first try as the response says.\"\"\"
    with open(record["file"] + response.replace(" ", ""), "a+") as file:
        file.seek(0)
        again = file.read()
        file.write(str(os.getpid()) + " ")
    if not again or "always" in response:
        if "end" in response:
            os._exit(3)
        if "hang" in response:
            time.sleep(60)
        raise ValueError("at the first try")
    return 1

def batch(prompts, responses, records):
    act(responses)
    return [{"many": len(responses), "nan": float("nan")} if response == "nan" else
            {"many": len(responses), "own": len(response)} for response in responses]

def few(prompts, responses, records):
    return [1.0] * (len(responses) - 1)

def array(prompts, responses, records):
    import numpy as np
    return np.array([len(response) for response in responses]) / 2

def act(responses):
    for response in responses:
        if response == "raise":
            raise ValueError("on purpose")
        if response == "end":
            os._exit(3)
        if response == "hang":
            time.sleep(60)

running = 0

async def crowd(prompt, response, record):
    \"\"\"Return how many responses it works on.\"\"\"
    global running
    running += 1
    await asyncio.sleep(0.05)
    found, running = running, running - 1
    return found

async def wait(prompt, response, record):
    act([response])
    if response == "wait":
        await asyncio.sleep(60)
    if response == "deaf":
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
    await asyncio.sleep(record.get("seconds", 0))
    return len(response)

class Judge:
    async def __call__(self, prompts, responses, records):
        await asyncio.sleep(0.01)
        return [len(responses)] * len(responses)

judge = Judge()

def trl(completions, **keys):
    return 0.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(FUNCTIONS)
    return tmp_path / "own.py"


def items(*responses: str, **record: Any) -> list[rewards.functions.Item]:
    return [("", response, record) for response in responses]


def scored(function: Rewards, given: list[rewards.functions.Item]) -> list[float | None]:
    """Return the reward of each response; None if it failed."""
    return [None if score.failed else score.value for score in function.score(given)]


def test_what_a_number_is(tmp_path: Path) -> None:
    (tmp_path / "numbers_of.py").write_text(NUMBERS)
    with Rewards([f"{tmp_path}/numbers_of.py:value"], Reward(workers=1)) as function:
        assert dict(zip(WORTH, scored(function, items(*WORTH)), strict=True)) == WORTH
        assert function.failure == ""
        for response, says in WRONG.items():
            function.failure = ""
            assert scored(function, items(response)) == [None], response
            assert says in function.failure.splitlines()[-1]


def test_parts_and_weights(file: Path) -> None:
    """The reward is the weighted sum of the parts. A weight of a function holds for all of its parts."""

    def score(weights: dict[str, float], *names: str) -> list[Score]:
        with Rewards([f"{file}:{name}" for name in names], Reward(weights=weights)) as function:
            return function.score(items("yes", "no"))

    assert score({}, "parts") == [
        Score(1.5, False, {"style": 0.5, "right": 1.0}),
        Score(0.5, False, {"style": 0.5, "right": 0.0}),
    ]
    assert [s.value for s in score({"right": 2, "style": -1}, "parts")] == [1.5, -0.5]
    assert score({"length": 0.5}, "length") == [Score(1.5, False, {"length": 3.0}), Score(1.0, False, {"length": 2.0})]
    both = score({"parts": 10, "parts/style": 0}, "length", "parts")
    assert both[0] == Score(13.0, False, {"length": 3.0, "parts/style": 0.5, "parts/right": 1.0})
    assert both[1].value == 2.0


def test_several_functions(file: Path) -> None:
    """A response fails if one of them fails. The verifier may be one of them."""
    with Rewards(["math", f"{file}:wait", f"{file}:batch"], Reward(timeout=5, workers=1)) as function:
        scores = function.score(items("#### 4", "raise", "#### 5", answer="4"))
    assert [score.failed for score in scores] == [False, True, False]
    assert scores[0].parts == {"math": 1.0, "wait": 6.0, "batch/many": 1.0, "batch/own": 6.0}
    assert scores[1] == Score(0.0, True, {})
    assert "ValueError: on purpose" in function.failure


def test_names_of_functions_differ(file: Path) -> None:
    (file.parent / "other.py").write_text(FUNCTIONS)
    rewards.check("math", f"{file}:length", f"{file}:batch")
    with pytest.raises(UserError, match=r"^evaluate.function has two functions with the name 'length', .*: rename one"):
        rewards.check(f"{file}:length", f"{file.parent}/other.py:length", key="evaluate.function")


def test_a_function_with_other_parameters_is_refused(file: Path) -> None:
    with pytest.raises(
        UserError, match=r"its parameters are \(completions, \*\*keys\), but it is called with \(prompt,"
    ):
        rewards.check(f"{file}:trl")


def test_a_failure_is_tried_once_more(file: Path) -> None:
    """It may be an error, the end of the process, or the time limit. The third one does not count as a failure."""
    given = ["raise", "end", "hang", "raise always", "end always"]
    with Rewards([f"{file}:flaky"], Reward(timeout=0.5, workers=2)) as function:
        found = scored(function, items(*given, file=f"{file.parent}/"))
        assert found == [1.0, 1.0, 1.0, None, None]
        assert not function.late, "the result is that of a faster machine"
    tries = {response: (file.parent / response.replace(" ", "")).read_text().split() for response in given}
    assert {response: len(processes) for response, processes in tries.items()} == dict.fromkeys(given, 2)
    assert all(len(set(tries[response])) == 2 for response in given if "raise" not in response), "in another process"
    with Rewards([f"{file}:flaky"], Reward(timeout=0.5, workers=1)) as function:
        assert scored(function, items("hang always", file=f"{file.parent}/")) == [None]
        assert function.late


def test_a_batched_function_gets_many_responses(file: Path) -> None:
    """One call has the next `concurrency` responses, the last one the rest. The value of a response may be wrong alone.

    A call that fails is repeated with each response alone.
    """
    with Rewards([f"{file}:batch"], Reward(timeout=0.5, workers=2, concurrency=4)) as function:
        scores = function.score(items(*"abcdefghij"))
        assert [score.parts["many"] for score in scores] == [4.0] * 8 + [2.0] * 2
        for key, item in enumerate(items(*"abcdefg")):
            function.give(key, item)
        found: dict[int, Score] = {}
        deadline = time.monotonic() + 5
        while len(found) < 4 and time.monotonic() < deadline:
            found |= function.take()
        assert sorted(found) == [0, 1, 2, 3], "the rest waits for the last response"
        found |= function.take(block=True)
        assert [found[key].parts["many"] for key in range(7)] == [4.0] * 4 + [3.0] * 3
        for bad in ("raise", "end", "hang", "nan"):
            scores = function.score(items("a", "b", bad, "c"))
            assert [score.failed for score in scores] == [False, False, True, False], bad
            assert {score.parts.get("many") for score in scores if not score.failed} == {4.0 if bad == "nan" else 1.0}
    with Rewards([f"{file}:array"], Reward()) as function:
        assert scored(function, items("a", "ab")) == [0.5, 1.0]
    with Rewards([f"{file}:few"], Reward()) as function:
        assert scored(function, items("a", "b", "c")) == [None] * 3
        assert "must return 3 rewards, one per response, but returned [1.0, 1.0]" in function.failure or (
            "must return 1 rewards" in function.failure
        )


def test_an_async_function_works_on_many_responses_at_a_time(file: Path) -> None:
    """128 responses of 0.2 s need 13 s if two processes take them one by one."""
    with Rewards([f"{file}:wait"], Reward(workers=2)) as function:
        given = [("", "a" * i, {"seconds": 0.2}) for i in range(128)]
        start = time.monotonic()
        assert scored(function, given) == [float(i) for i in range(128)]
        assert time.monotonic() - start < 6, "with the start of the processes"
    with Rewards([f"{file}:crowd"], Reward(workers=1, concurrency=3)) as function:
        assert max(score.value for score in function.score(items(*"abcdefghi"))) == 3.0
    with Rewards([f"{file}:judge"], Reward(workers=1, concurrency=3)) as function:
        assert scored(function, items(*"abcd")) == [3.0, 3.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("raise", "ValueError: on purpose"),
        ("wait", "time limit"),
        ("hang", "time limit"),
        ("deaf", "time limit"),
        ("end", "exit code 3"),
    ],
)
def test_a_failure_of_an_async_function_is_that_of_one_response(file: Path, bad: str, says: str) -> None:
    """If the process ends or does not answer, each response of it is tried again alone."""
    with Rewards([f"{file}:wait"], Reward(timeout=0.3, workers=1)) as function:
        assert scored(function, items("a", "b", bad, "c", seconds=0.05)) == [1.0, 1.0, None, 1.0]
        assert says in function.failure
        assert bool(function.late) == ("time limit" in says)
        assert scored(function, items("a")) == [1.0], "it goes on after that"


def test_large_records_do_not_block_a_busy_process(file: Path) -> None:
    """The process does not read while it hangs. Its pipe holds less than these records."""
    with Rewards([f"{file}:wait"], Reward(timeout=0.3, workers=1, concurrency=8)) as function:
        function.score(items("a"))
        given = [*items("hang"), *(("", "a", {"text": "x" * 1_000_000}) for _ in range(4))]
        assert scored(function, given) == [None, 1.0, 1.0, 1.0, 1.0]


def test_no_async_process_survives_its_parent(file: Path) -> None:
    program = f"""
import os, time
from rlhf.config import Reward
from rlhf.rewards import Rewards
function = Rewards([{str(file) + ":wait"!r}], Reward(workers=1))
function.score([("", "a", {{}})])
print(function.pool[0].process.pid, flush=True)
function.give(0, ("", "wait", {{}}))
function.take()
time.sleep(0.2)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.stderr == ""
    assert gone(int(done.stdout))


def test_a_list_of_answers_means_any_of_them() -> None:
    with Rewards(["math"], Reward()) as function:
        given = [
            ("", r"\boxed{0.5}", {"answer": ["1/2", "0.5"]}),
            ("", "#### 4", {"answer": ["4"]}),
            ("", "#### 4", {"answer": [5, 4]}),
            ("", "#### 18", {"answer": ["3 * 6 = 18\n#### 18", "none"]}),
            ("", "#### 6", {"answer": ["5", "4"]}),
            ("", "#### 4", {"answer": []}),
        ]
        assert scored(function, given) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_examples_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs/rewards.md").read_text()
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match
    (tmp_path / "own.py").write_text(match[1])
    (tmp_path / "classifier.py").write_text(
        "def probabilities(texts):\n    return [len(text) / 10 for text in texts]\n"
    )
    (tmp_path / "client.py").write_text("async def ask(question):\n    return '0.5' if 'yes' in question else '0'\n")
    with Rewards([f"{tmp_path}/own.py:{name}" for name in ("style", "toxic", "grade")], Reward(workers=1)) as function:
        scores = function.score(items("yes", answer="yes"))
    assert function.failure == ""
    assert scores[0].parts == {"style/short": 1.0, "style/right": 1.0, "toxic": -0.3, "grade": 0.5}
