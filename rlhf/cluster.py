"""Which nodes run a job and which of them this is, read off an environment: Slurm's variables, or those that other launchers set.

MASTER_ADDR, MASTER_PORT, WORLD_SIZE (nodes) and RANK (this node) win over what Slurm says.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from rlhf.errors import UserError
from rlhf.interrupt import SAVED, SIGNALS

REQUEUE = (SAVED, 128 + signal.SIGUSR1)  # exit codes of a run that was preempted: in its loop, or before
NO_STEP = 0xFFFFFFF0  # from here on Slurm's numbers of steps are special ones
MOST_RANKS = 256  # of a node
SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface
Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Node:
    """This node's place among those of a run."""

    index: int
    count: int
    address: str  # of node 0, where the ranks meet
    port: int


def node(env: Environment) -> Node:
    """Where the launcher of this node is. Raises UserError for variables that contradict each other."""
    _check_interface(env)
    step = in_step(env)
    count = number(env, "WORLD_SIZE", number(env, "SLURM_STEP_NUM_NODES") if step else 1, least=1)
    index = number(env, "RANK", number(env, "SLURM_NODEID") if step else 0)
    if index >= count:
        raise UserError(f"RANK={index} is not below WORLD_SIZE={count}: they count nodes, the first is 0")
    if count == 1:
        return Node(index, count, "127.0.0.1", _port(env, 0) or free_port())  # whatever MASTER_ADDR other nodes were to go to
    if not step and not env.get("MASTER_ADDR"):
        raise UserError(
            f"WORLD_SIZE={count} nodes, but MASTER_ADDR is not set: set it to the address of the node with RANK=0, on all of them"
        )
    return Node(index, count, *_meeting(env))


def world(env: Environment) -> int:
    """The number of all ranks, for a process that another launcher, such as torchrun, has started as one of them.

    Raises UserError for variables that are missing, or contradict each other.
    """
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
        raise UserError(f"LOCAL_RANK is set, but {missing[0]} is not: start with torchrun, which sets both, or unset LOCAL_RANK")
    _check_interface(env)
    ranks = number(env, "WORLD_SIZE", least=1)
    of_node = number(env, "LOCAL_WORLD_SIZE", ranks, least=1)
    for name, most in (("RANK", ranks), ("LOCAL_RANK", of_node)):
        number(env, name, most=most - 1)
    _port(env, 0)
    return ranks


def task(env: Environment) -> dict[str, str]:
    """What torchrun would have set, where srun started one task per rank; empty where it started one launcher per node, and elsewhere."""
    if "LOCAL_RANK" in env or not in_step(env):
        return {}
    ranks, nodes = (number(env, f"SLURM_STEP_NUM_{what}", least=1) for what in ("TASKS", "NODES"))
    if ranks == nodes:
        return {}
    rank, local, index = (number(env, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NODEID"))
    per_node = ranks // nodes
    if rank != index * per_node + local or local >= per_node:
        raise UserError(f"{ranks} tasks on {nodes} nodes are not dealt in equal blocks: srun --ntasks-per-node=N --distribution=block")
    return ranks_of(Node(index, nodes, *_meeting(env)), per_node, env)[local]


def ranks_of(node: Node, count: int, env: Environment) -> list[dict[str, str]]:
    """The variables of each of a node's ranks, as torchrun names them."""
    every = {
        "MASTER_ADDR": node.address,
        "MASTER_PORT": str(node.port),
        "WORLD_SIZE": str(node.count * count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": str(node.index),
    }
    if node.count > 1 and "GLOO_SOCKET_IFNAME" not in env:
        every["GLOO_SOCKET_IFNAME"] = interface(node.address)
    return [every | {"RANK": str(node.index * count + local), "LOCAL_RANK": str(local)} for local in range(count)]


def in_step(env: Environment) -> bool:
    """Whether srun started this process. A batch script and the shell of salloc have no step, or one of Slurm's large special numbers."""
    return number(env, "SLURM_STEP_ID", NO_STEP, most=2**32) < NO_STEP


def in_allocation(env: Environment) -> bool:
    """Whether srun is still to be called: this is a batch script, or the shell of salloc, and nobody has dealt out the nodes by hand."""
    return bool(env.get("SLURM_JOB_ID")) and not in_step(env) and not {"LOCAL_RANK", "WORLD_SIZE"} & env.keys()


def step(command: list[str], env: Environment) -> int:
    """Run command once on every node of the allocation. Returns its highest exit code; a batch job that was preempted is requeued first."""
    nodes, job = number(env, "SLURM_NNODES", least=1), env["SLURM_JOB_ID"]
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1", "--export=ALL"]
    try:
        srun = subprocess.Popen(["srun", *options, *command])
    except FileNotFoundError:
        raise UserError(
            f"SLURM_JOB_ID={job}, but there is no srun, as inside of a container: call srun outside of it, or unset SLURM_JOB_ID here"
        ) from None
    for signal_number in SIGNALS:  # srun would answer SIGTERM with the end of the step; USR1 reaches the ranks
        signal.signal(signal_number, lambda *_: srun.send_signal(signal.SIGUSR1))
    code = srun.wait()
    batch = "SLURM_PROCID" in env  # the shell of salloc has none
    if code in REQUEUE and batch and _running(job):
        subprocess.run(["scontrol", "requeue", job], check=False)
    return code


def _running(job: str) -> bool:
    """False where the job is ending anyhow, because it was cancelled or because Slurm itself has requeued it."""
    return bool(subprocess.run(["squeue", "--noheader", "--states=RUNNING", f"--jobs={job}"], capture_output=True, check=False).stdout)


def hosts(text: str) -> list[str]:
    """The names in one of Slurm's lists: "n[01-03,7],m1" -> n01 n02 n03 n7 m1."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        found = re.fullmatch(r"(.*?)\[([^\]]*)\](.*)", part)
        if not found:
            names.append(part)
            continue
        head, ranges, tail = found.groups()
        for item in ranges.split(","):
            first, _, last = item.partition("-")
            if not (first.isdecimal() and (last or first).isdecimal()):
                raise UserError(f"{text}: not one of Slurm's lists of nodes, such as n[01-03,7]")
            numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
            names += [name for number in numbers for name in hosts(head + number + tail)]
    return names


def interface(address: str) -> str:
    """The network interface that reaches address: gloo would take the one that the host's own name resolves to, on Debian the loopback."""
    own = _source(address)
    if own.startswith("127."):  # on node 0 itself: the way out, if there is one
        with suppress(OSError):
            own = _source("192.0.2.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # has no IPv4 address
                if socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24]) == own:
                    return name
    return "lo"


def _check_interface(env: Environment) -> None:
    """Raise UserError where gloo is to use what this node does not have."""
    wanted, held = env.get("GLOO_SOCKET_IFNAME", ""), [name for _, name in socket.if_nameindex()]
    if wanted and not {*wanted.split(",")} <= {*held}:
        raise UserError(f"GLOO_SOCKET_IFNAME={wanted} is no network interface of this node: unset it, or choose of {', '.join(held)}")


def _source(address: str) -> str:
    """The address that packets to another would have as their sender. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except socket.gaierror as error:
            raise UserError(
                f"MASTER_ADDR={address} is not known on {socket.gethostname()}: {error.strerror}; set it to an address"
            ) from None
        return probe.getsockname()[0]


def _meeting(env: Environment) -> tuple[str, int]:
    """Address and port where the ranks of several processes meet: those that are set, or the step's first node and a port of its own."""
    port = 29500
    if in_step(env):
        port = 10000 + (7 * number(env, "SLURM_JOB_ID") + number(env, "SLURM_STEP_ID", most=2**32)) % 20000
    return env.get("MASTER_ADDR") or hosts(_given(env, "SLURM_STEP_NODELIST"))[0], _port(env, port)


def _port(env: Environment, default: int) -> int:
    return number(env, "MASTER_PORT", default, least=1, most=65535)


def number(env: Environment, name: str, default: int | None = None, *, least: int = 0, most: int = 2**31 - 1) -> int:
    """The value of a variable, or the default where it is not set or empty. Raises UserError, also where neither is there."""
    text = env.get(name)
    if not text and default is not None:
        return default
    text = text or _given(env, name)
    if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
        raise UserError(f"{name}={text:.80} is not a number from {least} to {most}: unset it, or give one")
    return int(text)


def _given(env: Environment, name: str) -> str:
    if not env.get(name):
        raise UserError(f"{name} is not set, though other variables of Slurm are: start with srun, or unset SLURM_JOB_ID and SLURM_STEP_ID")
    return env[name]


def check_port(node: Node) -> None:
    """Raise UserError where the ranks cannot meet on the first node, which this is, because another program has the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", node.port))
        except OSError as error:
            raise UserError(f"MASTER_PORT={node.port}: {error.strerror}; set it to another one, or unset it") from None


def free_port() -> int:
    """A port that nobody listens on, below those that Linux hands out by itself, where it could be gone again in a moment."""
    for port in range(10000 + os.getpid() % 20000, 65536):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("no port is free: set MASTER_PORT")
