"""The sums of a step: over ranks, over phases, and in metrics.jsonl of a new and of a resumed run."""

from __future__ import annotations

import json
import math
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from graders import FREE
from meshes import ALONE, together

from rlhf import configuration
from rlhf.contracts import Sample, Text, Verdict
from rlhf.errors import UserError
from rlhf.evaluate import LossEvaluation, Measured, ResponseEvaluation, prefixes, table
from rlhf.metrics import Metrics


def made(out: Path, start: int = 0, rank: int = 0, others: tuple[dict, ...] = (), *overrides: str) -> Metrics:
    """Return metrics of a rank that receives the sums of other ranks."""
    mesh = SimpleNamespace(rank=rank, is_first_in_replica=not rank, all_gather=lambda mine: [mine, *others])
    return Metrics(configuration.load("sft", [f"out={out}", "steps=9", *overrides]), mesh, start)  # type: ignore[arg-type]


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("start", "kept"), [(0, []), (1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (-1, [])])
def test_lines_that_a_run_will_write_again_are_dropped(tmp_path: Path, start: int, kept: list[int]) -> None:
    """A new run removes all lines. A resumed run keeps the lines up to its checkpoint."""
    before = made(tmp_path)
    for step in range(4):
        before.write(step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # incomplete
    made(tmp_path, start).write(max(start, -1) + 1)
    assert steps(tmp_path) == [*kept, max(start, -1) + 1]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    made(tmp_path, rank=1).write(1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_sums_run_over_ranks_and_calls(tmp_path: Path) -> None:
    """A mean is one quotient of two sums over all ranks.

    Sums that all ranks have count once, and without a count there is no number.
    """
    for rank in range(2):
        metrics = made(tmp_path, 0, rank, ({"loss": (5.0, 1.0), "theirs": (1.0, 2.0)},))
        metrics.add({"loss": (1.0, 2.0), "never": (0.0, 0.0)})
        metrics.add({"loss": (2.0, 1.0)})
        metrics.add_common({"reward": (3.0, 2.0)})
        metrics.add_share({"silent": (1.0, 4.0)})
        values = metrics.write(1)
        assert values["loss"] == 8.0 / 4.0
        assert values["theirs"] == 0.5
        assert "never" not in values
        assert values.get("reward") == (1.5 if rank == 0 else None)
        assert values.get("silent") == (0.25 if rank == 0 else None), "from the first rank of a replica"
        again = metrics.write(2)  # the sums of this rank were reset; the other ranks send theirs again
        assert again["loss"] == 5.0
        assert "reward" not in again


def test_times(tmp_path: Path) -> None:
    """Times of a phase are added. A step begins at begin(). Tokens per second are of all replicas."""
    start = time.perf_counter()
    metrics = made(tmp_path, 0, 0, ({"tokens": (50.0, 0.0)}, {}))
    time.sleep(0.2)
    metrics.begin()
    for phase, seconds in (("learn", 0.05), ("publish", 0.01), ("learn", 0.1)):
        with metrics.time(phase):
            time.sleep(seconds)
    values = metrics.write(1, tokens=100)
    assert 0.15 <= values["time/learn"] <= values["time/step"] - 0.01
    assert values["time/publish"] >= 0.01
    assert values["time/step"] <= time.perf_counter() - start - 0.2
    assert values["tokens_per_second"] == pytest.approx(150 / values["time/step"])
    assert "tokens_per_second" not in made(tmp_path).write(2)


@pytest.mark.parametrize("count", [0, 2, -1])
def test_the_first_sampled_responses_are_recorded(tmp_path: Path, count: int) -> None:
    """There are log.samples of them. Samples from the data set are ignored."""
    tokens, mask, version = np.arange(3, dtype=np.int32), np.ones(2, bool), np.zeros(2, np.int32)
    metrics = made(tmp_path, 0, 0, (), f"log.samples={count}")
    metrics.mesh = ALONE
    metrics.keep("train", [Sample(tokens, mask, group, version=version) for group in range(3)])
    metrics.keep("evaluate", [Sample(tokens, mask, 7)])
    metrics.write(1)
    metrics.close()
    files = [file.read_text().splitlines() for file in tmp_path.glob("samples/*")]
    wanted = {0: [], 2: [[0, 1]], -1: [[0, 1, 2]]}[count]
    assert [[json.loads(line)["group"] for line in file] for file in files] == wanted


def test_lines_for_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are printed every log.every steps, and after the last step. metrics.jsonl has all lines."""
    metrics = made(tmp_path, 0, 0, (), "log.every=4")
    for step in range(10):
        metrics.add({"loss": (0.5, 1.0), "grad_norm": (1.0, 1.0), "lr": (0.0, 1.0), "drift": (1.0, 1.0)})
        for trouble in ("truncated", "silent", "reward_failed"):
            metrics.add({trouble: (float(step == 8), 4.0)})
        metrics.write(step)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["0/9", "4/9", "8/9", "9/9"]
    assert all(re.search(r"/9  loss 0.5  .*grad_norm 1  lr 0  \d", line) and "drift" not in line for line in lines)
    assert ["truncated 0.25  silent 0.25  reward_failed 0.25" in line for line in lines] == [False, False, True, False]
    assert ["silent" in line for line in lines] == [False, False, True, False], "shown unless 0"
    assert steps(tmp_path) == list(range(10))


def test_every_line_is_json(tmp_path: Path) -> None:
    """A number that is not finite is omitted. The other numbers of its step are kept."""
    metrics = made(tmp_path)
    metrics.add({"loss": (math.nan, 1.0), "kl": (math.inf, 1.0), "reward": (1.0, 2.0)})
    values = metrics.write(1)
    assert math.isnan(values["loss"])
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row.keys() == {"step", "reward", "time/step"}


def test_an_evaluation_has_files_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They lie beside those of a training run, and a table is printed. The next evaluation replaces them."""
    made(tmp_path).write(1)
    config = configuration.load("evaluate", [f"out={tmp_path}", "policy.load=model", "data.eval=dev.jsonl"])
    for reward in (0.25, 1 / 3):
        metrics = Metrics(config, ALONE, start=-1)
        metrics.add_common({"eval_reward": (reward, 1.0)})
        capsys.readouterr()
        metrics.write(0)
        assert capsys.readouterr().out == ""
    assert steps(tmp_path) == [1]
    (row,) = map(json.loads, (tmp_path / "evaluate.jsonl").read_text().splitlines())
    assert row["eval_reward"] == 1 / 3
    lines = ["model on dev.jsonl:", "  reward               0.3333", "  response_tokens          12"]
    found = Measured({"reward": (1.0, 3.0), "response_tokens": (12.0, 1.0), "majority": (0.0, 0.0)}, {}, [])
    text = table(config, {"dev": found})
    assert text.splitlines() == [*lines, f"every response: {tmp_path}/samples/evaluate.jsonl"]


def test_an_evaluation_without_some_of_its_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean is that of the other responses, and the reward model scores only these."""
    tokens, mask = np.arange(3, dtype=np.int32), np.ones(2, bool)
    samples = [Sample(tokens, mask, n, reward=float(n), text=Text(response="x"), version=mask * 1) for n in range(3)]
    samples[2].verdict = Verdict(failed=True)
    config = configuration.load("evaluate", [f"out={tmp_path}", "evaluate.show=3"])
    source: Any = SimpleNamespace(answer=lambda prompts, grader: samples)
    held_out: Any = SimpleNamespace(head=lambda count: [])
    scored: list[Sample] = []
    metrics = Metrics(config, ALONE, start=-1, prefixes={"dev": "eval_"})
    ResponseEvaluation(config, source, {"dev": held_out}, FREE, scored.extend)(metrics)
    assert scored == samples[:2]
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "reward 0 |  => x",
        "reward 1 |  => x",
        "reward failed |  => x",
    ]
    values = metrics.write(0)
    metrics.close()
    assert (values["eval_reward"], values["eval_reward_failed"]) == (0.5, pytest.approx(1 / 3))
    lines = [json.loads(line) for line in (tmp_path / "samples/evaluate.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == [0.0, 1.0, None]


def held_out_sets() -> tuple[dict[str, Any], Any]:
    """Return two held-out sets, and a source that answers their four prompts twice. Set `a` has categories."""
    tokens, mask = np.arange(3, dtype=np.int32), np.ones(2, bool)
    prompts = {
        name: [
            Sample(tokens, mask, n, text=Text(prompt=name, record={"category": f"kind {n % 2}"} if name == "a" else {}))
            for n in range(4)
        ]
        for name in ("a", "b")
    }

    def response(prompt: Sample, k: int) -> Sample:
        reward = float(prompt.group + k < 3) if prompt.text.prompt == "a" else prompt.group / 7
        text = Text(prompt=prompt.text.prompt, response="The answer is 4.", set=prompt.text.prompt)
        verdict = Verdict(rule=reward, parts={"math": reward})
        return Sample(tokens, mask, prompt.group, reward, text=text, verdict=verdict, version=mask * 1)

    def of(mesh: Any) -> Any:
        share = range(4)[mesh.dp_rank :: len(mesh.replicas)]
        return SimpleNamespace(
            answer=lambda asked, grader: [
                response(prompt, k) for prompt in asked if prompt.group in share for k in (0, 1)
            ]
        )

    return {name: SimpleNamespace(head=lambda count, name=name: prompts[name]) for name in prompts}, of


def test_several_held_out_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics, samples and the table are by set and by category. They do not depend on the number of ranks."""
    keys = ["evaluate.samples=2", "evaluate.temperature=1", "evaluate.show=1", "policy.load=model"]
    keys.append('data.eval=["a=x.jsonl", "folder/b.jsonl"]')
    config = configuration.load("evaluate", [f"out={tmp_path}", *keys])
    held_out, source = held_out_sets()
    scored: list[int] = []

    def evaluated(mesh: Any) -> Any:
        metrics = Metrics(config, mesh, start=-1, prefixes=prefixes(config))
        evaluation = ResponseEvaluation(config, source(mesh), held_out, FREE, lambda some: scored.append(len(some)))
        found = evaluation.measure(metrics)
        values = metrics.write(0)
        metrics.close()
        return found, values

    (found, values), *others = [evaluated(ALONE), *together([[0, 1], [2]], evaluated)]
    assert all(each == found for each, _ in others)
    assert scored == [16, 8, 8, 8], "one call for all sets"
    assert values["eval_a_reward"] == 5 / 8
    assert values["eval_a_pass@1"] == 5 / 8
    assert values["eval_a_pass@2"] == values["eval_a_majority"] == 3 / 4
    assert values["eval_a_reward/category/kind 0"] == values["eval_a_pass@2/category/kind 0"] - 1 / 4 == 3 / 4
    assert values["eval_a_prompts/category/kind 1"] == 2
    assert values["eval_b_reward"] == pytest.approx(6 / 28)
    assert not [name for name in values if name.startswith("eval_b_pass") or name.startswith("eval_b_reward/category")]
    lines = [json.loads(line) for line in (tmp_path / "samples/evaluate.jsonl").read_text().splitlines()]
    assert [line["set"] for line in lines] == ["a"] * 8 + ["b"] * 8
    assert "    a: reward 1 | a =>" in capsys.readouterr().out
    text = table(config, found)
    first, second = text.split("model on folder/b.jsonl:\n")
    assert re.search(r"^  category +prompts +reward +reward_stderr +pass@1 +pass@2 +majority$", first, re.MULTILINE)
    assert re.search(r"^  kind 1 +2 +0.5 +0.5 +0.5 +0.5 +0.5$", first, re.MULTILINE), first
    assert "no pass@k" not in first
    assert "  no pass@k: it needs rewards that are all 0 or 1; set evaluate.function" in second
    assert second.splitlines()[-2].endswith("without a weight in reward.weights")
    assert "category" not in second


def test_names_of_held_out_sets() -> None:
    """One set without a name has the metrics of a run with a single set."""
    for given, wanted in (
        ("x/dev.jsonl", {"dev": "eval_"}),
        ('["dev=x/y.jsonl"]', {"dev": "eval_dev_"}),
        ('["a.jsonl", "b=b.jsonl"]', {"a": "eval_a_", "b": "eval_b_"}),
        ("[]", {}),
    ):
        assert prefixes(configuration.load("grpo", [f"data.eval={given}"])) == wanted


@pytest.mark.parametrize("names", [("x", "x_sft"), ("x_sft", "x"), ("x", "x-sft")], ids=str)
def test_losses_of_held_out_sets(tmp_path: Path, names: tuple[str, str]) -> None:
    """They are sums over categories. No two sets have a metric of the same name, which would be the mean of both."""
    config = configuration.load("dpo", [f"out={tmp_path}", f'data.eval=["{names[0]}=a", "{names[1]}=b"]'])
    mask = np.array([True])
    prompts = [Sample(mask * 1, mask, i, text=Text(record={"category": kind})) for i, kind in enumerate("aab")]
    roles = SimpleNamespace(
        subject="policy",
        share=list,
        score=lambda samples, streams: None,
        evaluate=lambda role, samples, loss, whole: {"loss": (len(samples), 2), "sft_loss": (samples[0].group, 1)},
    )
    algorithm = SimpleNamespace(streams=(), credit=lambda samples, total: (samples, {}), loss=max, whole_groups=True)
    held_out = dict.fromkeys(names, SimpleNamespace(head=lambda count: prompts))
    metrics = Metrics(config, ALONE, 0, prefixes=prefixes(config))
    evaluation: Any = LossEvaluation(config, roles, algorithm, held_out)  # type: ignore[arg-type]
    if "x_sft" in names:
        said = f"the sets {names[0]} and {names[1]} both have the metric eval_x_sft_loss; give one of them another"
        with pytest.raises(UserError, match=f"^data.eval: {re.escape(said)}"):
            evaluation(metrics)
        return
    evaluation(metrics)
    values = metrics.write(0)
    assert values["eval_x_loss"] == 3 / 4
    assert (values["eval_x_loss/category/a"], values["eval_x_loss/category/b"]) == (1, 1 / 2)
    assert values["eval_x_sft_loss"] == values["eval_x-sft_sft_loss"] == 1


def test_the_terminal_shows_every_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics whose names are similar are not those of a set."""
    config = configuration.load("grpo", [f"out={tmp_path}"])
    metrics = Metrics(config, ALONE, 0, prefixes={"a": "eval_a_", "b": "eval_b_"})
    names = ("reward", "reward_failed", "reward_stderr", "chosen_reward", "reward/category/x", "loss")
    metrics.add({f"eval_{name}_{key}": (0.5, 1.0) for name in "ab" for key in names})
    metrics.add({"eval_b_reward_failed": (-0.5, 0.0), "loss": (0.25, 1.0)})
    metrics.write(0)
    said = re.findall(r"  (\S+) [\d.]+(?=  )", capsys.readouterr().out)
    wanted = ["loss", "eval_a_reward", "eval_b_reward", "eval_a_loss", "eval_b_loss", "eval_a_reward_failed"]
    assert said == wanted, said


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "{}",
        "null",
        "\ufffd",
        '{"step": null}',
        '{"step": Infinity}',
        '{"step": "1"}',
        '{"step": ' + "9" * 5000,
        "[" * 99999,
        "",
    ],
    ids=range(11),
)
def test_a_damaged_line_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """It is reported, and the other lines are kept."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + damage + '\n{"step": 3}\n{"step": 4}\n')
    made(tmp_path, 3)
    assert steps(tmp_path) == [1, 3]
    assert capsys.readouterr().out == f"{path}: damaged lines are removed: 2\n"


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_lines_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """All lines are kept, and the next run drops the same ones."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(5)))

    def crash(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[moment], crash)
        with pytest.raises(InterruptedError):
            made(tmp_path, 2)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    made(tmp_path, 2)
    assert steps(tmp_path) == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
