"""The number of a node or rank, from the variables of Slurm and other launchers.

Slurm's variables are taken from a real Slurm 22.05.
"""

from __future__ import annotations

import re
import socket

import pytest

from rlhf import cluster
from rlhf.errors import UserError

# The variables of srun --nodes=2 --ntasks=2 on the second node, and those of the job's batch script on the first.
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
}
BY_HAND = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.9", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu1", ["gpu1"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("n[9-11],m1,c[3,5]x", ["n9", "n10", "n11", "m1", "c3x", "c5x"]),
        ("rack[1-2]n[08-09].site", ["rack1n08.site", "rack1n09.site", "rack2n08.site", "rack2n09.site"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
    ],
)
def test_hosts(text: str, names: list[str]):
    assert cluster.hosts(text) == names


def test_a_port_that_another_program_has(monkeypatch: pytest.MonkeyPatch):
    """Both the launcher and a rank that another launcher has started report it."""
    from rlhf.parallel import mesh

    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=f"MASTER_PORT={port}: Address already in use; set it to another port, or unset it"
        ):
            cluster.check_port(cluster.Node(0, 1, "127.0.0.1", port))
        for name, value in (
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", str(port)),
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
        ):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: the ranks cannot connect there .*EADDRINUSE"):
            mesh._meet("gloo")
    cluster.check_port(cluster.Node(0, 1, "127.0.0.1", port))


def test_an_allocation_without_srun(monkeypatch: pytest.MonkeyPatch):
    """This is the case inside a container."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"SLURM_JOB_ID=7, but srun is not found: .* or unset SLURM_JOB_ID"):
        cluster.step(["true"], BATCH)


def test_node():
    assert cluster.node(STEP) == cluster.Node(1, 2, "127.0.0.1", 10049)
    assert cluster.node(BY_HAND) == cluster.Node(1, 2, "127.0.0.9", 1234)
    assert cluster.node(STEP | {"MASTER_ADDR": "127.0.0.5", "MASTER_PORT": "99"}) == cluster.Node(1, 2, "127.0.0.5", 99)
    for variables in ({}, {"MASTER_ADDR": "no.such.host.invalid"}):  # a single node does not need this address
        alone = cluster.node(variables)
        assert (alone.index, alone.count, alone.address) == (0, 1, "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", alone.port))


def test_steps_of_a_job_meet_at_ports_of_their_own():
    steps = [STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in (7, 8) for step in range(5)]
    assert len({cluster.node(env).port for env in steps}) == 10


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ],
)
def test_mistakes(change: dict[str, str], wanted: str):
    with pytest.raises(UserError, match=re.escape(wanted)):
        cluster.node(BY_HAND | change)


TORCHRUN = {
    "LOCAL_RANK": "1",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"RANK": ""}, "LOCAL_RANK is set, but RANK is not: start with torchrun"),
        ({"MASTER_ADDR": ""}, "LOCAL_RANK is set, but MASTER_ADDR is not: start with torchrun"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE=four is not a number from 1"),
        ({"RANK": "4"}, "RANK=4 is not a number from 0 to 3"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not a number from 0 to 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a number from 1 to 65535"),
    ],
)
def test_mistakes_of_a_rank(change: dict[str, str], wanted: str):
    """The rank was started by hand, or by another launcher."""
    assert cluster.world(TORCHRUN) == 4
    with pytest.raises(UserError, match=re.escape(wanted)):
        cluster.world(TORCHRUN | change)


def test_a_host_that_nobody_knows():
    with pytest.raises(UserError, match=r"MASTER_ADDR=no.such.host.invalid cannot be resolved on"):
        cluster.ranks_of(cluster.Node(0, 2, "no.such.host.invalid", 1), 1, {})


def test_ranks_of_a_node():
    ranks = cluster.ranks_of(cluster.Node(1, 2, "127.0.0.1", 99), 2, {})
    assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [("2", "0"), ("3", "1")]
    assert all(
        (r["WORLD_SIZE"], r["LOCAL_WORLD_SIZE"], r["MASTER_ADDR"], r["MASTER_PORT"]) == ("4", "2", "127.0.0.1", "99")
        for r in ranks
    )
    assert ranks[0]["GLOO_SOCKET_IFNAME"] in (name for _, name in socket.if_nameindex())
    assert (
        "GLOO_SOCKET_IFNAME"
        not in cluster.ranks_of(cluster.Node(1, 2, "127.0.0.1", 99), 2, {"GLOO_SOCKET_IFNAME": "eth7"})[0]
    )
    assert "GLOO_SOCKET_IFNAME" not in cluster.ranks_of(cluster.Node(0, 1, "127.0.0.1", 99), 2, {})[0]


def test_a_task_per_rank():
    tasks = STEP | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    rank = cluster.task(tasks)
    assert rank == cluster.ranks_of(cluster.Node(1, 2, "127.0.0.1", 10049), 2, {})[1]
    assert cluster.task(tasks | {"LOCAL_RANK": "0"}) == {}, "torchrun under srun"
    assert cluster.task(STEP) == cluster.task(BATCH) == cluster.task({}) == {}
    with pytest.raises(UserError, match="--distribution=block"):
        cluster.task(tasks | {"SLURM_PROCID": "2"})


def test_where_srun_is_still_to_be_called():
    salloc = {name: value for name, value in BATCH.items() if name != "SLURM_PROCID"} | {"SLURM_STEP_ID": "4294967290"}
    assert cluster.in_allocation(BATCH)
    assert cluster.in_allocation(salloc)
    assert not any(
        map(
            cluster.in_allocation,
            (STEP, {}, {"SLURM_JOB_ID": ""}, BY_HAND, BATCH | BY_HAND, BATCH | {"LOCAL_RANK": "0"}),
        )
    )
