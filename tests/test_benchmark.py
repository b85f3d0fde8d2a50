"""Mode mtbench without its judge: names of models, what the engine is asked, which answers are used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from meshes import ALONE
from rows import write

from rlhf import benchmark, configuration
from rlhf.answering import ask
from rlhf.benchmark import Model, Talk
from rlhf.config import Config
from rlhf.contracts import Completion, Request, Sampling
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.rollout.sampler import Sampler

CATEGORIES = {"writing": 0.7, "math": 0.0, "stem": 0.1, "mine": 0.7}


def rows(**more: Any) -> list[dict[str, Any]]:
    """Return the lines of a file of questions."""
    return [
        {"question_id": 81 + i, "category": kind, "turns": [f"What is {i}?", f"And {i} more?"], **more}
        for i, kind in enumerate(CATEGORIES)
    ]


class Scribe:
    """An engine that records all requests, and gives each the text that `says` returns for it."""

    withdraw, version = list, 0

    def __init__(self, tokenizer: Tokenizer, says: Callable[[Request], tuple[str, str]]):
        self.tokenizer, self.says, self.asked = tokenizer, says, list[list[Request]]()

    def stream(self, requests: list[Request]) -> Iterator[list[tuple[int, Completion]]]:
        self.asked.append(requests)
        for request in requests[::-1]:
            text, finish = self.says(request)
            tokens = self.tokenizer.encode(text, continues=True, control=True)
            yield [(request.key, Completion(tokens, [0.0] * len(tokens), finish))]


def dialogues(
    tmp_path: Path, tokenizer: Tokenizer, *keys: str, lines: list[Any] | None = None, **more: Any
) -> tuple[Config, list[Talk]]:
    file = write(tmp_path / "questions.jsonl", *(lines or rows(**more)))
    given = ["data.max_tokens=200", "rollout.max_tokens=40", *keys]
    config = configuration.load("mtbench", [f"data.eval={file}", "policy.load=m", *given])
    room = config.data.max_tokens - config.rollout.max_tokens
    records = Records.load(file, "questions", tokenizer, config.data, max_prompt=room)
    inputs: Any = SimpleNamespace(records=records, tokenizer=tokenizer)
    return config, benchmark.talks(config, inputs)


def sampler(config: Config, engine: Scribe) -> Sampler:
    return Sampler(config, ALONE, engine, engine.tokenizer)  # type: ignore[arg-type]


def test_each_turn_is_asked_as_the_template_writes_it(tmp_path: Path, qwen: Tokenizer) -> None:
    """Each question has its temperature, its seed and its place. The second turn contains the first answer.

    Answers have neither special tokens nor outer spaces, and the limit of tokens is noted.
    """
    keys = ["rollout.top_p=0.5", "rollout.top_k=3", "rollout.temperature=0.9", "seed=5"]
    config, talks = dialogues(tmp_path, qwen, *keys)

    def says(request: Request) -> tuple[str, str]:
        return (f" No {request.key}. <|im_end|>", "stop") if request.key else ("Yes", "length")

    engine = Scribe(qwen, says)
    for turn in (0, 1):
        ask(config, sampler(config, engine), talks, turn)
    assert [talk.turns for talk in talks] == [["Yes"] * 2, ["No 1."] * 2, ["No 2."] * 2, ["No 3."] * 2]
    assert [talk.cut for talk in talks] == [[1, 2], [], [], []]
    for turn, requests in enumerate(engine.asked):
        assert [r.sampling for r in requests] == [
            Sampling(max_tokens=40, temperature=heat, stop_ids=qwen.stop_ids) for heat in CATEGORIES.values()
        ]
        texts = [qwen.decode(r.prompt, skip_special=False) for r in requests]
        for i, text in enumerate(texts):
            first, said = f"<|im_start|>user\nWhat is {i}?<|im_end|>\n<|im_start|>assistant\n", talks[i].turns[0]
            more = f"{said}<|im_end|>\n<|im_start|>user\nAnd {i} more?<|im_end|>\n<|im_start|>assistant\n"
            assert text == first + turn * more
    assert len({r.seed for requests in engine.asked for r in requests}) == 8
    again = Scribe(qwen, says)
    for talk in talks:
        talk.turns, talk.cut = [], []
    ask(config, sampler(config, again), talks, 0)
    assert [r.seed for r in again.asked[0]] == [r.seed for r in engine.asked[0]]
    ask(replace(config, seed=6), sampler(replace(config, seed=6), again), talks, 0)
    assert {r.seed for r in again.asked[1]}.isdisjoint(r.seed for r in engine.asked[0])


def test_what_ends_an_answer(tmp_path: Path, qwen: Tokenizer) -> None:
    """A stop string is not part of the answer. A dialogue without room for a token gets an empty answer that is cut.

    With data.overlong=truncate it loses its beginning instead, so that there is room for a whole answer.
    """
    config, talks = dialogues(tmp_path, qwen, 'rollout.stop=["Human:"]', system="Be brief.")
    engine = Scribe(qwen, lambda request: ("Well.\n\nHuman: what? And more", "length"))
    ask(config, sampler(config, engine), talks, 0)
    assert [(talk.turns, talk.cut) for talk in talks] == [(["Well."], [])] * 4
    assert "Be brief." in qwen.decode(engine.asked[0][0].prompt)
    talks[0].turns, talks[1].turns = ["yes no " * 100], [""]
    ask(config, sampler(config, engine), talks, 1)
    assert [len(requests) for requests in engine.asked] == [4, 3]
    assert (talks[0].turns[1], talks[0].cut, talks[1].turns[1]) == ("", [2], "Well.")
    short = replace(config, data=replace(config.data, overlong="truncate"))
    talks[0].turns, talks[0].cut = talks[0].turns[:1], []
    ask(short, sampler(short, engine), talks[:1], 1)
    (request,) = engine.asked[-1]
    assert len(request.prompt) == 160
    assert qwen.decode(request.prompt).endswith("user\nAnd 0 more?\nassistant\n")


def test_questions_that_cannot_be_asked(tmp_path: Path, qwen: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"has questions of two turns: data.template=plain writes no marks"):
        dialogues(tmp_path, qwen, "data.template=plain")
    long = {"question_id": 1, "category": "math", "turns": ["x " * 200]}
    with pytest.raises(
        UserError, match=r"question 1 is left out, but a score needs all of them; raise data.max_tokens"
    ):
        dialogues(tmp_path, qwen, "data.overlong=drop", lines=[*rows(), long])


def test_a_model_without_a_chat_template(tmp_path: Path, llama2: Tokenizer) -> None:
    """One turn is written as it is. Two turns need a template."""
    _, talks = dialogues(tmp_path, llama2, turns=["Why?"])
    assert [talk.text.template for talk in talks] == ["plain"] * 4
    assert llama2.decode(talks[0].prompt(llama2)) == "Why?"
    with pytest.raises(
        UserError, match=r"two turns: .* no chat template; set data.template to human, llama2 or chatml"
    ):
        dialogues(tmp_path, llama2)
    _, talks = dialogues(tmp_path, llama2, "data.template=human")
    talks[0].turns = ["No."]
    text = "\n\nHuman: What is 0?\n\nAssistant: No.\n\nHuman: And 0 more?\n\nAssistant:"
    assert llama2.decode(talks[0].prompt(llama2)) == text


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
    assert called("policy.load=a=b") == [Model("a=b", "a=b")]
    for keys, why in {
        ('mtbench.models=["runs/a/hf", "runs/a"]',): "have the same name a: give one another name",
        ('mtbench.models=["a/b=x", "a--b=y"]',): "have the same name",
        ("mtbench.models==x",): "give FOLDER or NAME=FOLDER",
        (): "policy.load is not set",
    }.items():
        with pytest.raises(UserError, match=why):
            called(*keys)
