"""Mode mtbench: names of models, what the engine is asked, which answers are used again, and the whole command."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import demo_task
import pytest
from commands import launch, run_ranks
from endpoint import Endpoint
from meshes import ALONE
from rows import write

from rlhf import benchmark, configuration
from rlhf.__main__ import main
from rlhf.answering import ask
from rlhf.benchmark import Model, Talk
from rlhf.config import Config
from rlhf.contracts import Completion, Request, Sampling
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.interrupt import SIGNALS
from rlhf.mtbench import answers
from rlhf.mtbench.answers import Answer
from rlhf.rollout.sampler import Sampler
from rlhf.variables import VARIABLES

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


def test_what_distinguishes_answers(tmp_path: Path, qwen: Tokenizer) -> None:
    """The system message is a part of the prompt, so an answer with another one is not used again."""
    found = []
    for number, system in enumerate(("Be brief.", "Be long.", "Be brief.")):
        (tmp_path / str(number)).mkdir()
        _, talks = dialogues(tmp_path / str(number), qwen, system=system)
        found.append([benchmark._digest(talk) for talk in talks])
    assert found[0] == found[2]
    assert not {*found[0]} & {*found[1]}


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


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two models, a and b, and a file of questions. Both models have a chat template."""
    root = tmp_path_factory.mktemp("mtbench")
    demo_task.write(root / "data", num_sft=300, num_rl=20, num_heldout=20)
    for seed, name in enumerate("ab"):
        demo_task.make_model(root / name, root / "data")
        demo_task.make_weights(root / name, seed=seed)
        (root / name / "chat_template.jinja").write_text(TEMPLATE)
    write(root / "questions.jsonl", *rows(reference=["1", "2"]))
    return root


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return run(*arguments, out=...), which runs the command in this process. It may start no ranks.

    It returns the exit code, and the lines on stdout or the one on stderr.
    """
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "GPUS_PER_NODE", "SLURM_JOB_ID", "SLURM_STEP_ID", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("rlhf.launcher.run", lambda *_: pytest.fail("ranks were started"))

    def call(*arguments: str, out: Path) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["mtbench", *common(home, out), *arguments])
        told = capsys.readouterr()
        assert len(told.err.splitlines()) == bool(code), told.err
        return code, told.err if code else told.out

    return call


def common(home: Path, out: Path) -> list[str]:
    keys = ["rollout.engine=kvcache", "data.max_tokens=128", "rollout.max_tokens=12", f"out={out}"]
    return [*keys, f"data.eval={home}/questions.jsonl", "parallel.dp=2"]


def turns(file: Path) -> list[list[str]]:
    return [json.loads(line)["choices"][0]["turns"] for line in file.read_text().splitlines()]


def test_the_whole_command(home: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    """The first call is made by the launcher: two engines answer, and the judge grades. Ranks make the second one.

    They answer with one engine of two ranks, with the same texts, and send only the requests that are new. A third call
    needs neither ranks nor requests, and not even the folders.
    """
    made, keys = tmp_path / "model_answer", common(home, tmp_path)
    with Endpoint() as endpoint:
        judge = [f"judge.url={endpoint.url}", "judge.model=judge"]
        done = launch("mtbench", *keys, *judge, f"policy.load={home}/a")
        assert done.returncode == 0, done.stderr
        assert "8 answers of a to 4 questions" in done.stdout
        assert "| mean" in done.stdout
        assert len(endpoint.asked) == 1 + 8, "a probe, and both turns of four questions"
        both = f'mtbench.models=["{made}/a.jsonl", "c={home}/a"]'
        env = {"CUDA_VISIBLE_DEVICES": ""}
        told = run_ranks(2, "-m", "rlhf", "mtbench", *keys, *judge, both, "rollout.tp=2", "dtype=auto", **env)
        assert "8 answers of c to 4 questions" in told
        assert len(endpoint.asked) == 9 + 1 + 8
        assert turns(made / "a.jsonl") == turns(made / "c.jsonl")
        code, text = run(*judge, f'mtbench.models=["c={home}/a", "a={home}/gone"]', out=tmp_path)
        assert (code, len(endpoint.asked)) == (0, 18 + 1)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert table[0] == ["", "c", "a"]
    assert ["mean", "7.00", "7.00"] in table
    line = json.loads((made / "c.jsonl").read_text().splitlines()[0])
    assert [line[key] for key in ("question_id", "model_id")] == [81, "c"]
    assert "out = " in (tmp_path / "mtbench.toml").read_text()
    for keys, why in {
        (f"policy.load=a={home}/b",): "a.jsonl has answers with another model: set another out, or give",
        (f"policy.load={home}/a", "seed=2"): "a.jsonl has answers with seed=1, this run has 2: set another out",
        (f"policy.load={home}/a", "data.template=human"): "has answers with data.template=auto, this run has human",
    }.items():
        code, text = run("judge.model=none", *keys, out=tmp_path)
        assert (code, why in text) == (2, True), text


def test_each_model_without_answers_has_its_run(home: Path, tmp_path: Path) -> None:
    """The launcher starts ranks for one model after another, and not after a failure. Signals come through again."""
    file = home / "questions.jsonl"
    keys = [*common(home, tmp_path), f'mtbench.models=["{home}/a", "{home}/b", "c={home}/a"]', "judge.model=none"]
    config = configuration.load("mtbench", keys)
    started: list[tuple[str, list[str]]] = []

    def start(alone: Config, more: list[str]) -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        started.append((alone.policy.load, more))
        if len(started) == 2:
            return 7
        rank = configuration.load("mtbench", [*keys, *more])
        (model,) = benchmark.models(rank)
        config = benchmark.own(rank, model)
        assert config == replace(alone, mtbench=config.mtbench, judge=config.judge)
        given = benchmark.inputs(config, 2)
        asked = benchmark.talks(config, given)
        said = {talk.question.id: Answer(("x", "y"), (), benchmark.identity(config, given, talk)) for talk in asked}
        answers.write(model.answers(config.out), "m", said)
        return 0

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        assert benchmark.run(config, start, 2, first=True) == 7
        assert benchmark.run(config, start, 2, first=True) == 0
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert [load for load, _ in started] == [f"{home}/{name}" for name in "abba"]
    assert started[3][1][0] == f"mtbench.models=c={home}/a"
    fresh = replace(config, out=str(tmp_path / "new"))
    with pytest.raises(UserError, match="ranks that torchrun or srun has started answer for one model in a call"):
        benchmark.run(fresh, start, None, first=True)
    write(file.with_name("more.jsonl"), *rows(), {"question_id": 1, "category": "math", "turns": ["Why?"]})
    more = replace(config, data=replace(config.data, eval=(str(file.with_name("more.jsonl")),)))
    assert benchmark.is_due(more, Model("a", f"{home}/a"), 2), "one question is new"


def test_mistakes_are_found_before_a_model_answers(home: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    """With a judge that is not there, or questions of another form, no rank starts."""
    load = f"policy.load={home}/a"
    other = write(tmp_path / "other.jsonl", {"question_id": 1, "category": "math", "prompt": "?"})
    (tmp_path / "model_answer").mkdir()
    write(tmp_path / "model_answer/b.jsonl", {"question_id": 81, "choices": [{"turns": ["x", "y"]}]})
    none = "judge.model=none"
    for keys, why in {
        (load,): "judge.url is not set: set it to that of a judge, as http://host:8000/v1, or judge.model=none",
        (load, "judge.url=http://127.0.0.1:9/v1", "judge.retries=0"): "nobody answers at judge.url=http://127.0.0.1:9",
        (load, none, f"data.eval={other}"): f"{other}:1: 'turns' is None; give a list of strings",
        (load, none, "data.eval=gone.jsonl"): "data set gone.jsonl: no such file or folder",
        (load, none, "data.eval="): "data.eval is not set: set it to one file of questions",
        (load, none, "mtbench.references=gone.jsonl"): "gone.jsonl: no such file or folder",
        (load, none, "mtbench.pairwise=true"): "mtbench.pairwise needs a judge, but judge.model=none",
        (load, "judge.url=http://x", "mtbench.pairwise=true"): "mtbench.pairwise=true compares models: give at least",
        (none, f"policy.load={home}/b"): "b.jsonl has answers that another program wrote: set another out",
        (none, f"mtbench.models={tmp_path}/model_answer/b.jsonl"): "3 questions have no answer",
        (none, f"policy.load={home}/gone"): f"{home}/gone: no such folder",
        (none, load, "data.template=plain"): "questions of two turns: data.template=plain writes no marks",
        (none, load, "data.max_tokens=100000"): "data.max_tokens=100000 is larger than the context length",
    }.items():
        code, text = run(*keys, out=tmp_path)
        assert (code, why in text) == (2, True), text


def test_each_launcher_asks_the_judge(home: Path, tmp_path: Path) -> None:
    """Else other nodes would start ranks, which wait for those of the first node."""
    judge = [f"policy.load={home}/a", "judge.url=http://127.0.0.1:9/v1", "judge.retries=0"]
    config = configuration.load("mtbench", [*common(home, tmp_path), *judge])
    with pytest.raises(UserError, match="nobody answers at judge"):
        benchmark.run(config, lambda *_: pytest.fail("ranks were started"), 2, first=False)
    assert benchmark.run(config, lambda *_: 7, None, first=False) == 7, "a rank that does not ask the judge"


def test_dry_run(home: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    keys = ["judge.url=http://x/v1", f'mtbench.models=["{home}/a", "{home}/b"]', "--dry-run"]
    code, text = run(*keys, out=tmp_path)
    assert code == 0
    assert "4 questions with 8 turns" in text
    assert "judge: 16 requests" in text
    assert text.count("GiB per rank") == 2
