"""The command line: python -m rlhf MODE [CONFIG.toml ...] [key=value ...].

On each node, this program runs first as the launcher. The launcher checks the configuration and all inputs, starts the
program again once per rank, and waits for the ranks. A rank runs the training loop; torchrun and srun can also start
ranks. In a Slurm allocation, a process that srun did not start (for example a batch script) calls srun first.
"""

from __future__ import annotations

import glob
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn

from rlhf.interrupt import SIGNALS, srun_reports


def leave(number: int, frame: FrameType | None) -> None:
    """End the process when a signal comes during the imports of this program."""
    if not srun_reports(number, os.environ):
        os.write(2, f"rlhf: ended by {signal.Signals(number).name} before anything began\n".encode())
    os._exit(128 + number)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt when a signal comes before the ranks start, so that partly written files are removed."""
    raise KeyboardInterrupt(number)


def answer(handler: Callable[[int, FrameType | None], None]) -> None:
    """Use the handler for SIGNALS.

    On ranks, signals end the process without a message until training begins (rlhf.interrupt). Their launcher prints
    one.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # shells ignore SIGINT for background processes
            signal.signal(number, signal.SIG_DFL if "LOCAL_RANK" in os.environ else handler)


if __name__ == "__main__":
    answer(leave)

from rlhf import cluster, configuration, convert, launcher, output, variables, watchdog  # noqa: E402, because imports are slow
from rlhf.algorithms import ALGORITHMS, ALIASES  # noqa: E402
from rlhf.config import Config  # noqa: E402
from rlhf.errors import LostError, UserError, said, told  # noqa: E402

if TYPE_CHECKING:
    from rlhf.prepare import Inputs

COMMAND = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "rlhf"]


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit code.

    0: success. 2: a mistake of the user. 1: a fault during the run. 128 + signal: a signal ended the command.
    interrupt.SAVED: a signal ended the run after a checkpoint. interrupt.HUNG: no rank made progress.
    Mistakes and known faults print one line.
    """
    return told("rlhf", lambda: carry_out(arguments), tell)


def carry_out(arguments: list[str]) -> int:
    """Run the command line and return the exit code. Raises the errors that told() prints."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    mode, rest = ALIASES.get(arguments[0], arguments[0]), arguments[1:]
    if mode == "convert" or mode in convert.TUTORIAL:
        stands_alone = mode == "convert" or "-h" in rest or "--help" in rest
        convert.main(rest if stands_alone else [*convert.tutorial(mode, os.environ), *rest])
        return 0
    if mode == "report":
        from rlhf.report import command

        command.main(rest)
        return 0
    if mode not in ALGORITHMS:
        raise UserError(f"unknown mode {mode!r}: choose one of {', '.join(ALGORITHMS)}")
    if "-h" in rest or "--help" in rest:
        keys = f"Keys (key=value), their defaults and meanings:\n{configuration.manual(ALGORITHMS[mode].defaults)}"
        print(f"{mode}: {ALGORITHMS[mode].summary}\n\n{keys}")
        return 0
    dry = "--dry-run" in rest
    rest = [argument for argument in rest if argument != "--dry-run"]
    config = configuration.load(mode, variables.arguments(mode, rest, os.environ))
    if not dry and cluster.in_allocation(os.environ):
        return cluster.step([*COMMAND, *arguments], os.environ, config.watchdog.requeue)
    from rlhf.prepare import located

    config = located(config)
    if dry:
        return explain(config)
    os.environ.update(task := cluster.task(os.environ))
    if task and gpus() == 1:
        os.environ["LOCAL_RANK"] = "0"  # with srun --gpus-per-task=1 each rank sees only its own GPU
    if ALGORITHMS[mode].judged:
        return judge(config, arguments, bool(task))
    return join(config, bool(task)) if "LOCAL_RANK" in os.environ else launch(config, arguments)


def judge(config: Config, arguments: list[str], has_own: bool) -> int:
    """Run a mode whose responses a judge grades. Return the exit code. has_own: as in join()."""
    from rlhf import benchmark

    if "LOCAL_RANK" in os.environ:
        first = cluster.number(os.environ, "RANK", 0) == 0
        return benchmark.run(config, lambda alone, _: join(alone, has_own), None, first)
    node = cluster.node(os.environ)
    world = node.count * ranks_per_node(config, node.count)
    return benchmark.run(config, lambda alone, more: launch(alone, [*arguments, *more]), world, node.index == 0)


def tell(line: str, code: int) -> None:
    """Print an error.

    Most errors occur on all ranks. Rank 0 prints at once. Other ranks wait a second before they print. In this second,
    the launcher or srun usually ends them.
    """
    if srun_reports(code - 128, os.environ):
        return
    if os.environ.get("RANK", os.environ.get("SLURM_NODEID", "0")) != "0":
        signal.signal(signal.SIGTERM, lambda *_: end(code))
        time.sleep(1)
    said(line, code)


def usage() -> str:
    modes = "\n".join(f"  {mode:10} {algorithm.summary}" for mode, algorithm in ALGORITHMS.items())
    return (
        "usage: ./launch.sh MODE [CONFIG.toml ...] [key=value ...]\n\nModes:\n"
        f"{modes}\n  {'convert':10} convert weights between formats and layouts (also convert_hf_to_megatron, "
        "convert_megatron_to_hf)\n"
        f"  {'report':10} write an HTML file with curves, times, memory, configurations and samples of runs\n"
        f"  {'prepare_data'} convert downloaded public data sets into the files that the modes read\n"
        f"  {'demo':10} SFT and GRPO on a small task, from generated data to an aligned model\n"
        f"  {'tutorial':10} all six modes on a small task, and two tables of the five models\n"
        f"  {'test':10} run lint, type checks and all tests; arguments are passed to pytest, to run only some tests\n"
        f"  {'install':10} cpu or gpu: install all packages into .venv-cpu or .venv-gpu (a mode does this itself when "
        "needed)\n\n"
        "./launch.sh MODE --help lists all keys. --dry-run prints the batch sizes and the memory of a run without "
        "starting it.\n\n"
        "Shell variables (they override TOML files, and key=value overrides them):\n"
        + "\n".join(f"  {name:22} {key:18} {meaning} [{modes}]" for name, key, modes, meaning in variables.rows())
    )


def explain(config: Config) -> int:
    """Print what a run would do on the nodes that the environment variables give (--dry-run)."""
    nodes = cluster.number(os.environ, "WORLD_SIZE", cluster.number(os.environ, "SLURM_NNODES", 1))
    from rlhf import benchmark, dryrun

    runs = [config]
    if ALGORITHMS[config.mode].judged:
        print(benchmark.plan(config))
        runs = [benchmark.own(config, model) for model in benchmark.missing(config, benchmark.models(config))]
    for each in runs:
        dryrun.show(each, nodes * ranks_per_node(each, nodes))
    return 0


def launch(config: Config, arguments: list[str]) -> int:
    """Run the launcher of one node. Returns the exit code of its ranks."""
    node = cluster.node(os.environ)
    count = ranks_per_node(config, node.count)
    if count > cluster.MOST_RANKS:
        raise UserError(
            f"parallel.* needs {count} ranks on a node, but at most {cluster.MOST_RANKS} are allowed: "
            "lower parallel.tp, pp, cp or dp"
        )
    check_devices(count)
    if node.index == 0:
        cluster.check_port(node)
    from rlhf.prepare import inputs

    found = inputs(config, node.count * count)
    _check_memory(config, found, node.count * count, count)
    if node.index == 0 and (set_by_variables := variables.settings(config.mode, os.environ)):
        print("variables:", *(f"{key}={value}" for key, value in set_by_variables.items()), flush=True)
    quiet = {} if gpus() else {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # on a CPU vLLM prints a warning for each memory policy
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))}
    ranks = cluster.ranks_of(node, count, os.environ)
    return launcher.run([*COMMAND, *arguments], [{**threads, **quiet, **os.environ, **rank} for rank in ranks])


def _check_memory(config: Config, found: Inputs, world: int, ranks: int) -> None:
    """Raise UserError if the memory of this node is too small for its ranks."""
    import psutil

    from rlhf.ledger import GIB, Ledger

    device, free = config.memory.device, math.inf
    if not gpus():
        device, free = math.inf, psutil.virtual_memory().total / GIB / ranks
    if device:  # else each rank checks later, with the memory of its own device
        size = 2 if config.dtype == "bfloat16" or (config.dtype == "auto" and gpus()) else 4
        Ledger(config, found.arch, found.roles, world, device, size).check(free)


def ranks_per_node(config: Config, nodes: int) -> int:
    """Return the ranks per node: all GPUs (GPUS_PER_NODE overrides), or on a CPU what the layout needs."""
    p = config.parallel
    devices = cluster.number(os.environ, "GPUS_PER_NODE", 0, most=cluster.MOST_RANKS) or gpus()
    asked = p.tp * p.pp * p.cp * max(p.dp, 1)
    if not devices:
        return max(1, -(-asked // nodes))
    return min(devices, -(-asked // nodes)) if p.dp else devices


def check_devices(ranks: int) -> None:
    """Raise UserError if this node has GPUs, but fewer than ranks. Without GPUs, the ranks run on CPUs."""
    if 0 < gpus() < ranks:
        raise UserError(f"{ranks} ranks on a node with {gpus()} GPUs: start fewer ranks, or set GPUS_PER_NODE")


def gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def join(config: Config, has_own: bool) -> int:
    """Run one rank that a launcher, torchrun or srun has started. Return its exit code.

    has_own: the rank may see only its own GPU, so the number of GPUs is not checked.
    """
    from rlhf.shapes import check_world

    world = cluster.world(os.environ)
    check_world(config.parallel, world)
    if not has_own:
        check_devices(cluster.number(os.environ, "LOCAL_WORLD_SIZE", world))
    return run(config)


def run(config: Config) -> int:
    """Run one rank under its watchdog. Returns its exit code."""
    env, place = os.environ, "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
    folder = Path(config.out, "watchdog", place.replace("/", "_"))
    rank, world = (cluster.number(env, name) for name in ("RANK", "WORLD_SIZE"))
    watcher = os.getpid()
    code = watchdog.supervised(config.watchdog, folder, rank, world, place, lambda: run_rank(config))
    return code if os.getpid() == watcher else end(code)


def run_rank(config: Config) -> int:
    """Run one rank in this process. Returns its exit code."""
    import logging
    import warnings

    os.environ.setdefault("TQDM_DISABLE", "1")  # hides the progress bars of vLLM; tqdm reads it at import
    # These warnings do not help a user: missing optional packages, deprecations, experimental modules.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed|torch\.cuda")
    for name in ("megatron", "torch._library"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.excepthook = fail
    for number in SIGNALS:  # before the loop, a signal ends the rank without a traceback
        signal.signal(number, signal.SIG_DFL)
    # megatron-core needs this to start transfers before matrix products.
    if config.parallel.tp > 1 and not config.parallel.exchanges:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from rlhf import assemble

    try:
        return assemble.run(config)
    except RuntimeError as error:
        from rlhf.parallel.mesh import lost

        if not (text := lost(error)):
            raise
        raise LostError(
            f"another rank has ended, or does not answer ({text}); start again with the same command"
        ) from None


def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the exception and end this rank at once. The launcher then ends the other ranks, which may wait for it."""
    sys.stderr = sys.__stderr__  # torch.distributed captures stderr and would print it only after this function
    sys.__excepthook__(kind, error, trace)
    end(1)


def end(code: int) -> NoReturn:
    """Flush the output and end the process without the interpreter's exit handlers.

    In these handlers the engine and torch.distributed would destroy each other's process groups.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if {"-h", "--help", "--dry-run"} & {*sys.argv[1:]}:  # `| head` may close the pipe
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    output.secure()
    answer(interrupt)
    end(main(sys.argv[1:]))
