"""Find the nodes of a job and this node's index, from the environment variables of Slurm or of another launcher.

MASTER_ADDR, MASTER_PORT, WORLD_SIZE (number of nodes) and RANK (index of this node) override Slurm's variables.
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
from rlhf.interrupt import HUNG, SAVED, SIGNALS

REQUEUE = (SAVED, 128 + signal.SIGUSR1)  # exit codes of a preempted run: during the loop, or before it
NO_STEP = 0xFFFFFFF0  # Slurm gives special meanings to step ids from here on
MOST_RANKS = 256  # per node
SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface
Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Node:
    """This node among the nodes of a run."""

    index: int
    count: int
    address: str  # of node 0, to which all ranks connect
    port: int


def node(env: Environment) -> Node:
    """Return the node of this launcher. Raises UserError if the variables contradict each other."""
    _check_interface(env)
    step = in_step(env)
    count = number(env, "WORLD_SIZE", number(env, "SLURM_STEP_NUM_NODES") if step else 1, least=1)
    index = number(env, "RANK", number(env, "SLURM_NODEID") if step else 0)
    if index >= count:
        raise UserError(f"RANK={index} is not below WORLD_SIZE={count}: both count nodes, the first node has RANK=0")
    if count == 1:
        return Node(index, count, "127.0.0.1", _port(env, 0) or free_port())  # MASTER_ADDR is not needed
    if not step and not env.get("MASTER_ADDR"):
        raise UserError(
            f"WORLD_SIZE={count} nodes, but MASTER_ADDR is not set: "
            "set it on all nodes to the address of the node with RANK=0"
        )
    return Node(index, count, *_meeting(env))


def world(env: Environment) -> int:
    """Return the number of all ranks. Call it in a rank that another launcher, such as torchrun, has started.

    Raises UserError if variables are missing or contradict each other.
    """
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
        raise UserError(
            f"LOCAL_RANK is set, but {missing[0]} is not: start with torchrun, which sets both, or unset LOCAL_RANK"
        )
    _check_interface(env)
    ranks = number(env, "WORLD_SIZE", least=1)
    of_node = number(env, "LOCAL_WORLD_SIZE", ranks, least=1)
    for name, most in (("RANK", ranks), ("LOCAL_RANK", of_node)):
        number(env, name, most=most - 1)
    _port(env, 0)
    return ranks


def task(env: Environment) -> dict[str, str]:
    """Return torchrun's variables for this rank if srun started one task per rank, else an empty dict."""
    if "LOCAL_RANK" in env or not in_step(env):
        return {}
    ranks, nodes = (number(env, f"SLURM_STEP_NUM_{what}", least=1) for what in ("TASKS", "NODES"))
    if ranks == nodes:
        return {}
    rank, local, index = (number(env, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NODEID"))
    per_node = ranks // nodes
    if rank != index * per_node + local or local >= per_node:
        raise UserError(
            f"{ranks} tasks on {nodes} nodes are not in equal blocks: use srun --ntasks-per-node=N --distribution=block"
        )
    return ranks_of(Node(index, nodes, *_meeting(env)), per_node, env)[local]


def ranks_of(node: Node, count: int, env: Environment) -> list[dict[str, str]]:
    """Return the variables of each rank of a node, with torchrun's names."""
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
    """Return whether srun started this process. A batch script has no step id, or a special one."""
    return number(env, "SLURM_STEP_ID", NO_STEP, most=2**32) < NO_STEP


def in_allocation(env: Environment) -> bool:
    """Return whether to call srun: this is a batch script or a shell of salloc, not started by another launcher."""
    return bool(env.get("SLURM_JOB_ID")) and not in_step(env) and not {"LOCAL_RANK", "WORLD_SIZE"} & env.keys()


def step(command: list[str], env: Environment, hung: bool = False) -> int:
    """Run the command once per node of the allocation with srun, and return the highest exit code.

    If this is a batch job and the run was preempted, requeue the job before returning. hung: requeue it also if the
    watchdog has ended the run.
    """
    nodes, job = number(env, "SLURM_NNODES", least=1), env["SLURM_JOB_ID"]
    options = [
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--kill-on-bad-exit=1",
        "--wait=0",  # in mode mtbench, the first node calls the judge when the others have ended
        "--export=ALL",
    ]
    try:
        srun = subprocess.Popen(["srun", *options, *command])
    except FileNotFoundError:
        raise UserError(
            f"SLURM_JOB_ID={job}, but srun is not found: call srun outside of the container, or unset SLURM_JOB_ID"
        ) from None
    for signal_number in SIGNALS:  # srun passes USR1 to the ranks, but ends the step at SIGTERM
        signal.signal(signal_number, lambda *_: srun.send_signal(signal.SIGUSR1))
    code = srun.wait()
    batch = "SLURM_PROCID" in env  # a shell of salloc has no SLURM_PROCID
    if (code in REQUEUE or (hung and code == HUNG)) and batch and _running(job):
        subprocess.run(["scontrol", "requeue", job], check=False)
    return code


def _running(job: str) -> bool:
    """Return whether the job is still running, and was neither cancelled nor requeued by Slurm."""
    return bool(
        subprocess.run(
            ["squeue", "--noheader", "--states=RUNNING", f"--jobs={job}"], capture_output=True, check=False
        ).stdout
    )


def hosts(text: str) -> list[str]:
    """Return the host names in a Slurm node list: "n[01-03,7],m1" -> n01 n02 n03 n7 m1."""
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
                raise UserError(f"{text} is not a Slurm node list, such as n[01-03,7]: start with srun")
            numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
            names += [name for number in numbers for name in hosts(head + number + tail)]
    return names


def interface(address: str) -> str:
    """Return the network interface that reaches `address`.

    gloo's own choice is the interface of the host name's address. On Debian this is the loopback interface.
    """
    own = _source(address)
    if own.startswith("127."):  # this is node 0: take the interface of the default route, if there is one
        with suppress(OSError):
            own = _source("192.0.2.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # this interface has no IPv4 address
                if socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24]) == own:
                    return name
    return "lo"


def _check_interface(env: Environment) -> None:
    """Raise UserError if GLOO_SOCKET_IFNAME names a network interface that this node does not have."""
    wanted, held = env.get("GLOO_SOCKET_IFNAME", ""), [name for _, name in socket.if_nameindex()]
    if wanted and not {*wanted.split(",")} <= {*held}:
        raise UserError(
            f"GLOO_SOCKET_IFNAME={wanted} is not a network interface of this node: "
            f"unset it, or choose one of {', '.join(held)}"
        )


def _source(address: str) -> str:
    """Return the local address from which packets to `address` are sent. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except socket.gaierror as error:
            host, reason = socket.gethostname(), error.strerror
            raise UserError(
                f"MASTER_ADDR={address} cannot be resolved on {host}: {reason}; set it to an IP address"
            ) from None
        return probe.getsockname()[0]


def _meeting(env: Environment) -> tuple[str, int]:
    """Return the address and port at which the ranks connect: from MASTER_*, or else derived from the Slurm step."""
    port = 29500
    if in_step(env):
        port = 10000 + (7 * number(env, "SLURM_JOB_ID") + number(env, "SLURM_STEP_ID", most=2**32)) % 20000
    return env.get("MASTER_ADDR") or hosts(_given(env, "SLURM_STEP_NODELIST"))[0], _port(env, port)


def _port(env: Environment, default: int) -> int:
    return number(env, "MASTER_PORT", default, least=1, most=65535)


def number(env: Environment, name: str, default: int | None = None, *, least: int = 0, most: int = 2**31 - 1) -> int:
    """Return a variable's value, or the default if it is unset or empty. Raises UserError if it is wrong or missing."""
    text = env.get(name)
    if not text and default is not None:
        return default
    text = text or _given(env, name)
    if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
        raise UserError(f"{name}={text:.80} is not a number from {least} to {most}: unset it or correct it")
    return int(text)


def _given(env: Environment, name: str) -> str:
    if not env.get(name):
        raise UserError(
            f"{name} is not set, but other Slurm variables are set: "
            "start with srun, or unset SLURM_JOB_ID and SLURM_STEP_ID"
        )
    return env[name]


def check_port(node: Node) -> None:
    """Raise UserError if another program uses the port. Call it on the first node."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", node.port))
        except OSError as error:
            raise UserError(f"MASTER_PORT={node.port}: {error.strerror}; set it to another port, or unset it") from None


def free_port() -> int:
    """Return a free port.

    It is below the range from which Linux assigns ports itself, so no other program gets it by chance in the meantime.
    """
    for port in range(10000 + os.getpid() % 20000, 65536):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("found no free port: set MASTER_PORT")
