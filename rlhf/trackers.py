"""Sends the metrics, the configuration and sampled responses of a run to TensorBoard, wandb or MLflow (log.to).

Only rank 0 does. Each tracker has a thread, so no step waits for it. A tracker that raises an error, or that cannot
keep up, prints one warning and is off for the rest of the run.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rlhf.config import Config
from rlhf.errors import UserError

BACKLOG = 256  # calls that wait for a tracker; with more, it cannot keep up
PATIENCE = 5.0  # seconds that the end of a run waits for its trackers; the launcher kills a rank ten after another
HURRY = 0.8  # the same after an error: the other ranks wait a second for rank 0 to print it
LONGEST = 2000  # characters of a text in the table of samples
COLUMNS = ("use", "row", "group", "reward", "finish", "prompt", "response")  # of the table; keys of recorder.describe()
PARAMETERS = 100  # limit of parameters in one of MLflow's requests

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

    package: str  # that must be installed

    def __init__(self, origin: Origin): ...

    def write(self, step: int, values: Mapping[str, float], table: Table) -> None:
        """Write the metrics and sampled responses of a step."""

    def close(self, failed: bool) -> None:
        """Write what is still missing. failed: an error has ended the run."""


class TensorBoard:
    """Event files in the folder of the run."""

    package = "tensorboard"

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

    def close(self, failed: bool) -> None:
        self.events.close()


class WandB:
    """A run of wandb. WANDB_PROJECT and its other variables apply; WANDB_MODE=offline writes to the run's folder.

    wandb refuses steps that it already has, so the step is an own metric, and the axis of the others.
    """

    package = "wandb"

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

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow. MLFLOW_TRACKING_URI says where it is stored, MLFLOW_EXPERIMENT_NAME in which experiment."""

    package = "mlflow"

    def __init__(self, origin: Origin):
        import mlflow

        self.mlflow, known = mlflow, origin.id
        run = mlflow.start_run(run_id=known or None, run_name=origin.name)
        origin.keep(run.info.run_id)
        items = [*_accepted(origin.config).items()]
        for i in range(0, 0 if known else len(items), PARAMETERS):  # MLflow refuses to change a parameter
            mlflow.log_params(dict(items[i : i + PARAMETERS]))

    def write(self, step: int, values: Mapping[str, float], table: Table) -> None:
        self.mlflow.log_metrics(_accepted(values), step=step)
        if table:
            text = io.StringIO()
            csv.writer(text).writerows([COLUMNS, *table])
            self.mlflow.log_text(text.getvalue(), f"samples/step_{step:06}.csv")

    def close(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


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
                self.stop(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

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
        for kind in config.log.to:
            id_file = None if own else out / f"{kind}.id"
            origin = Origin(name, out / own, start, public, id_file)
            self.senders.append(Sender(kind, partial(TRACKERS[kind], origin)))

    def write(self, step: int, values: Mapping[str, float], lines: Sequence[Mapping[str, Any]]) -> None:
        """Send the metrics of a step, and its sampled responses as described by the recorder."""
        if self.senders:
            known, table = dict(values), [[_cut(line[name]) for name in COLUMNS] for line in lines]
            for sender in self.senders:
                sender.send(lambda tracker: tracker.write(step, known, table))

    def close(self, failed: bool) -> None:
        """End the trackers' runs. It waits at most PATIENCE seconds, or HURRY. failed: an error has ended the run."""
        limit = HURRY if failed else PATIENCE
        for sender in self.senders:
            sender.send(lambda tracker: tracker.close(failed))
        wait([call for sender in self.senders for call in sender.calls], limit)
        for sender in self.senders:
            sender.look()
            if sender.calls:
                sender.stop(f"it has not finished {limit:g} s after the run")


def check(config: Config) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for kind in config.log.to:
        package = TRACKERS[kind].package
        found = importlib.util.find_spec(package)
        if not found or not found.origin:  # a folder of this name, such as that of wandb's files, is no package
            raise UserError(f"log.to={kind} needs the package {package}: pip install 'rlhf[{kind}]', or change log.to")


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
    return {re.sub(r"[^\w. -]", "_", name.replace("/", ".")): value for name, value in values.items()}


def _cut(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= LONGEST:
        return value
    return f"{value[: LONGEST // 2]} ... {value[-LONGEST // 2 :]}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |\n"

    return line(columns) + line(["---"] * len(columns)) + "".join(map(line, rows))
