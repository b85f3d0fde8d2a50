"""Sends the metrics, the configuration and sampled responses of a run to TensorBoard, wandb or MLflow (log.to).

Only rank 0 does. Each tracker has a thread, so no step waits for it. A tracker that raises an error, or that cannot
keep up, prints one warning and is off for the rest of the run.
"""

from __future__ import annotations

import csv
import io
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from rlhf import lazy, progress
from rlhf.config import Config
from rlhf.errors import UserError

BACKLOG = 256  # calls that wait for a tracker; with more, it cannot keep up
End = Literal["finished", "stopped", "failed"]  # how a run ends; stopped: by a signal; failed: by an error
# Seconds that the end of a run waits for its trackers. After a signal the launcher may kill the rank ten seconds after
# another one has ended, and the report needs time, too. After an error the other ranks wait a second for rank 0.
PATIENCE: dict[End, float] = {"finished": 60.0, "stopped": 2.5, "failed": 0.8}
LONGEST = 2000  # characters of a text in the table of samples
# of the table; keys of recorder.describe()
COLUMNS = ("use", "set", "row", "group", "reward", "finish", "prompt", "response")
NAME = 250  # characters of a name; MLflow refuses longer ones
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # addresses of MLflow that need sqlalchemy begin with these

Table = list[list[Any]]  # rows of values in the order of COLUMNS


@dataclass(frozen=True)
class Origin:
    """The run that is tracked."""

    name: str
    folder: Path  # for files of the tracker
    start: int  # steps that the run has done; metrics of later steps are sent again
    config: Mapping[str, Any]  # by key, as on the command line
    id_file: Path | None  # has the tracker's id of the run, with which a resumed run continues; None: never continued

    @property
    def id(self) -> str:
        """The tracker's id of the run that is continued; "" for a new run."""
        with suppress(OSError):
            return self.id_file.read_text().strip() if self.id_file and self.start > 0 else ""
        return ""

    def keep(self, id: str) -> None:
        """Remember the tracker's id of the run."""
        if self.id_file:
            self.id_file.write_text(f"{id}\n")


class Tracker(Protocol):
    """A program that shows runs. It is made and called in one thread. Any method may raise any error."""

    module: str  # that is imported
    package: str  # that has it, as pip calls it

    @staticmethod
    def fault() -> str:
        """Return why the installed package cannot be used, with the remedy, or ""."""
        return ""

    def __init__(self, origin: Origin): ...

    def write(self, step: int, values: Mapping[str, float], table: Table) -> None:
        """Write the metrics and sampled responses of a step."""

    def close(self, end: End) -> None:
        """Write what is still missing."""


class TensorBoard(Tracker):
    """Event files in the folder of the run."""

    module = package = "tensorboard"

    def __init__(self, origin: Origin):
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(origin.folder, purge_step=origin.start + 1 if origin.start > 0 else 0)
        self.events.add_text("config", _markdown(("key", "value"), [[*pair] for pair in origin.config.items()]))

    def write(self, step: int, values: Mapping[str, float], table: Table) -> None:
        for name, value in values.items():
            self.events.add_scalar(name, value, step)
        if table:
            self.events.add_text("samples", _markdown(COLUMNS, table), step)
        self.events.flush()

    def close(self, end: End) -> None:
        self.events.close()


class WandB(Tracker):
    """A run of wandb. WANDB_PROJECT and its other variables apply; WANDB_MODE=offline writes to the run's folder.

    wandb refuses steps that it already has, so the step is an own metric, and the axis of the others.
    """

    module = package = "wandb"

    def __init__(self, origin: Origin):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=wandb.setup().settings.project or "rlhf",
            name=origin.name,
            id=origin.id or None,
            resume="allow",
            dir=origin.folder,
            config=dict(origin.config),
            # Arguments of the command line and the address of the git repository may have passwords.
            settings=wandb.Settings(console="off", quiet=True, disable_git=True, x_disable_meta=True),
        )
        origin.keep(self.run.id)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float], table: Table) -> None:
        samples = self.wandb.Table(columns=[*COLUMNS], data=table, allow_mixed_types=True) if table else None
        self.run.log({"step": step, **values, **({"samples": samples} if samples else {})})

    def close(self, end: End) -> None:
        self.run.finish(exit_code=int(end != "finished"))


class MLflow(Tracker):
    """A run of MLflow. MLFLOW_TRACKING_URI says where it is stored, MLFLOW_EXPERIMENT_NAME in which experiment."""

    module, package = "mlflow", "mlflow-skinny"

    @staticmethod
    def fault() -> str:
        import mlflow

        address = mlflow.get_tracking_uri()
        if not address.startswith(DATABASES) or lazy.package("sqlalchemy"):
            return ""
        return (
            f"stores runs in the database {_clean(address)}, which mlflow-skinny cannot: pip install mlflow, or set "
            "MLFLOW_TRACKING_URI to the address of a server"
        )

    def __init__(self, origin: Origin):
        import mlflow

        self.mlflow, known = mlflow, origin.id
        run = mlflow.start_run(run_id=known or None, run_name=origin.name)
        origin.keep(run.info.run_id)
        if not known:  # MLflow refuses to change a parameter
            mlflow.log_params(_accepted(origin.config))

    def write(self, step: int, values: Mapping[str, float], table: Table) -> None:
        self.mlflow.log_metrics(_accepted(values), step=step)
        if table:
            text = io.StringIO()
            csv.writer(text).writerows([COLUMNS, *table])
            self.mlflow.log_text(text.getvalue(), f"samples/step_{step:06}.csv")

    def close(self, end: End) -> None:
        self.mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end])


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Sender:
    """Calls a tracker in a thread, in the order of the calls."""

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self.name, self.works = name, True
        self.thread = ThreadPoolExecutor(1)
        self.tracker = self.thread.submit(make)
        self.calls: deque[Future[Any]] = deque([self.tracker])  # calls whose end is not known yet

    def send(self, call: Callable[[Tracker], object]) -> None:
        """Begin a call. Warn if an earlier one has failed."""
        self.look()
        if len(self.calls) >= BACKLOG:
            self.stop(f"it is {BACKLOG} calls behind")
        if self.works:
            self.calls.append(self.thread.submit(lambda: call(self.tracker.result())))

    def look(self) -> None:
        """Forget calls that have ended. After an error, warn and stop."""
        while self.calls and self.calls[0].done():
            if error := self.calls.popleft().exception():
                self.stop(f"{type(error).__name__}: {' '.join(str(error).split())[:600]}")

    def stop(self, why: str) -> None:
        """Make no further call."""
        self.works = False
        self.calls.clear()
        self.thread.shutdown(wait=False, cancel_futures=True)
        print(f"warning: log.to: {self.name} is off from here on, and the run goes on without it: {why}", flush=True)


class Trackers:
    """The trackers of a run: none on other ranks than 0."""

    def __init__(self, config: Config, start: int, own: str = ""):
        """start: number of steps that the run has done. own: name of a mode that does not train, else ""."""
        out = Path(config.out)
        name = f"{out.resolve().name}/{own}".rstrip("/")
        public = dict(settings(config))
        self.senders = []
        self.tables = ThreadPoolExecutor(1)
        for kind in config.log.to:
            id_file = None if own else out / f"{kind}.id"
            origin = Origin(name, out / own, start, public, id_file)
            self.senders.append(Sender(kind, partial(TRACKERS[kind], origin)))

    def write(self, step: int, values: Mapping[str, float], lines: Sequence[Callable[[], Mapping[str, Any]]]) -> None:
        """Send the metrics of a step, and its sampled responses. A call of lines returns a line of the recorder.

        A thread makes the table, once for all trackers.
        """
        if self.senders:
            known, table = dict(values), self.tables.submit(_table, lines)
            for sender in self.senders:
                sender.send(lambda tracker: tracker.write(step, known, table.result()))

    def close(self, end: End) -> None:
        """End the trackers' runs. It waits for them as PATIENCE says. Meanwhile the watchdog sees progress."""
        limit = PATIENCE[end]
        for sender in self.senders:
            sender.send(lambda tracker: tracker.close(end))
        calls = [call for sender in self.senders for call in sender.calls]
        last = time.monotonic() + limit
        while (left := last - time.monotonic()) > 0 and wait(calls, min(left, 0.5)).not_done:
            progress.move()
        for sender in self.senders:
            sender.look()
            if sender.calls:
                sender.stop(f"it has not finished {limit:g} s after the run")


def check(config: Config) -> None:
    """Raise UserError if the package of a tracker is not installed, or cannot be used."""
    for kind in config.log.to:
        tracker = TRACKERS[kind]
        if not lazy.package(tracker.module):
            package = tracker.package
            raise UserError(f"log.to={kind} needs the package {package}: pip install {package}, or change log.to")
        if fault := tracker.fault():
            raise UserError(f"log.to={kind} {fault}")


def settings(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield key and value of the configuration, as on the command line, but no secrets.

    A value is a number, a boolean or a text. judge.key is left out. Addresses lose passwords and queries.
    """
    tree = asdict(config)
    tree |= tree.pop("sections")

    def flat(where: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for name, held in value.items():
                yield from flat(f"{where}.{name}".lstrip("."), held)
        elif not where.endswith(".key"):
            text = ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
            yield where, _cut(_clean(text)) if isinstance(text, str) else text

    yield from flat("", tree)


def _clean(text: str) -> str:
    """Return the text without user names, passwords and queries of addresses."""
    return re.sub(r"(\w+://)(?:[^/?#\s]*@)?([^?#\s]*)[?#]?[^\s]*", r"\1\2", text)


def _accepted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values under names that MLflow accepts. In files it cannot store both of the names reward and reward/x."""
    return {re.sub(r"[^\w. -]", "_", name.replace("/", "."))[:NAME]: value for name, value in values.items()}


def _table(lines: Sequence[Callable[[], Mapping[str, Any]]]) -> Table:
    return [[_cut(line[name]) for name in COLUMNS] for line in (make() for make in lines)]


def _cut(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= LONGEST:
        return value
    return f"{value[: LONGEST // 2]} ... {value[-LONGEST // 2 :]}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |\n"

    return line(columns) + line(["---"] * len(columns)) + "".join(map(line, rows))
