"""Judging the answers of MT-Bench, against a real HTTP server."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from endpoint import HANG, Endpoint, completion
from judgments import ASKED, MATH, ONCE, config, lines, of, rows, written

from rlhf.config import MTBench
from rlhf.errors import UserError
from rlhf.mtbench import answers as answer_files
from rlhf.mtbench import judged, questions
from rlhf.mtbench.answers import Answer
from rlhf.mtbench.prompts import FORMATS, NAMES, OWN, REFERENCED, Prompts
from rlhf.mtbench.questions import Question

ROOT = Path(__file__).parents[1]


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


def test_paid_judgments_are_not_replaced(tmp_path):
    """Changed answers, and prompts that differ in the system message only, need another `out`."""
    with Endpoint() as endpoint:
        given = config(endpoint, tmp_path)
        judged(given, ASKED, of("a", "b"))
        before = lines(tmp_path)
        changed = {"a": {**of("a")["a"], 81: Answer(("a on 81.0 {}", "new"))}}
        texts = [json.loads(line) for line in OWN.read_text().splitlines()]
        other = written(tmp_path / "prompts.jsonl", ({**row, "system_prompt": "Grade it."} for row in texts))
        prompted = replace(given, mtbench=MTBench(prompts=str(other)))
        for keys, answers in ((given, changed), (prompted, of("a"))):
            with pytest.raises(
                UserError, match=r"judge_single.jsonl: question 81 of a has judgments on another answer"
            ):
                judged(keys, ASKED, answers)
            assert lines(tmp_path) == before
        assert len(endpoint.asked) == 10
        apart = replace(prompted, out=str(tmp_path / "apart"))
        assert f"Prompts: {other}." in judged(apart, ASKED, of("a"))
        assert [line["system_prompt"] for line in lines(tmp_path / "apart")] == ["Grade it."] * 5
        judged(given, ASKED, of("a", "c"))
        assert len(endpoint.asked) == 20
        assert lines(tmp_path)[5:10] == before[5:], "also of a model that is not in this call"


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


PROGRAM = """
import signal, sys
from rlhf.config import Config, Judge
from rlhf.errors import told
from rlhf.mtbench import answers, judged, questions

def interrupt(number, frame):
    raise KeyboardInterrupt(number)

signal.signal(signal.SIGTERM, interrupt)
url, out = sys.argv[1:]
asked = questions.read(f"{out}/questions.jsonl")
config = Config(out=out, judge=Judge(url=url, model="judge", concurrency=3))
sys.exit(told("rlhf", lambda: judged(config, asked, {"a": answers.read(f"{out}/a.jsonl", asked)}) and 0))
"""


def test_an_interrupted_call_loses_nothing(tmp_path):
    """SIGTERM ends it with one line. After SIGKILL and a half-written line only what is missing is asked."""
    asked = [replace(ONCE, id=number) for number in range(20)]
    given = of("a", asked=asked)["a"]
    answer_files.write(tmp_path / "a.jsonl", "a", given)
    lines_of = ({"question_id": q.id, "category": q.category, "turns": q.turns} for q in asked)
    written(tmp_path / "questions.jsonl", lines_of)
    file, limit = tmp_path / "model_judgment" / "judge_single.jsonl", 8

    def interrupted(number: int) -> tuple[int, str]:
        """Call the program, and send a signal when the judge does not answer any more."""
        command = [sys.executable, "-c", PROGRAM, endpoint.url, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as call:
            while len(endpoint.asked) < limit + 3 and call.poll() is None:
                time.sleep(0.02)
            call.send_signal(number)
            return call.wait(), call.communicate()[1]

    with Endpoint(lambda body: "[[7]]" if len(endpoint.asked) <= limit else (HANG,)) as endpoint:
        assert interrupted(signal.SIGTERM) == (128 + 15, "rlhf: ended by SIGTERM; nothing more was saved\n")
        assert len(lines(tmp_path)) == 8
        limit = 11 + 4
        assert interrupted(signal.SIGKILL) == (-9, "")
        assert len(lines(tmp_path)) == 12
        with file.open("a") as stream:
            stream.write(file.read_text().splitlines()[0][:-9])
        endpoint.answer, known = (lambda body: "[[5]]"), len(endpoint.asked)
        table = judged(config(endpoint, tmp_path, model="judge"), asked, {"a": given})
        assert len(endpoint.asked) == known + 8
    assert len(lines(tmp_path)) == 20
    assert rows(table)["mean"] == [f"{(7 * 12 + 5 * 8) / 20:.2f}"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "another"}, "prompts.jsonl: it has no prompt 'single-v1'; give FastChat's form"),
        ({"type": "pairwise"}, "prompts.jsonl:1: 'type' is 'pairwise' and 'output_format' is '[[rating]]'"),
        ({"output_format": "[[A]]"}, "they must be 'single' and '[[rating]]'"),
        ({"system_prompt": None}, "prompts.jsonl:1: 'system_prompt' is None"),
        ({"prompt_template": ["{answer}"]}, "'prompt_template' is ['{answer}']"),
        ({"prompt_template": "{question}"}, "'prompt_template' has no {answer}: add it"),
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
        with pytest.raises(UserError, match=r"question 1 \(math\) and 1 others: no reference answer to each turn; add"):
            judged(config(endpoint, tmp_path), lacking, of("a", asked=lacking))
        with pytest.raises(UserError, match=r"compares models: give at least two in mtbench\.models"):
            judged(config(endpoint, tmp_path, pairwise=True), ASKED, of("a"))
        assert endpoint.requests == []
        written(prompts := tmp_path / "p.jsonl", map(json.loads, OWN.read_text().splitlines()[:4]))
        with pytest.raises(UserError, match="it has no prompt 'pair-v2'"):
            Prompts.read(prompts, "pairwise")
