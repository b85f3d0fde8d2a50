"""Questions and answers in the files of FastChat, and the names of models."""

import json
from pathlib import Path

import pytest

from rlhf import benchmark, configuration
from rlhf.benchmark import Model
from rlhf.errors import UserError
from rlhf.mtbench import answers, questions
from rlhf.mtbench.answers import Answer

QUESTION = {"question_id": 1, "category": "math", "turns": ["2+2?", "And 3+3?"], "reference": ["4", "6"]}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else f"{json.dumps(row)}\n" for row in rows))
    return path


def answered(number: int | str, *turns: str, **keys: object) -> dict:
    """Return a line as FastChat writes it."""
    choices = [{"index": 0, "turns": list(turns)}, {"index": 1, "turns": ["another choice"]}]
    return {"question_id": number, "answer_id": "x", "model_id": "m", "choices": choices, "tstamp": 1.5, **keys}


def test_the_public_questions(shared_data):
    file = shared_data / "mt_bench_question.jsonl"
    found = questions.read(file, shared_data / "mt_bench_reference_gpt-4.jsonl")
    assert len(found) == 80
    assert all(len(question.turns) == 2 for question in found)
    kinds = dict.fromkeys(question.category for question in found)
    assert list(kinds) == ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
    by_kind = {question.category: question.temperature for question in found}
    assert by_kind == {kind: questions.TEMPERATURES[kind] for kind in kinds}
    referenced = [question for question in found if question.category in ("reasoning", "math", "coding")]
    assert [len(question.reference) for question in referenced] == [2] * 30
    own = {question.id: question.reference for question in questions.read(file)}
    assert any(own[question.id] != question.reference for question in referenced), (
        "the file replaces the question's own"
    )


def test_own_questions(tmp_path):
    one = {"question_id": "b", "category": "facts", "turns": ["Who?"], "required_temperature": 0.25}
    array = tmp_path / "questions.json"
    array.write_text(json.dumps([QUESTION, one, {**one, "question_id": 2, "required_temperature": 0}]))
    found = questions.read(array, written(tmp_path / "references.jsonl", answered("b", "Me."), answered(9, "unused")))
    assert [(question.id, question.turns, question.reference, question.temperature) for question in found] == [
        (1, ("2+2?", "And 3+3?"), ("4", "6"), 0.0),
        ("b", ("Who?",), ("Me.",), 0.25),
        (2, ("Who?",), (), 0.0),
    ]
    del one["required_temperature"]
    assert questions.read(written(tmp_path / "q.jsonl", one))[0].temperature == questions.TEMPERATURE


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ({"prompt": "2+2?"}, "'turns' is None"),
        ({**QUESTION, "turns": "2+2?"}, "'turns' is '2+2?'; give a list of strings"),
        ({**QUESTION, "turns": []}, "'turns' is []"),
        ({**QUESTION, "turns": ["2+2?", " "]}, "empty text"),
        ({**QUESTION, "turns": ["1", "2", "3"]}, "3 texts; the judge's prompts are for one or two turns"),
        ({**QUESTION, "turns": ["\ud800"]}, "surrogate"),
        ({**QUESTION, "category": None}, "'category' is None"),
        ({**QUESTION, "question_id": 1.5}, "'question_id' is 1.5"),
        ({**QUESTION, "question_id": True}, "'question_id' is True"),
        ({**QUESTION, "question_id": 7}, "the same id 7"),
        ({**QUESTION, "reference": "4"}, "'reference' is '4'"),
        ({**QUESTION, "required_temperature": "hot"}, "'required_temperature' is 'hot'"),
        ({**QUESTION, "required_temperature": -1}, "'required_temperature' is -1"),
    ],
)
def test_questions_of_another_form(tmp_path, line, message):
    path = written(tmp_path / "q.jsonl", {**QUESTION, "question_id": 7}, line)
    with pytest.raises(UserError) as error:
        questions.read(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    array = tmp_path / "q.json"
    if not isinstance(line, str):
        array.write_text(json.dumps([{**QUESTION, "question_id": 7}, line]))
        with pytest.raises(UserError) as error:
            questions.read(array)
        assert str(error.value).startswith(f"{array}: element 2: ")


def test_no_questions(tmp_path):
    for path in (written(tmp_path / "empty.jsonl"), tmp_path / "missing.jsonl"):
        with pytest.raises(UserError, match=path.name):
            questions.read(path)


def test_answers_are_read_as_written(tmp_path):
    asked = questions.read(
        written(tmp_path / "q.jsonl", QUESTION, *({**QUESTION, "question_id": key} for key in (30, "a", 4)))
    )
    given = {
        "a": Answer(("", "x" * 100_000), (1, 2)),
        30: Answer(("á\n\u2028", "2"), (), {"folder": "f"}),
        4: Answer(("1", "2")),
        1: Answer(("1", "2")),
    }
    path = answers.file(tmp_path, "meta/llama")
    assert path == tmp_path / "model_answer" / "meta--llama.jsonl"
    answers.write(path, "meta/llama", given)
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert [line["question_id"] for line in lines] == [1, 4, 30, "a"], "as FastChat sorts them"
    assert {line["model_id"] for line in lines} == {"meta/llama"}
    assert len({line["answer_id"] for line in lines}) == 4
    assert list(lines[2]) == ["question_id", "answer_id", "model_id", "choices", "tstamp", "cut", "folder"]
    assert answers.read(path, asked) == {question.id: given[question.id] for question in asked}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_answers_of_fastchat(tmp_path):
    asked = questions.read(written(tmp_path / "q.jsonl", QUESTION, {**QUESTION, "question_id": 2}))
    both = answered(1, "old", "old"), answered(1, "4", "6"), answered(2, "a", "b"), answered(3, "of no question")
    found = answers.read(written(tmp_path / "m.jsonl", *both), asked)
    assert found == {1: Answer(("4", "6")), 2: Answer(("a", "b"))}, "the first choice of the last line"
    path = written(tmp_path / "m.jsonl", answered(2, "only one turn"))
    with pytest.raises(UserError, match=r"m.jsonl: 2 questions have no answer, or not one to each turn: 1, 2; add"):
        answers.read(path, asked)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        (QUESTION, "'choices' is None"),
        (answered(2) | {"choices": []}, "'choices' is []"),
        (answered(2) | {"choices": ["text"]}, "'choices' is ['text']"),
        (answered(2) | {"choices": [{"turns": [None]}]}, "'turns' is [None]"),
        (answered(2, "x") | {"question_id": None}, "'question_id' is None"),
        (answered(2, "\udfff"), "surrogate"),
        (answered(2, "x", cut="yes"), "'cut' is 'yes'"),
    ],
)
def test_answers_of_another_form(tmp_path, line, message):
    path = written(tmp_path / "m.jsonl", answered(1, "x"), line)
    with pytest.raises(UserError) as error:
        answers.load(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def called(*keys: str) -> list[Model]:
    return benchmark.models(configuration.load("mtbench", list(keys)))


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path, name in {
        "runs/sft": "sft",
        "runs/sft/hf": "sft",
        "runs/sft/step_000100/mcore-local/": "sft",
        "/models/llama2-7B": "llama2-7B",
        "hf": tmp_path.name,
        "answers/vicuna-7b-v1.3.jsonl": "vicuna-7b-v1.3",
        "mine=runs/sft": "mine",
        "me/mine=runs/sft": "me/mine",
    }.items():
        assert [model.name for model in called(f"mtbench.models={path}")] == [name]
    assert called("policy.load=runs/a", 'mtbench.models=["b", "c=runs/a"]') == [Model("b", "b"), Model("c", "runs/a")]
    (tmp_path / "a=b").mkdir()
    assert called("policy.load=a=b") == [Model("a-b", "a=b")]
    for keys, why in {
        ('mtbench.models=["runs/a/hf", "runs/a"]',): "have the same name a: give one another name",
        ('mtbench.models=["a/b=x", "a--b=y"]',): "have the same name",
        ("mtbench.models==x",): "give FOLDER or NAME=FOLDER",
        (): "policy.load is not set",
    }.items():
        with pytest.raises(UserError, match=why):
            called(*keys)
