"""Several data sets of one key: their names, and the order in which a run takes records from them."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from rows import write

from rlhf import configuration
from rlhf.__main__ import main
from rlhf.config import Data
from rlhf.contracts import Sample
from rlhf.data import sets
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.prepare import described, passes, steps
from rlhf.rollout.measures import by_set, lengths, summary


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME=PATH gives a name. A path that contains "=" is still a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run=3").mkdir()
    for name in ("a=b.jsonl", "run=3/x.jsonl"):
        (tmp_path / name).write_text("{}")
    for entry, wanted in {
        "math=/data/a.jsonl": ("math", "/data/a.jsonl"),
        "m-1_x=b=c.jsonl": ("m-1_x", "b=c.jsonl"),
        "a=c.jsonl": ("a", "c.jsonl"),
        "a=b.jsonl": ("a-b", "a=b.jsonl"),
        "run=3/x.jsonl": ("x", "run=3/x.jsonl"),
        "run=3/*.jsonl": ("data", "run=3/*.jsonl"),
        "run=run=3/x.jsonl": ("run", "run=3/x.jsonl"),
        "/data/run=3/x.jsonl": ("x", "/data/run=3/x.jsonl"),
        "/data/train.jsonl.gz": ("train", "/data/train.jsonl.gz"),
        "/data/llama3.1-sft/": ("llama3-1-sft", "/data/llama3.1-sft/"),
        "/data/train-*": ("train", "/data/train-*"),
        ".": (tmp_path.name, "."),
    }.items():
        assert sets.named([entry], "data.train") == dict([wanted])
    assert list(sets.named(["b=x.jsonl", "a.jsonl"], "data.train")) == ["b", "a"]
    said = "data.eval: x/a.jsonl and y/a.jsonl both have the name a; give one of them another name: OTHER=y/a.jsonl"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        sets.named(["x/a.jsonl", "y/a.jsonl"], "data.eval")


def test_weights() -> None:
    assert sets.weights(["a", "b", "c"], {"c": 0.1, "a": 2}) == [2, 1, Fraction(1, 10)], "exact"
    said = "data.weights.d: no data set of data.train has this name; its names are a, b; correct it, or remove it"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        sets.weights(["a", "b"], {"d": 1, "a": 1})
    assert configuration.load("sft", ["data.weights.a=2", "data.weights.b=0.5"]).data.weights == {"a": 2, "b": 0.5}
    for wrong in ("0", "-1", "nan", "inf", "true"):
        with pytest.raises(UserError, match=r"data.weights.a must be"):
            configuration.load("sft", [f"data.weights.a={wrong}"])


@pytest.mark.parametrize(
    "given", [[1], [1, 1], [3, 1], [0.1, 0.7], [1, 1e-6], [5, 3, 1, 1], [1, 1, 1, 1, 1, 0.3]], ids=str
)
def test_shares_of_the_draws(given: list[float]) -> None:
    """The counts are those of all draws in order of their times, and need none of the draws before.

    In every span of draws, the share of a data set is that of its weight, as closely as whole numbers allow.
    """
    weights, most = [Fraction(str(weight)) for weight in given], 300
    times = sorted(((n + Fraction(1, 2)) / weight, i) for i, weight in enumerate(weights) for n in range(most))
    counts = [[0] * len(weights)]
    for _, i in times[:most]:
        counts.append([count + (i == j) for j, count in enumerate(counts[-1])])
    assert counts == [sets.counts(weights, draws) for draws in range(most + 1)]
    for span in (1, 8, 64):
        for begin in range(most - span):
            for i, weight in enumerate(weights):
                found = counts[begin + span][i] - counts[begin][i]
                assert abs(found - span * weight / sum(weights)) < 2
    far = sets.counts(weights, 10**12)
    assert sum(far) == 10**12
    assert all(abs(n - 10**12 * weight / sum(weights)) < 2 for n, weight in zip(far, weights, strict=True))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, llama3: Tokenizer) -> list[Records]:
    """Make data sets with 30, 30 and 3 records."""
    root = tmp_path_factory.mktemp("sets")
    sizes = {"one": 30, "two": 30, "few": 3}
    files = {n: write(root / f"{n}.jsonl", *({"prompt": f"{n} {i}"} for i in range(s))) for n, s in sizes.items()}
    return [Records.load(file, "prompts", llama3, Data(), name=name) for name, file in files.items()]


def drawn(records: Records, steps: range, count: int, seed: int = 7) -> list[list[tuple[str, int]]]:
    return [[(s.text.set, s.text.row) for s in records.draw(step, count, seed)] for step in steps]


@pytest.mark.parametrize("weights", [{}, {"few": 0.25, "two": 3.5}], ids=str)
@pytest.mark.parametrize("count", [7, 40])
def test_each_data_set_is_read_pass_by_pass(parts: list[Records], weights: Mapping[str, float], count: int) -> None:
    """A step has the share of each weight, and depends only on the seed and its number."""
    records, steps = Records.joined(parts, weights), range(480 // count)
    found = drawn(records, steps, count)
    assert found[5:9] == drawn(records, range(5, 9), count)
    assert found[:3] != drawn(records, range(3), count, seed=8)
    assert [sample.group for sample in records.draw(3, count, 7)] == list(range(count))
    total = sum(weights.get(name, 1) for name in records.sets)
    for name, size in (("one", 30), ("two", 30), ("few", 3)):
        share = weights.get(name, 1) / total
        own = [[row for other, row in step if other == name] for step in found]
        assert all(abs(len(step) - count * share) < 2 for step in own)
        rows = [row for step in own for row in step]
        orders = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert records.passes(len(steps) * count)[name] == len(rows) / size


def test_data_sets_of_one_size_have_orders_of_their_own(parts: list[Records]) -> None:
    found = [pair for step in drawn(Records.joined(parts[:2], {}), range(6), 10) for pair in step]
    one, two = ([row for name, row in found if name == wanted] for wanted in ("one", "two"))
    assert sorted(one) == sorted(two) == list(range(30))
    assert one != two


def test_no_engine_gets_one_data_set_only(parts: list[Records]) -> None:
    """Engines take the prompts of a step in turn, so the data sets must not alternate."""
    records = Records.joined(parts[:2], {})
    even = Counter(s.text.set for step in range(25) for s in records.draw(step, 32, 1) if s.group % 2 == 0)
    assert sum(even.values()) == 400
    assert abs(even["one"] - 200) < 50


def test_an_epoch_is_one_pass_over_the_set_that_takes_longest(parts: list[Records]) -> None:
    records = Records.joined(parts, {})
    assert records.epoch == ("one", 90)
    assert records.passes(90) == {"one": 1, "two": 1, "few": 10}
    assert Records.joined(parts, {"one": 2, "two": 2, "few": 0.125}).epoch == ("few", 99)
    assert Records.joined(parts[2:], {"few": 5}).epoch == ("few", 3)
    assert len(Records.joined(parts, {})) == 63


def test_what_a_run_prints(parts: list[Records]) -> None:
    """It prints how often each data set is read. One that is small for its weight is read many times."""
    keys = ['data.train=["a/one.jsonl", "two=x", "few=y"]', "data.weights.two=2", "batch.prompts=8", "steps=15"]
    records, config = Records.joined(parts, {"two": 2}), configuration.load("grpo", keys)
    assert described(config, records) == [
        "a/one.jsonl: 30 records (0 truncated, 0 dropped)",
        "two=x: 30 records (0 truncated, 0 dropped)",
        "few=y: 3 records (0 truncated, 0 dropped)",
        "of each step: one 25.0% (read 1 times), two 50.0% (read 2 times), few 25.0% (read 10 times)",
    ]
    assert passes(config, records) == "15 steps of 8 of 63 records: 1 epochs (one pass over one each)"
    assert steps(replace(config, epochs=1.1), records.epoch[1]) == math.ceil(1.1 * 120 / 8)


@pytest.mark.parametrize(
    ("mode", "keys", "said"),
    [
        ("sft", [], "100 steps of 64 of 30 records: 213.3 epochs"),
        ("sft", ["steps=3000", "batch.prompts=1024"], "3,000 steps of 1,024 of 30 records: 1.024e+05 epochs"),
        ("sft", ["rollout.rounds=2"], "100 steps of 64 of 30 records: 213.3 epochs"),
        ("grpo", ["rollout.rounds=2"], "100 steps of 64 of 30 records: at least 213.3 epochs"),
    ],
)
def test_the_epochs_of_a_run(parts: list[Records], mode: str, keys: list[str], said: str) -> None:
    config = configuration.load(mode, ["data.train=a/one.jsonl", *keys])
    assert described(config, parts[0]) == ["a/one.jsonl: 30 records (0 truncated, 0 dropped)"]
    assert passes(config, parts[0]) == said


def test_what_a_dry_run_prints(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It shows the first record of each data set that is there."""
    row, files = {"prompt": "1+1", "response": "2"}, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    keys = ["sft", f"policy.load={made}/model", "policy.init=random", "data.max_tokens=128"]
    keys += [f'data.train=["{files[0]}", "b={files[1]}"]', "data.weights.b=0.5", "epochs=2", "batch.prompts=2"]
    for count, file in enumerate(files, 1):
        write(file, row)
        assert main([*keys, "--dry-run"]) == 0
        assert (said := capsys.readouterr().out).count("first record of" if count == 2 else "first record,") == count
        assert "of each step: a 66.7%, b 33.3%\n" in said
        assert ("3 in 3 steps, which are 2 epochs of 1 lines of b" in said) == (count == 2)
    assert "first record of b, template plain (>>> and <<< enclose what is learned):\n  | <s> 1+1>>>2</s><<<\n" in said


def test_records_of_several_sets(parts: list[Records]) -> None:
    records = Records.joined(parts, {"two": 3})
    assert [(s.text.set, s.text.row) for s in records.head(32)][29:] == [("one", 29), ("two", 0), ("two", 1)]
    assert [s.text.prompt for s in records.head(0)][::30] == ["one 0", "two 0", "few 0"]
    titles = [line for line in records.first().split("\n") if not line.startswith("  | ")]
    assert [title.split(",")[0] for title in titles] == [f"first record of {name}" for name in ("one", "two", "few")]
    assert parts[0].first().startswith("first record, template plain")
    assert {name: counts.kept for name, counts in records.sets.items()} == {"one": 30, "two": 30, "few": 3}


def test_metrics_of_each_data_set(parts: list[Records]) -> None:
    """They are the share of the records, and the metrics of all samples for those of one set."""
    records = Records.joined(parts, {"two": 3})
    samples: list[Sample] = records.draw(0, 10, 1)
    for sample in samples:
        sample.mask[-2:] = True
        sample.reward = float(sample.text.set == "two")
    found = by_set(samples, records.sets, summary)
    assert found["set/two/share"] == (6, 10)
    assert found["set/one/share"] == found["set/few/share"] == (2, 10)
    assert (found["set/two/reward"], found["set/one/reward"]) == ((6, 6), (0, 2))
    assert found["set/few/response_tokens"] == (4, 2)
    assert by_set(samples, records.sets, lengths).keys() == {
        f"set/{name}/{metric}" for name in records.sets for metric in ("share", "response_tokens")
    }
    assert by_set(samples[:0], records.sets, summary)["set/one/share"] == (0, 0)
    assert by_set(samples, parts[0].sets, summary) == {}
