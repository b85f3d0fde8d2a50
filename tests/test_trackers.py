"""log.to: TensorBoard, wandb and MLflow, each with the real package and without a network."""

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meshes import ALONE

from rlhf import configuration, progress, trackers
from rlhf import metrics as metrics_module
from rlhf.config import Config, Judge
from rlhf.contracts import Sample, Text
from rlhf.errors import UserError
from rlhf.launcher import GRACE
from rlhf.metrics import Metrics
from rlhf.recorder import describe
from rlhf.trackers import Trackers

PASSWORD = "hunter2"
LIMITS = dict(trackers.PATIENCE)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the trackers write into files, and use no settings of this machine."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_CONFIG_DIR": f"{tmp_path}/wandb_config",
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():
        monkeypatch.setenv(name, value)
    for end in trackers.PATIENCE:
        monkeypatch.setitem(trackers.PATIENCE, end, 300.0)  # the imports of the packages may take long
    yield
    import wandb

    wandb.teardown()  # it reads its variables once


def metrics_of(out: Path, to: str, *keys: str, start: int = 0, mode: str = "grpo") -> Metrics:
    out.mkdir(exist_ok=True)
    config = configuration.load(mode, [f"out={out}", "steps=9", f"log.to=[{to}]", "optim.lr=0.25", *keys])
    judge = Judge(url=f"https://me:{PASSWORD}@host:80/v1?token={PASSWORD}", key=PASSWORD)
    return Metrics(replace(config, judge=judge), ALONE, start)


def write(metrics: Metrics, *steps: int, loss: float = 0.5) -> None:
    """Write steps that have a metric and a response, and end the run."""
    tokens, mask = np.arange(3, dtype=np.int32), np.ones(2, bool)
    with metrics:
        for step in steps:
            text = Text(step, {}, "a | b\n" + 3000 * "x", f"answer {step}", set="dev")
            metrics.keep("train", [Sample(tokens, mask, 7, reward=1.0, text=text, version=mask * 1)])
            metrics.add({"loss": (loss * step, 1.0), "loss/part (a)": (1.0, 1.0)})
            metrics.write(step)
    metrics.close()


def wandb_runs(out: Path) -> list[list[Any]]:
    """Return the records of each offline run, in their order. Its file is a log of LevelDB with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    for path in sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data, place, parts, records = path.read_bytes(), 7, [], []
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:  # the end of a block that is too short for a header
                place += 32768 - place % 32768
                continue
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            parts.append(data[place + 7 : place + 7 + length])
            place += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                records.append(Record.FromString(b"".join(parts)))
                parts = []
        runs.append(records)
    return runs


def test_wandb(tmp_path: Path) -> None:
    out = tmp_path / "run"
    write(metrics_of(out, '"wandb"'), 0, 1, 2, 3)
    write(metrics_of(out, '"wandb"', start=2), 3, loss=2.0)
    runs = wandb_runs(out)
    assert len(runs) == 2, "wandb syncs two offline runs of one id as one run"
    for i, records in enumerate(runs):
        (run,) = (record.run for record in records if record.HasField("run"))
        assert (run.run_id, run.display_name, run.project) == ((out / "wandb.id").read_text().strip(), "run", "rlhf")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert (config["optim.lr"], config["mode"], config["judge.url"]) == (0.25, "grpo", "https://host:80/v1")
        rows = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        assert [(row["step"], row["loss"]) for row in rows] == [[(0, 0), (1, 0.5), (2, 1), (3, 1.5)], [(3, 6)]][i]
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
        axes = {record.metric.glob_name or record.metric.name: record.metric for record in records if record.metric}
        assert axes["*"].step_metric == "step"
    table = json.loads(next(out.glob("wandb/offline-run-*/files/media/table/*.json")).read_text())
    assert table["columns"] == [*trackers.COLUMNS]
    line = dict(zip(table["columns"], table["data"][0], strict=True))
    assert len(line["prompt"]) < 2100
    assert line["response"].startswith("answer")
    assert PASSWORD not in "".join(path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())


def test_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    out = tmp_path / "run"
    with suppress(InterruptedError), metrics_of(out, '"mlflow"') as metrics:
        metrics.add({"loss": (1.0, 1.0)})
        metrics.write(1)
        raise InterruptedError
    client, id = MlflowClient(), (out / "mlflow.id").read_text().strip()
    assert client.get_run(id).info.status == "FAILED"
    write(metrics_of(out, '"mlflow"', start=1), 2, 3)
    run = client.get_run(id)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["optim.lr"] == "0.25"
    assert len(run.data.params) > 100, "more than one of MLflow's requests may have"
    assert [(m.step, m.value) for m in client.get_metric_history(id, "loss")] == [(1, 1.0), (2, 1.0), (3, 1.5)]
    text = Path(client.download_artifacts(id, "samples/step_000003.csv")).read_text()
    assert client.get_metric_history(id, "loss.part _a_")[-1].step == 3
    rows = [*csv.DictReader(text.splitlines(keepends=True))]
    assert [(row["row"], row["reward"], row["response"]) for row in rows] == [("3", "1.0", "answer 3")]
    write(metrics_of(out, '"mlflow"'), 1)
    assert (out / "mlflow.id").read_text().strip() != id, "a new run in the same folder is another run"
    stored = "".join(path.read_text() for path in (tmp_path / "mlruns").rglob("*") if path.is_file())
    assert PASSWORD not in stored


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(metrics_of(tmp_path, '"tensorboard"'), 0, 1, 2, 3)
    time.sleep(1.1)  # the names of event files have the second
    write(metrics_of(tmp_path, '"tensorboard"', start=2), 3, loss=2.0)
    write(metrics_of(tmp_path, '"tensorboard"', start=-1, mode="evaluate"), 0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0), (1, 0.5), (2, 1), (3, 6)]
    tensors = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| optim.lr | 0.25 |" in tensors["config/text_summary"]
    assert "| train | dev | 3 | 7 | 1.0 | stop | a \\| b<br>x" in tensors["samples/text_summary"]
    assert PASSWORD not in str(tensors)
    assert [path.parent.name for path in tmp_path.rglob("*tfevents*")].count("evaluate") == 1


@pytest.mark.parametrize(
    ("name", "variables", "said"),
    [
        ("mlflow", {"MLFLOW_TRACKING_URI": "file:///dev/null/runs"}, "NotADirectoryError"),
        ("wandb", {"WANDB_MODE": "online", "NETRC": "/dev/null", "WANDB_API_KEY": ""}, "UsageError: No API key"),
    ],
)
def test_a_tracker_that_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    variables: Mapping[str, str],
    said: str,
) -> None:
    """There is one warning, and the run and its other tracker go on."""
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    write(metrics_of(tmp_path, f'"{name}", "tensorboard"'), 1, 2, 3)
    (line,) = (line for line in capfd.readouterr().out.splitlines() if "warning" in line)
    assert f"warning: log.to: {name} is off from here on, and the run goes on without it: {said}" in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert [*tmp_path.glob("events.out.tfevents.*")]


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let MLflow's requests wait for an event. It is set after the test."""
    import mlflow

    free, log = threading.Event(), mlflow.log_metrics
    monkeypatch.setattr(mlflow, "log_metrics", lambda *args, **keys: (free.wait(), log(*args, **keys)))
    yield free
    free.set()


@pytest.mark.usefixtures("blocked")
def test_a_tracker_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds up neither the steps nor, for longer than a few seconds, the end. Few of its calls wait."""
    monkeypatch.setitem(trackers.PATIENCE, "finished", 0.2)
    start = time.perf_counter()
    write(metrics_of(tmp_path / "ends", '"mlflow"'), 1, 2)
    assert "mlflow is off from here on, and the run goes on without it: it has not" in capsys.readouterr().out
    monkeypatch.setitem(trackers.PATIENCE, "failed", 0.1)
    with suppress(InterruptedError), metrics_of(tmp_path / "fails", '"mlflow"') as metrics:
        metrics.write(1)
        raise InterruptedError
    assert "it has not finished 0.1 s after the run" in capsys.readouterr().out
    monkeypatch.setattr(trackers, "BACKLOG", 3)
    metrics = metrics_of(tmp_path / "behind", '"mlflow"')
    assert metrics.trackers
    write(metrics, *range(1, 9))
    assert [len(sender.calls) for sender in metrics.trackers.senders] == [0]
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert lines[0].endswith(": it is 3 calls behind")
    assert time.perf_counter() - start < 5, "nobody waited for it"


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, fail: Callable[..., str]) -> None:
    """This is said before the run."""
    monkeypatch.setattr(trackers.MLflow, "module", "missing")
    wanted = "log.to=mlflow needs the package mlflow-skinny: pip install mlflow-skinny, or change log.to"
    assert fail("grpo", "log.to=mlflow").endswith(wanted)


@pytest.mark.skipif(find_spec("sqlalchemy") is not None, reason="this MLflow can use databases")
@pytest.mark.parametrize("address", [None, "postgresql+psycopg2://me:hunter2@host/runs"])
def test_a_database_needs_more_than_mlflow_skinny(
    address: str | None, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., str]
) -> None:
    """Without a variable, MLflow takes a local database. This is said before the run, too."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    line = fail("grpo", "log.to=mlflow")
    assert (
        "log.to=mlflow stores runs in the database " + ("postgresql+psycopg2://host" if address else "sqlite") in line
    )
    assert line.endswith("pip install mlflow, or set MLFLOW_TRACKING_URI to the address of a server")
    assert PASSWORD not in line


def test_ends_of_a_run(tmp_path: Path) -> None:
    """A run that a signal has stopped is not marked as finished."""
    from mlflow import MlflowClient

    metrics = metrics_of(tmp_path, '"mlflow", "wandb"')
    metrics.close("stopped")
    assert MlflowClient().get_run((tmp_path / "mlflow.id").read_text().strip()).info.status == "KILLED"
    (records,) = wandb_runs(tmp_path)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]


def test_the_end_moves_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the watchdog would end a complete run. After a signal, trackers and report have less than the launcher."""
    assert LIMITS["stopped"] + GRACE / 4 <= GRACE / 2
    free = threading.Event()
    sent = Trackers(configuration.load("grpo", []), 0)
    sent.senders = [trackers.Sender("slow", lambda: free.wait() and None)]  # type: ignore[arg-type, return-value]
    before = progress.read()
    monkeypatch.setitem(trackers.PATIENCE, "finished", 1.2)
    sent.close("finished")
    free.set()
    after = progress.read()
    assert after.moves >= before.moves + 2
    assert after.phases == before.phases, "all ranks must enter the same phases"


def test_no_step_makes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread makes it, and only if there is a tracker."""
    threads = []
    monkeypatch.setattr(
        metrics_module,
        "describe",
        lambda *each: threads.append(threading.current_thread()) or describe(*each),  # type: ignore[func-returns-value]
    )
    write(metrics_of(tmp_path, ""), 1)
    assert threads == []
    write(metrics_of(tmp_path, '"tensorboard"'), 1)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_long_names(tmp_path: Path) -> None:
    """MLflow refuses names of more than 250 characters."""
    metrics = metrics_of(tmp_path, '"mlflow"')
    metrics.add({"x" * 300: (1.0, 1.0)})
    metrics.write(1)
    metrics.close()
    from mlflow import MlflowClient

    run = MlflowClient().get_run((tmp_path / "mlflow.id").read_text().strip())
    assert "x" * 250 in run.data.metrics


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb and MLflow make folders of their names, and the current folder is among the paths of packages."""
    (tmp_path / "runs_of_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trackers.WandB, "module", "runs_of_a_tracker")
    with pytest.raises(UserError, match="needs the package"):
        trackers.check(configuration.load("sft", ["log.to=wandb"]))


def test_only_known_trackers() -> None:
    with pytest.raises(UserError, match=r"log.to must be one of tensorboard, wandb, mlflow; got 'comet'"):
        configuration.load("sft", ['log.to=["wandb", "comet"]'])
    with pytest.raises(UserError, match=r"log.tensorboard is no longer a key: .* set log.to=tensorboard"):
        configuration.load("sft", ["log.tensorboard=true"])


def test_settings_are_those_of_the_command_line() -> None:
    """Every key is there but secrets, with a value that a tracker can store."""
    config: Config = configuration.load("grpo", ["reward.weights.style=2", 'rollout.stop=["a", "b"]'])
    flat = dict(trackers.settings(config))
    assert (flat["reward.weights.style"], flat["rollout.stop"], flat["grpo.kl"]) == (
        2.0,
        "a, b",
        config.sections["grpo"].kl,
    )
    assert {type(value) for value in flat.values()} == {int, float, bool, str}
    assert "judge.key" not in flat


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("http://me:pw@host:80/v1", "http://host:80/v1"),
        ("see s3://key@bucket/x?sig=1#2 and /a/b", "see s3://bucket/x and /a/b"),
        ("http://host/a@b", "http://host/a@b"),
        ("me@host?x", "me@host?x"),
    ],
)
def test_addresses_lose_passwords(text: str, wanted: str) -> None:
    assert trackers._clean(text) == wanted
