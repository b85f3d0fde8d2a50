"""Judging the answers of MT-Bench, against a real HTTP server."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from endpoint import CLOSE, HANG, Endpoint, completion, fault

from rlhf.config import Config, Judge, MTBench
from rlhf.errors import JudgingError, UserError
from rlhf.mtbench import answers as answer_files
from rlhf.mtbench import grading, judged, questions, tables
from rlhf.mtbench.answers import Answer, Answers
from rlhf.mtbench.prompts import FORMATS, NAMES, OWN, REFERENCED, Prompts
from rlhf.mtbench.questions import Question

ROOT = Path(__file__).parents[1]
MATH = questions.Question(101, "math", ("What is 2+{2}?", "And 3+3?"), ("4 {a}", "6"), 0.0)
TALK = questions.Question(81, "writing", ("Tell me of Rome.", "Shorter."), (), 0.7)
ONCE = questions.Question("x", "facts", ("Who?",), (), 0.7)
ASKED = [TALK, MATH, ONCE]


def of(*models: str, asked: list[Question] = ASKED) -> Answers:
    """Return answers that differ by model, question and turn."""
    return {
        model: {q.id: Answer(tuple(f"{model} on {q.id}.{turn} {{}}" for turn in range(len(q.turns)))) for q in asked}
        for model in models
    }


def config(endpoint: Endpoint, out: Path, pairwise: bool = False, **keys: object) -> Config:
    judge = Judge(url=endpoint.url, model="", retries=0, timeout=10.0)
    return Config(out=str(out), judge=replace(judge, **keys), mtbench=MTBench(pairwise=pairwise))


def written(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def lines(out: Path, name: str = "judge_single") -> list[dict]:
    return [json.loads(line) for line in (out / "model_judgment" / f"{name}.jsonl").read_text().splitlines()]


def rows(table: str) -> dict[str, list[str]]:
    """Return the cells of a table, by the name of the row."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {name: values for name, *values in cells}


def rate(body: dict) -> str:
    """Answer with a rating that depends on the request. Some have none."""
    value = sum(body["messages"][-1]["content"].encode()) % 13
    return "no rating" if value > 10 else f"Because. Rating: [[{value}]]"


def shown(lines: list[dict], **wanted: object) -> str:
    """Return the mean that FastChat's show_result prints: of the rows whose score is not -1."""
    chosen = [line for line in lines if all(line[key] == value for key, value in wanted.items())]
    scores = [line["score"] for line in chosen if line["score"] != -1]
    return f"{sum(scores) / len(scores):.2f}" if scores else "-"


def filled(template: str, question: Question, turn: int, answers: dict[str, Answer]) -> str:
    """Fill a template as FastChat's run_judge_single and run_judge_pair do."""
    fields = {}
    if question.category in ("math", "reasoning", "coding"):
        fields["ref_answer_1"] = question.reference[0]
        if turn == 2:
            fields["ref_answer_2"] = question.reference[1]
    if turn == 1:
        fields |= {"question": question.turns[0]} | {f"answer{side}": a.turns[0] for side, a in answers.items()}
    else:
        fields |= {"question_1": question.turns[0], "question_2": question.turns[1]}
        for side, answer in answers.items():
            fields |= {f"answer{side}_1": answer.turns[0], f"answer{side}_2": answer.turns[1]}
    return template.format(**fields)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("public", [False, True])
def test_prompts_are_filled_as_by_fastchat(kind, public, request):
    path, asked = OWN, ASKED
    if public:
        data = request.getfixturevalue("shared_data")
        path = data / "mt_bench_judge_prompts.jsonl"
        asked = questions.read(data / "mt_bench_question.jsonl", data / "mt_bench_reference_gpt-4.jsonl")
    prompts = Prompts.read(path, kind)
    prompts.check(asked)
    templates = {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}
    used = set()
    for question in asked:
        for turn in range(1, len(question.turns) + 1):
            sides = {"": Answer(("one {question}", "two"))}
            if kind == "pairwise":
                sides = {"_a": Answer(("a", "aa")), "_b": Answer(("b", "bb"))}
            prompt, user = prompts.fill(question, turn, *sides.values())
            row = templates[NAMES[kind][question.category in REFERENCED] + ("-multi-turn" if turn == 2 else "")]
            assert (prompt.name, prompt.system) == (row["name"], row["system_prompt"])
            assert user == filled(row["prompt_template"], question, turn, sides)
            assert row["output_format"] == FORMATS[kind]
            used.add(prompt.name)
    assert used == set(prompts.named)
    assert len(used) == 4


def test_the_means_are_those_of_fastchat(tmp_path, capsys):
    asked = [replace(q, id=f"{q.id}.{number}") for number in range(5) for q in ASKED]
    answers = of("sft", "org/dpo", asked=asked)
    answers["sft"] = {key: replace(answer, cut=(2,) if "81" in key else ()) for key, answer in answers["sft"].items()}
    with Endpoint(rate, models=("org/judge",)) as endpoint:
        table = judged(config(endpoint, tmp_path), asked, answers)
        assert len(endpoint.asked) == 50
        assert {body["temperature"] for body in endpoint.asked} == {0}
        assert {body["model"] for body in endpoint.asked} == {"org/judge"}
        assert "judge org/judge: 50 requests with about " in capsys.readouterr().out
        assert judged(config(endpoint, tmp_path), asked, answers) == table
        assert len(endpoint.asked) == 50, "nothing is asked again, not even what has no rating"
        assert "nothing to send, 50 requests were judged before" in capsys.readouterr().out
    found, cells = lines(tmp_path, "org--judge_single"), rows(table)
    assert len(found) == 50
    keys = ["question_id", "model", "judge", "system_prompt", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert all(list(line) == keys for line in found)
    assert {tuple(line["judge"]) for line in found} == {
        *(("org/judge", name) for name in ("single-v1", "single-v1-multi-turn")),
        *(("org/judge", name) for name in ("single-math-v1", "single-math-v1-multi-turn")),
    }
    kinds, models = {question.id: question.category for question in asked}, ("sft", "org/dpo")
    parts = ["writing", "math", "facts", "turn 1", "turn 2", "mean"]
    assert [name for name in cells if "---" not in name] == ["", *parts, "without rating", "cut answers"]
    assert cells[""] == list(models)
    for kind in ("writing", "math", "facts"):
        part = [line for line in found if kinds[line["question_id"]] == kind]
        assert cells[kind] == [shown(part, model=model) for model in models]
    assert cells["turn 1"] == [shown(found, model=model, turn=1) for model in models]
    assert cells["turn 2"] == [shown(found, model=model, turn=2) for model in models]
    assert cells["mean"] == [shown(found, model=model) for model in models]
    failed = [sum(line["score"] == -1 and line["model"] == model for line in found) for model in models]
    assert cells["without rating"] == list(map(str, failed))
    assert sum(failed)
    assert cells["cut answers"] == ["5", "?"]
    assert (tmp_path / "model_judgment" / "org--judge_single.md").read_text() == table
    assert "Judge: org/judge. Prompts: those of this package" in table


def test_a_changed_answer_is_judged_anew(tmp_path):
    with Endpoint(lambda body: f"[[{len(endpoint.asked) % 10}]]") as endpoint:
        given = config(endpoint, tmp_path)
        judged(given, ASKED, of("a", "b"))
        before = lines(tmp_path)
        answers = {"a": {**of("a")["a"], 81: Answer(("new", "a on 81.1 {}"))}}
        table = judged(given, ASKED, answers)
        assert len(endpoint.asked) == 12, "both turns of one question: the second shows the first"
        after = lines(tmp_path)
        kept = [line for line in before if (line["model"], line["question_id"]) != ("a", 81)]
        assert len(after) == len(before) == 10
        assert after[:8] == kept, "also of a model that is not in this call"
        assert [line["user_prompt"].count("new") for line in after[8:]] == [1, 1]
        assert rows(table)["mean"] == [shown(after, model="a")]

        texts = [json.loads(line) for line in OWN.read_text().splitlines()]
        other = written(tmp_path / "prompts.jsonl", ({**row, "system_prompt": "Grade it."} for row in texts))
        prompted = replace(given, mtbench=MTBench(prompts=str(other)))
        assert f"Prompts: {other}." in judged(prompted, ASKED, answers)
        assert len(endpoint.asked) == 17, "prompts that differ in the system message only"
        assert [line["system_prompt"] for line in lines(tmp_path) if line["model"] == "a"] == ["Grade it."] * 5


def test_judgments_of_fastchat_are_used(tmp_path):
    """They have no system prompt, and a question may have several."""
    with Endpoint() as endpoint:
        judged(config(endpoint, tmp_path), ASKED, of("a"))
        file = tmp_path / "model_judgment" / "judge_single.jsonl"
        theirs = [{key: line[key] for key in line if key != "system_prompt"} for line in lines(tmp_path)]
        latest = [{**line, "judgment": "Rating: [[2]]", "score": 2} for line in theirs]
        other = {"question_id": 81, "model": "gpt-4", "judge": ["judge", "single-v1"], "score": 9, "turn": 1}
        unanswered = [{**line, "judgment": "$ERROR$", "score": -1} for line in theirs[:1]]
        written(file, [other, *theirs, *latest, *unanswered])
        file.write_text(file.read_text().removesuffix("\n"))  # the last line is complete
        assert rows(judged(config(endpoint, tmp_path), ASKED, of("a")))["mean"] == ["2.00"]
        assert len(endpoint.asked) == 5
        assert lines(tmp_path) == [other, *latest]
        written(file, [other, *latest[1:], *unanswered])
        assert rows(judged(config(endpoint, tmp_path), ASKED, of("a")))["mean"] == ["3.00"]
        assert len(endpoint.asked) == 6, "an answer that FastChat got none for"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("It is good.", -1),
        ("", -1),
        (completion(None), -1),
        (completion("I think that", finish="length"), -1),
        ("First [[3]], then [[8]]", 3.0),
        ("x" * 300_000 + "[7]", 7.0),
        ("\ud83d\ude00 \u2028 [[5]]", 5.0),
    ],
)
def test_replies(tmp_path, reply, score):
    """A reply without a rating is paid for, so it counts as failed and is not asked again."""
    answers = {"a": {"x": Answer(("y" * 300_000 if score == 7 else "",))}}
    with Endpoint(lambda body: reply) as endpoint:
        for _ in range(2):
            table = rows(judged(config(endpoint, tmp_path), [ONCE], answers))
            assert [line["score"] for line in lines(tmp_path)] == [score]
            assert table["mean"] == [f"{score:.2f}" if score > 0 else "-"]
            assert table["without rating"] == [str(int(score < 0))]
            assert "turn 2" not in table
        assert len(endpoint.asked) == 1


def test_failed_requests_are_sent_by_the_next_call(tmp_path, capsys):
    def answer(body: dict) -> object:
        if "2+{2}" in body["messages"][-1]["content"]:
            return fault(400, "maximum context length is 8 tokens")
        return (CLOSE,) if "Shorter" in body["messages"][-1]["content"] else "[[7]]"

    with Endpoint(answer) as endpoint:
        given = config(endpoint, tmp_path, concurrency=1)
        with pytest.raises(JudgingError) as error:
            judged(given, ASKED, of("a"))
        file = tmp_path / "model_judgment" / "judge_single.jsonl"
        assert str(error.value).startswith(f"2 of 5 requests have a reply, in {file}, and 3 have none: judge.url=")
        assert str(error.value).endswith("maximum context length is 8 tokens; start again: only those are sent")
        assert error.value.code == 1
        assert len(lines(tmp_path)) == 2
        assert not file.with_suffix(".md").exists()
        endpoint.answer, known = (lambda body: "[[9]]"), len(endpoint.asked)
        assert rows(judged(given, ASKED, of("a")))["mean"] == [f"{(7 * 2 + 9 * 3) / 5:.2f}"]
        assert len(endpoint.asked) == known + 3


def test_a_judge_that_is_out_of_order_gets_few_requests(tmp_path):
    asked = [replace(ONCE, id=number) for number in range(100)]
    with Endpoint(lambda body: fault(429, "slow down")) as endpoint:
        with pytest.raises(JudgingError, match="0 of 100 requests have a reply"):
            judged(config(endpoint, tmp_path, concurrency=4), asked, of("a", asked=asked))
        assert grading.FAILURES <= len(endpoint.asked) < grading.FAILURES + 4


def test_no_judge(tmp_path, monkeypatch, capsys):
    with Endpoint(models=("a", "b")) as endpoint:
        with pytest.raises((JudgingError, UserError), match=r"set judge\.model to one of a, b"):
            judged(config(endpoint, tmp_path), ASKED, of("a"))
        key = "sk-very-secret"
        monkeypatch.setenv("OPENAI_API_KEY", key)
        endpoint.key = "sk-another"
        with pytest.raises(JudgingError) as error:
            judged(config(endpoint, tmp_path, model="a"), ASKED, of("a"))
        given = config(endpoint, tmp_path, model="a")
    assert "refuses the API key in $OPENAI_API_KEY" in str(error.value)
    with pytest.raises(JudgingError) as closed:
        judged(given, ASKED, of("a"))
    told = capsys.readouterr()
    files = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    for text in (str(error.value), str(closed.value), told.out, told.err, files):
        assert key not in text


def test_a_killed_call_loses_nothing(tmp_path):
    """A call that is killed in the middle, and a half-written line: only what is missing is asked."""
    asked = [replace(ONCE, id=number) for number in range(20)]
    given = of("a", asked=asked)["a"]
    answer_files.write(tmp_path / "a.jsonl", "a", given)
    written(
        tmp_path / "questions.jsonl",
        ({"question_id": q.id, "category": q.category, "turns": q.turns} for q in asked),
    )
    program = (
        "import sys; from rlhf.config import Config, Judge; from rlhf.mtbench import answers, judged, questions\n"
        "url, out = sys.argv[1:]; asked = questions.read(f'{out}/questions.jsonl')\n"
        "config = Config(out=out, judge=Judge(url=url, model='judge', concurrency=3))\n"
        "judged(config, asked, {'a': answers.read(f'{out}/a.jsonl', asked)})"
    )
    with Endpoint(lambda body: "[[7]]" if len(endpoint.asked) <= 8 else (HANG,)) as endpoint:
        call = subprocess.Popen(
            [sys.executable, "-c", program, endpoint.url, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        while len(endpoint.asked) < 11 and call.poll() is None:
            time.sleep(0.02)
        call.send_signal(signal.SIGKILL)
        call.wait()
        assert len(lines(tmp_path)) == 8
        file = tmp_path / "model_judgment" / "judge_single.jsonl"
        with file.open("a") as stream:
            stream.write(file.read_text().splitlines()[0][:-9])
        endpoint.answer = lambda body: "[[5]]"
        table = judged(config(endpoint, tmp_path, model="judge"), asked, {"a": given})
        assert len(endpoint.asked) == 11 + 12
    assert len(lines(tmp_path)) == 20
    assert rows(table)["mean"] == [f"{(7 * 8 + 5 * 12) / 20:.2f}"]


def compare(body: dict) -> str:
    """Prefer the answer of "good", and A where both are of one kind. It names no winner once."""
    text = body["messages"][-1]["content"]
    if "Shorter" in text and text.index("good") < text.index("bad"):
        return "I cannot say."
    first, second = (text.index(name) for name in ("good", "bad"))
    return "[[A]]" if "3+3" in text or first < second else "[[B]]"


def test_pairs(tmp_path):
    """A win needs both orders. The prompts of the second turn of MATH are answered with A always, so it is a tie."""
    with Endpoint(compare) as endpoint:
        given = config(endpoint, tmp_path, pairwise=True)
        table = judged(given, ASKED, of("good", "bad"))
        assert len(endpoint.asked) == 10
        found = {(line["question_id"], line["turn"]): line for line in lines(tmp_path, "judge_pair")}
        assert len(lines(tmp_path, "judge_pair")) == 5, "without the halves that came first"
        keys = ["question_id", "model_1", "model_2", "judge", "system_prompt"]
        keys += [f"{game}_{key}" for game in ("g1", "g2") for key in ("user_prompt", "judgment", "winner")]
        assert list(found[81, 1]) == [*keys, "turn", "tstamp"]
        assert {(line["model_1"], line["model_2"]) for line in found.values()} == {("bad", "good")}
        winners = {key: (line["g1_winner"], line["g2_winner"]) for key, line in found.items()}
        assert winners == {
            (81, 1): ("model_2", "model_2"),
            (81, 2): ("model_2", "error"),
            (101, 1): ("model_2", "model_2"),
            (101, 2): ("model_1", "model_2"),
            ("x", 1): ("model_2", "model_2"),
        }
        assert [found[101, 2][f"{game}_judgment"] for game in ("g1", "g2")] == ["[[A]]"] * 2
        cells = rows(table)
        assert cells[""] == ["win rate", "wins", "ties", "losses", "errors"]
        assert cells["writing"] == ["100.0 %", "1", "0", "0", "1"]
        assert cells["math"] == ["75.0 %", "1", "1", "0", "0"]
        assert cells["all"] == ["87.5 %", "3", "1", "0", "1"]
        assert "good against bad:" in table
        assert "interval is 75.0 % to 100.0 %" in table
        assert "Cut answers: good ?, bad ?." in table

        other = judged(given, ASKED, of("bad", "good"))
        assert len(endpoint.asked) == 10, "the other order of the models is the same comparison"
        assert rows(other)["all"] == ["12.5 %", "0", "1", "3", "1"]

        endpoint.answer = lambda body: "[[C]]"
        three = judged(given, ASKED, of("good", "third", "bad"))
        assert [line for line in three.splitlines() if " against " in line] == [
            "good against third:",
            "good against bad:",
            "third against bad:",
        ]
        assert rows(three)["all"] == ["50.0 %", "0", "5", "0", "0"], "of the last pair"
        assert len(endpoint.asked) == 30


def test_half_a_pair_is_kept(tmp_path):
    """One of the two requests fails. FastChat leaves a line with the winner "error" out."""

    def half(body: dict) -> object:
        return compare(body) if len(endpoint.asked) % 2 else fault(400, "no")

    with Endpoint(half) as endpoint:
        given = config(endpoint, tmp_path, pairwise=True, concurrency=1)
        with pytest.raises(JudgingError, match=r"5 of 10 requests have a reply, in .*, and 5 have none"):
            judged(given, ASKED, of("good", "bad"))
        halves = lines(tmp_path, "judge_pair")
        assert [(line["g2_winner"], line["g2_judgment"]) for line in halves] == [("error", None)] * 5
        endpoint.answer = compare
        table = judged(given, ASKED, of("good", "bad"))
        assert len(endpoint.asked) == 15
        assert judged(given, ASKED, of("good", "bad")) == table
        assert len(endpoint.asked) == 15
    assert rows(table)["all"] == ["87.5 %", "3", "1", "0", "1"]
    assert [line["g2_judgment"] is None for line in lines(tmp_path, "judge_pair")] == [False] * 5


def test_the_interval_of_a_win_rate():
    """It is that of a binomial proportion, and equal turns of one question do not make it narrower."""
    low, high = tables.interval([[1.0]] * 60 + [[0.0]] * 40)
    assert (low, high) == pytest.approx((0.6 - 1.96 * 0.049, 0.6 + 1.96 * 0.049), abs=0.011)
    assert tables.interval([[1.0, 1.0]] * 60 + [[0.0, 0.0]] * 40) == (low, high)
    apart = tables.interval([[1.0], [1.0]] * 60 + [[0.0], [0.0]] * 40)
    assert apart[1] - apart[0] == pytest.approx((high - low) / 2**0.5, abs=0.015)
    assert tables.interval([[], [1.0]]) == (1.0, 1.0)
    assert tables.interval([[]]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "another"}, "prompts.jsonl: it has no prompt 'single-v1'; give FastChat's form"),
        ({"type": "pairwise"}, "prompts.jsonl:1: 'type' is 'pairwise' and 'output_format' is '[[rating]]'"),
        ({"output_format": "[[A]]"}, "they must be 'single' and '[[rating]]'"),
        ({"system_prompt": None}, "prompts.jsonl:1: 'system_prompt' is None"),
        ({"prompt_template": ["{answer}"]}, "'prompt_template' is ['{answer}']"),
        ({"prompt_template": "{answer"}, "is no template ("),
        ({"prompt_template": "{answer_a}"}, "has the field {answer_a}; it may have question, answer"),
        ({"prompt_template": "{ref_answer_1}"}, "has the field {ref_answer_1}"),
        ({"prompt_template": "{}"}, "has the field {}"),
        ({"prompt_template": "{answer.__class__}"}, "has the field {answer.__class__}"),
        ({"prompt_template": "{answer:{x}}"}, "has the field {answer}"),
    ],
)
def test_prompts_of_another_form(tmp_path, changed, message):
    first, *others = (json.loads(line) for line in OWN.read_text().splitlines())
    path = written(tmp_path / "prompts.jsonl", [first | changed, *others])
    with Endpoint() as endpoint:
        given = replace(config(endpoint, tmp_path), mtbench=MTBench(prompts=str(path)))
        with pytest.raises(UserError) as error:
            judged(given, ASKED, of("a"))
    assert message in str(error.value)
    assert endpoint.requests == []


def test_what_is_missing_is_said_before_a_request_is_sent(tmp_path):
    with Endpoint() as endpoint:
        lacking = [replace(MATH, id=number, reference=("4",)) for number in (1, 2)]
        with pytest.raises(UserError, match=r"question 1 \(math\) and 1 others: no reference answer to each turn; set"):
            judged(config(endpoint, tmp_path), lacking, of("a", asked=lacking))
        with pytest.raises(UserError, match=r"compares models: give at least two in mtbench\.models"):
            judged(config(endpoint, tmp_path, pairwise=True), ASKED, of("a"))
        assert endpoint.requests == []
        written(prompts := tmp_path / "p.jsonl", map(json.loads, OWN.read_text().splitlines()[:4]))
        with pytest.raises(UserError, match="it has no prompt 'pair-v2'"):
            Prompts.read(prompts, "pairwise")
