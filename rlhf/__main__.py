"""The command line: python -m rlhf MODE [CONFIG.toml ...] [key=value ...].

Started by a person (or once per node by a scheduler), it checks the configuration and every input, then becomes torchrun, which starts
this module again once per rank. Started as a rank (LOCAL_RANK is set), it runs the loop.
"""

from __future__ import annotations

import glob
import os
import sys

from rlhf import configuration
from rlhf.config import MODES, Config
from rlhf.contracts import UserError


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 2 after a user's mistake, told in one line on stderr."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    mode, *rest = arguments
    try:
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
        if "-h" in rest or "--help" in rest:
            print(f"{mode}: {MODES[mode]}\n\nKeys (key=value), their defaults and meanings:\n{configuration.manual()}")
            return 0
        config = configuration.load(mode, rest)
        if "LOCAL_RANK" in os.environ:
            return run(config)
        nodes, ranks = world(config)
        from rlhf.prepare import inputs

        inputs(config, nodes * ranks)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"rlhf: {error}", file=sys.stderr)
        return 2
    return launch(nodes, ranks, arguments)


def usage() -> str:
    modes = "\n".join(f"  {mode:10} {meaning}" for mode, meaning in MODES.items())
    return (
        "usage: ./launch.sh MODE [CONFIG.toml ...] [key=value ...]\n\nModes:\n"
        f"{modes}\n  {'demo':10} the whole way on a small task, from nothing to an aligned model\n  {'test':10} lint and tests\n\n"
        "./launch.sh MODE --help lists every key."
    )


def world(config: Config) -> tuple[int, int]:
    """Nodes, and ranks on each: all GPUs (GPUS_PER_NODE overrides), or on a CPU as many as the layout asks for."""
    p = config.parallel
    nodes = int(os.environ.get("WORLD_SIZE", "1"))  # of nodes, as cluster launchers set it before torchrun does
    devices = int(os.environ.get("GPUS_PER_NODE", "0")) or gpus()
    asked = p.tp * p.pp * p.cp * max(p.dp, 1)
    if not devices:
        return nodes, max(1, -(-asked // nodes))
    return nodes, min(devices, -(-asked // nodes)) if p.dp else devices


def gpus() -> int:
    """NVIDIA devices this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def launch(nodes: int, ranks: int, arguments: list[str]) -> int:
    """Become torchrun, or for a single rank just the rank."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not gpus():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM warns of every memory policy it sets on a CPU
    if nodes == ranks == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.execv(sys.executable, [sys.executable, "-m", "rlhf", *arguments])
    where = ["--standalone"]
    if nodes > 1:
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
        where = [f"--nnodes={nodes}", f"--node-rank={os.environ.get('RANK', '0')}", f"--master-addr={address}", f"--master-port={port}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks}", "-m", "rlhf"]
    os.execv(sys.executable, [*torchrun, *arguments])


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(config: Config) -> int:
    """Be one rank."""
    import logging
    import warnings

    # What the engines say to their own developers: absent optional packages, deprecations, experimental modules.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed|torch\.cuda")
    for name in ("megatron", "torch._library"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from rlhf import loop

    signal = loop.run(config)
    sys.stdout.flush()
    sys.stderr.flush()
    # The engine and torch.distributed take each other's process groups down at interpreter exit: end here, with everything written.
    os._exit(128 + signal if signal else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
