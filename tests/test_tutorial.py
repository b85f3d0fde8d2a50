"""The tutorial's data, its questions of MT-Bench's form, and its judge, which answers over HTTP."""

import asyncio
import json
import sys
from pathlib import Path
from urllib import error, request

import pytest

from rlhf import configuration, mtbench
from rlhf.config import Judge
from rlhf.data import templates
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.judge.client import Client
from rlhf.mtbench import questions
from rlhf.mtbench.answers import Answer
from rlhf.mtbench.prompts import OWN, Prompts

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task
import tutorial
import tutorial_judge
import tutorial_task

GOOD = "The {} is here now. Thank you for asking. I am happy to help."  # gold reward 2
BAD = "Read the label. The {} is here now."  # 0 about the right article, -2 about another


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tutorial")
    tutorial_task.write(folder, num=512)
    return folder


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_demonstration_of_two_turns_fits_and_one_turn_has_the_tokens_of_plain(data: Path, tmp_path: Path):
    demo_task.make_model(tmp_path, data, pieces=320, template=tutorial_task.TEMPLATE)
    tokenizer = Tokenizer.load(tmp_path)
    said = [row["messages"] for row in lines(data / "train_sft.jsonl") if "messages" in row]
    assert len(said) == 512 / 4
    for messages in said:
        ids, learned = templates.encode(tokenizer, "tokenizer", messages)
        assert len(ids) <= 96, "data.max_tokens of the stage"
        assert [tokenizer.decode([i]) for i, learn in zip(ids, learned, strict=True) if learn].count("") == 2  # eos
        assert templates.encode(tokenizer, "tokenizer", messages[:2]) == templates.encode(
            tokenizer, "plain", messages[:2]
        )


def test_the_second_turn_may_be_about_the_article_of_the_first():
    assert tutorial_task.worth("Ann asks: is the lamp still in stock?\nAnd the clock?", GOOD.format("clock")) == 2
    assert tutorial_task.worth("Ann asks: is the lamp still in stock?\nAnd the clock?", GOOD.format("lamp")) == 0
    again = "Ann asks: is the lamp still in stock?\nCan you say that again?"
    assert tutorial_task.worth(again, GOOD.format("lamp")) == 2


def test_no_stage_trains_on_the_first_turns_of_the_questions(data: Path):
    asked = questions.read(data / "mtbench.jsonl")
    assert [question.category for question in asked] == [name for name in tutorial_task.QUESTIONS for _ in range(20)]
    assert {question.temperature for question in asked} == {0.7}
    trained = "".join(file.read_text() for file in data.glob("train_*.jsonl"))
    assert not any(question.turns[0] in trained for question in asked)
    assert {len(question.turns) for question in asked} == {2}


@pytest.mark.parametrize(("gold", "rating"), [(2, 10), (1, 7), (0.25, 4.75), (-1, 1), (-5, 1)])
def test_ratings_are_from_1_to_10(gold: float, rating: float):
    assert tutorial_judge.rating(gold) == rating


def test_the_judge_grades_the_last_answer(data: Path):
    """The project's own client asks it. It sees the same prompts as a language model."""
    prompts, question = Prompts.read(OWN, "single"), questions.read(data / "mtbench.jsonl")[-1]
    assert question.turns == ("Leo wants to know what a clock costs.", "And the lamp?")
    answer = Answer((GOOD.format("clock"), BAD.format("lamp")))

    async def ask(url: str) -> tuple[str, list[str]]:
        client = Client(Judge(url=url))
        told = [prompts.fill(question, turn, answer)[1] for turn in (1, 2)]
        replies = [await client.ask([{"role": "user", "content": text}]) for text in [*told, "What is the time?"]]
        await client.close()
        return client.model, [reply.text for reply in replies]

    with tutorial_judge.serve() as url:
        model, replies = asyncio.run(ask(url))
        codes = []
        for path, body in (("/chat/completions", b"{}"), ("/chat/completions", b"?"), ("/other", b"{}")):
            with pytest.raises(error.HTTPError) as refused:
                request.urlopen(url + path, body)
            codes.append(refused.value.code)
    assert model == "gold"
    assert replies[:2] == [
        "The gold reward of the answer is 2.\nRating: [[10]]",
        "The gold reward of the answer is 0.\nRating: [[4]]",
    ]
    assert replies[2] == "There is no answer to grade."
    assert codes == [400, 400, 404]


def test_the_table_of_mtbench(data: Path, tmp_path: Path):
    """Two models, of which one always answers well."""
    asked = questions.read(data / "mtbench.jsonl")

    def answered(text: str, question: questions.Question) -> Answer:
        told = ["\n".join(question.turns[: turn + 1]) for turn in range(2)]
        return Answer(tuple(text.format(max(tutorial_task.THINGS, key=prompt.rfind)) for prompt in told), ())

    answers = {
        name: {question.id: answered(text, question) for question in asked} for name, text in (("a", GOOD), ("b", BAD))
    }
    with tutorial_judge.serve() as url:
        config = configuration.load("mtbench", [f"judge.url={url}", f"out={tmp_path}"])
        table = mtbench.judged(config, asked, answers)
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:4]]
        for row in table.splitlines()
        if (cells := row.split("|"))[1:]
    }
    assert [rows[name] for name in (*tutorial_task.QUESTIONS, "turn 1", "turn 2", "mean")] == [["10.00", "4.00"]] * 7
    assert rows["without rating"] == ["0", "0"]


def test_the_stage_follows_all_models_of_the_first_seed(monkeypatch: pytest.MonkeyPatch):
    for name in ("JUDGE_URL", "JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with tutorial.judge() as url, request.urlopen(f"{url}/models") as answer:
        assert json.load(answer)["data"][0]["id"] == "gold"
        first, second = (tutorial.stages(Path("/out"), "mini", seed, url) for seed in (1, 2))
    (stage,) = [stage for stage in first if stage.name == "seed1/mtbench"]
    assert stage.after == tuple(f"seed1/{name}" for name in ("convert", "sft", "dpo", "online-dpo", "grpo"))
    assert {f"judge.url={url}", "judge.model="} <= set(stage.arguments)
    assert not any(stage.name.endswith("mtbench") for stage in second)


def test_proxies(monkeypatch: pytest.MonkeyPatch):
    """The tutorial's own judge needs none, and has its own name. The variables of the user hold beside it."""
    for name in ("JUDGE_URL", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "own.host")
    monkeypatch.setenv("JUDGE_MODEL", "large")
    stage = tutorial.benchmark(Path("/out"), Path("/out/seed1"), "http://x")
    assert stage.environment == {"no_proxy": "own.host,127.0.0.1"}
    assert "judge.model=" in stage.arguments
    monkeypatch.setenv("JUDGE_URL", "http://x")
    stage = tutorial.benchmark(Path("/out"), Path("/out/seed1"), "http://x")
    assert stage.environment == {}
    assert "judge.model=large" in stage.arguments


def test_an_endpoint_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    """It must answer before the first stage."""
    with tutorial_judge.serve() as own:
        monkeypatch.setenv("JUDGE_URL", own)
        monkeypatch.setenv("JUDGE_MODEL", "large")
        with tutorial.judge() as url:
            arguments = tutorial.benchmark(Path("/out"), Path("/out/seed1"), url).arguments
    assert url == own
    assert {f"judge.url={own}", "judge.model=large"} <= set(arguments)
    with pytest.raises(UserError, match=f"judge.url={own}"):
        tutorial.judge()
