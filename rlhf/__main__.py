"""The command line: python -m rlhf MODE [CONFIG.toml ...] [key=value ...].

Started once per node, it checks the configuration and every input, then starts itself once per rank and waits. Started as a rank, by
itself, by torchrun or by srun, it runs the loop. Started in a Slurm allocation but outside of a step, as by sbatch, it calls srun first.
"""

from __future__ import annotations

import glob
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from rlhf.interrupt import SIGNALS


def leave(number: int, frame: FrameType | None) -> None:
    """End at a signal that comes while this program is still being imported."""
    os.write(2, f"rlhf: ended by {signal.Signals(number).name} before anything began\n".encode())
    os._exit(128 + number)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Give up what is done before there are ranks to pass a signal on to; what is half written is removed."""
    raise KeyboardInterrupt(number)


def answer(handler: Callable[[int, FrameType | None], None]) -> None:
    """Answer SIGNALS so. Ranks simply end until they train (rlhf.interrupt): their launcher tells why."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for what runs in the background
            signal.signal(number, signal.SIG_DFL if "LOCAL_RANK" in os.environ else handler)


if __name__ == "__main__":
    answer(leave)

from rlhf import cluster, configuration, convert, launcher, output, variables  # noqa: E402, as imports take a while
from rlhf.algorithms import ALGORITHMS, ALIASES  # noqa: E402
from rlhf.config import Config  # noqa: E402
from rlhf.errors import LostError, UserError, said, told  # noqa: E402

if TYPE_CHECKING:
    from rlhf.prepare import Inputs

COMMAND = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "rlhf"]


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0; 2 after a mistake, 1 where training failed, told in one line; 128 + signal; SAVED after a signal."""
    return told("rlhf", lambda: carry_out(arguments), tell)


def carry_out(arguments: list[str]) -> int:
    """Do what the command line says. Returns the exit code, and raises what told() tells."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    mode, rest = ALIASES.get(arguments[0], arguments[0]), arguments[1:]
    if mode == "convert" or mode in convert.TUTORIAL:
        stands_alone = mode == "convert" or "-h" in rest or "--help" in rest
        convert.main(rest if stands_alone else [*convert.tutorial(mode, os.environ), *rest])
        return 0
    if mode not in ALGORITHMS:
        raise UserError(f"unknown mode {mode!r}: choose one of {', '.join(ALGORITHMS)}")
    if "-h" in rest or "--help" in rest:
        print(f"{mode}: {ALGORITHMS[mode].summary}\n\nKeys (key=value), their defaults and meanings:\n{configuration.manual()}")
        return 0
    dry = "--dry-run" in rest
    rest = [argument for argument in rest if argument != "--dry-run"]
    config = configuration.load(mode, variables.arguments(mode, rest, os.environ))
    if dry:
        return explain(config)
    if cluster.in_allocation(os.environ):
        return cluster.step([*COMMAND, *arguments], os.environ)
    os.environ.update(task := cluster.task(os.environ))
    if task and gpus() == 1:
        os.environ["LOCAL_RANK"] = "0"  # srun --gpus-per-task=1 shows each rank its own GPU only
    return join(config, bool(task)) if "LOCAL_RANK" in os.environ else launch(config, arguments)


def tell(line: str, code: int) -> None:
    """Say what went wrong. Most of it is everybody's: the first rank says it, and its launcher, or srun, ends the others meanwhile."""
    if os.environ.get("RANK", os.environ.get("SLURM_NODEID", "0")) != "0":
        signal.signal(signal.SIGTERM, lambda *_: end(code))
        time.sleep(1)
    said(line, code)


def usage() -> str:
    modes = "\n".join(f"  {mode:10} {algorithm.summary}" for mode, algorithm in ALGORITHMS.items())
    return (
        "usage: ./launch.sh MODE [CONFIG.toml ...] [key=value ...]\n\nModes:\n"
        f"{modes}\n  {'convert':10} weights between formats and layouts (also convert_hf_to_megatron, convert_megatron_to_hf)\n"
        f"  {'prepare_data'} public data sets, as they are downloaded, to the files that the modes read\n"
        f"  {'demo':10} the short way on a small task, from nothing to an aligned model\n"
        f"  {'tutorial':10} all six modes on a small task, and a table of its five models\n"
        f"  {'test':10} lint, types and all tests; with arguments only those tests, as pytest takes them\n"
        f"  {'install':10} cpu or gpu: all packages, into .venv-cpu or .venv-gpu (a mode does it by itself, as its machine needs it)\n\n"
        "./launch.sh MODE --help lists every key; with --dry-run a run is not started, but explained: its batch, its memory.\n\n"
        "Shell variables (they win over files and lose to key=value):\n"
        + "\n".join(f"  {name:22} {key:18} {meaning} [{modes}]" for name, key, modes, meaning in variables.rows())
    )


def explain(config: Config) -> int:
    """Show what a run would be, on the nodes that the environment tells of."""
    nodes = cluster.number(os.environ, "WORLD_SIZE", cluster.number(os.environ, "SLURM_NNODES", 1))
    from rlhf import dryrun

    dryrun.show(config, nodes * ranks_per_node(config, nodes))
    return 0


def launch(config: Config, arguments: list[str]) -> int:
    """Be the launcher of one node."""
    node = cluster.node(os.environ)
    count = ranks_per_node(config, node.count)
    if count > cluster.MOST_RANKS:
        raise UserError(f"parallel.* asks for {count} ranks on a node, of which {cluster.MOST_RANKS} are the most: lower it")
    check_devices(count)
    if node.index == 0:
        cluster.check_port(node)
    from rlhf.prepare import inputs

    found = inputs(config, node.count * count)
    _check_memory(config, found, node.count * count, count)
    if node.index == 0 and (set_by_variables := variables.settings(config.mode, os.environ)):
        print("variables:", *(f"{key}={value}" for key, value in set_by_variables.items()), flush=True)
    quiet = {} if gpus() else {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # vLLM warns of every memory policy it sets on a CPU
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))}
    ranks = cluster.ranks_of(node, count, os.environ)
    return launcher.run([*COMMAND, *arguments], [{**threads, **quiet, **os.environ, **rank} for rank in ranks])


def _check_memory(config: Config, found: Inputs, world: int, ranks: int) -> None:
    """What the ledger and the engine would refuse on each of this node's ranks. Raises UserError."""
    import psutil

    from rlhf.ledger import GIB, Ledger

    device, free = config.memory.device, math.inf
    if not gpus():
        device, free = math.inf, psutil.virtual_memory().total / GIB / ranks
    if device:  # else the ranks ask theirs
        size = 2 if config.dtype == "bfloat16" or (config.dtype == "auto" and gpus()) else 4
        Ledger(config, found.arch, found.roles, world, device, size).check(free)


def ranks_per_node(config: Config, nodes: int) -> int:
    """All GPUs (GPUS_PER_NODE overrides), or on a CPU as many as the layout asks for."""
    p = config.parallel
    devices = cluster.number(os.environ, "GPUS_PER_NODE", 0, most=cluster.MOST_RANKS) or gpus()
    asked = p.tp * p.pp * p.cp * max(p.dp, 1)
    if not devices:
        return max(1, -(-asked // nodes))
    return min(devices, -(-asked // nodes)) if p.dp else devices


def check_devices(ranks: int) -> None:
    """Raise UserError where this node has too few GPUs for so many ranks. One without any runs them on its CPUs."""
    if 0 < gpus() < ranks:
        raise UserError(f"{ranks} ranks on a node are more than its GPUs, {gpus()}: start fewer, or set GPUS_PER_NODE")


def gpus() -> int:
    """NVIDIA devices this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def join(config: Config, has_own: bool) -> int:
    """Be one of the ranks that a launcher, torchrun or srun has started. has_own: it may see its own GPU only."""
    from rlhf.prepare import check_world

    world = cluster.world(os.environ)
    check_world(config.parallel, world)
    if not has_own:
        check_devices(cluster.number(os.environ, "LOCAL_WORLD_SIZE", world))
    return run(config)


def run(config: Config) -> int:
    """Be one rank."""
    import logging
    import warnings

    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of vLLM's start; tqdm reads it when it is imported
    # What the engines say to their own developers: absent optional packages, deprecations, experimental modules.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed|torch\.cuda")
    for name in ("megatron", "torch._library"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.excepthook = fail
    for number in SIGNALS:  # until the loop begins they end a rank, without a traceback
        signal.signal(number, signal.SIG_DFL)
    if config.parallel.tp > 1 and not config.parallel.exchanges:  # megatron-core relies on it to start transfers before products
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from rlhf import assemble

    try:
        return assemble.run(config)
    except RuntimeError as error:
        from rlhf.parallel.mesh import lost

        if not (text := lost(error)):
            raise
        raise LostError(f"another rank has ended, or does not answer ({text}); start again with the same command") from None


def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a rank at once, so that the others, which may be waiting for it, are ended too."""
    sys.stderr = sys.__stderr__  # torch.distributed collects what a hook writes, to print it after the hook: that never comes
    sys.__excepthook__(kind, error, trace)
    end(1)


def end(code: int) -> None:
    """End with everything written, but without the interpreter's exit: there engine and torch.distributed close each other's groups."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if {"-h", "--help", "--dry-run"} & {*sys.argv[1:]}:  # only text, of which head or less may want a part: then it ends quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    output.secure()
    answer(interrupt)
    end(main(sys.argv[1:]))
