"""A real Slurm of two nodes on one machine: sbatch, requeue after signals, preemption and hangs, tasks, mistakes.

The tests are skipped if Slurm is not installed (on Debian and Ubuntu: apt install slurmctld slurmd slurm-client munge).
"""

from __future__ import annotations

import getpass
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task

ROOT = Path(__file__).parents[1]
DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ['PATH']}:/usr/sbin"
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve, as those of a cluster do
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/slurmctld
SlurmctldPidFile={folder}/slurmctld/pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n/pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
NodeName={nodes[0]} NodeAddr={nodes[0]} NodeHostname={host} Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeAddr={nodes[1]} NodeHostname={host} Port={ports[2]} CPUs=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 OverSubscribe=EXCLUSIVE
PartitionName=high Nodes=ALL PriorityTier=2 OverSubscribe=EXCLUSIVE
"""

pytestmark = pytest.mark.skipif(
    not all(shutil.which(name, path=PATH) for name in (*DAEMONS, "sbatch")),
    reason="no Slurm: apt install slurmctld slurmd slurm-client munge",
)


class Slurm:
    """The cluster: its daemons in the foreground, so that they can be ended, and the commands of its users."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, []
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM", "RANK", "LOCAL_RANK"))
            },
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "RLHF_PYTHON": sys.executable,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("munge", "slurmctld", *NODES):
            (folder / name).mkdir()
        (folder / "munge").chmod(0o711)
        key = folder / "munge/key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=folder, user=getpass.getuser(), host=socket.gethostname(), nodes=NODES, ports=free_ports(3)
            )
        )

    def start(self) -> None:
        munge = [f"--{name}-file={self.folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        self.daemon(
            "munged", "--foreground", "--force", f"--socket={self.folder}/munge/socket", "--num-threads=1", *munge
        )
        wait(lambda: (self.folder / "munge/socket").exists(), 10, "munged did not start")
        self.daemon("slurmctld", "-D")
        for node in NODES:
            self.daemon("slurmd", "-D", "-N", node)
        wait(self.idle, 30, "the nodes did not come up")

    def idle(self) -> bool:
        return self.call("sinfo", "--noheader", "--format=%D %T") == "2 idle"

    def daemon(self, *command: str) -> None:
        log = (self.folder / f"{len(self.daemons)}.txt").open("w")
        self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def stop(self) -> None:
        try:
            self.call("scancel", f"--user={getpass.getuser()}", "--signal=KILL", "--full", check=False)
            self.call("scancel", f"--user={getpass.getuser()}", check=False)
            wait(lambda: not self.call("squeue", "--noheader", check=False), 20, "jobs did not end")
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
                daemon.wait(timeout=20)

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0 or not check, done
        return done.stdout.strip()

    def submit(self, *command: str) -> str:
        """Submit a batch job over both nodes. Return its id. Its output goes to ID.out."""
        return self.call("sbatch", "--parsable", "--nodes=2", f"--output={self.folder}/%j.out", *command)

    def state(self, job: str) -> dict[str, str]:
        fields = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def said(self, job: str) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def wait_state(self, job: str, name: str, seconds: float = 300) -> dict[str, str]:
        wait(lambda: self.state(job)["JobState"] == name, seconds, lambda: f"{self.state(job)}\n{self.said(job)}")
        return self.state(job)

    def requeued(self, job: str) -> None:
        """Wait until the job runs again.

        Slurm delays a requeued job by two minutes. This test sets the delay to a second, which is enough for the nodes.
        """
        wait(
            lambda: self.state(job)["JobState"] == "PENDING" and self.idle(),
            60,
            lambda: f"{self.state(job)}\n{self.said(job)}",
        )
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")
        self.wait_state(job, "RUNNING")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def wait(reached: Callable[[], bool], seconds: float, otherwise: str | Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture(scope="module")
def sft(slurm: Slurm) -> list[str]:
    """Return the arguments of a run on two data-parallel ranks, without out and steps.

    A step takes a considerable part of a second.
    """
    demo_task.write(slurm.folder / "data", num_sft=200, num_rl=1, num_heldout=1)
    demo_task.make_model(slurm.folder / "model", slurm.folder / "data")
    keys = (
        "policy.init=random",
        "data.max_tokens=64",
        "batch.prompts=8",
        "batch.epochs=10",
        "checkpoint.every=0",
        "parallel.dp=2",
    )
    return ["sft", f"policy.load={slurm.folder}/model", f"data.train={slurm.folder}/data/train_sft.jsonl", *keys]


def steps(out: Path) -> list[int]:
    path = out / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_signalled_job_over_two_nodes_goes_on(slurm: Slurm, sft: list[str], tmp_path: Path):
    """The job gets USR1, as with sbatch --signal:

    the current step is saved, launch.sh requeues, and the job continues.
    """
    job = slurm.submit("launch.sh", *sft, f"out={tmp_path}", "steps=12")
    wait(lambda: len(steps(tmp_path)) >= 2, 300, lambda: slurm.said(job))
    slurm.call("scancel", "--signal=USR1", job)
    slurm.requeued(job)
    first = steps(tmp_path)[-1]
    assert 2 <= first < 12
    assert (tmp_path / "latest").read_text() == f"step_{first:06}"
    assert slurm.wait_state(job, "COMPLETED")["ExitCode"] == "0:0"
    assert f"resumed after step {first}\n" in slurm.said(job)
    assert steps(tmp_path) == list(range(1, 13))
    assert "2 ranks on cpu in float32: tp 1 pp 1 cp 1 dp 2" in slurm.said(job)
    assert (tmp_path / "hf/model.safetensors").exists()


def test_a_job_that_stands_still_is_ended_and_requeued(slurm: Slurm, sft: list[str], tmp_path: Path):
    """A rank of the second node is stopped. The report names it, and the requeued job is done."""
    keys = ("watchdog.timeout=10", "watchdog.requeue=true", "steps=6")
    job = slurm.submit("launch.sh", *sft, f"out={tmp_path}", *keys)
    wait(lambda: len(steps(tmp_path)) >= 2, 120, lambda: slurm.said(job))
    os.kill(rank_process(tmp_path, 1), signal.SIGSTOP)
    began = time.monotonic()
    wait(lambda: "ending the run with exit code 76" in slurm.said(job), 60, lambda: slurm.said(job))
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert re.search(r"rank 1 on \S+ is stopped \(SIGSTOP\)", slurm.said(job))
    slurm.requeued(job)
    assert slurm.wait_state(job, "COMPLETED")["Restarts"] == "1"
    assert steps(tmp_path) == list(range(1, 7))


def rank_process(out: Path, rank: int) -> int:
    """Return the process id of a rank. Its parent process, the watcher, has the same command."""
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"out={out}" in process.info["cmdline"] and process.environ().get("RANK") == str(rank)
    ]
    parents = {process.ppid() for process in found}
    (pid,) = (process.pid for process in found if process.pid not in parents)
    return pid


def test_a_task_per_rank(slurm: Slurm, sft: list[str], tmp_path: Path):
    """srun python -m rlhf works without launch.sh: each task is a rank."""
    slurm.call("srun", "--nodes=1", "--ntasks=2", sys.executable, "-m", "rlhf", *sft, f"out={tmp_path}", "steps=1")
    assert steps(tmp_path) == [1]


def test_a_job_that_slurm_preempts_is_saved_and_requeued_once(slurm: Slurm, sft: list[str], tmp_path: Path):
    """Slurm sends SIGTERM twice, with its usual time before SIGKILL.

    Slurm has requeued the job, so the launcher must not.
    """
    job = slurm.submit("launch.sh", *sft, f"out={tmp_path}", "steps=1000")
    wait(lambda: len(steps(tmp_path)) >= 1, 300, lambda: slurm.said(job))
    slurm.submit("--partition=high", "--wrap=sleep 1")
    wait(
        lambda: slurm.state(job)["JobState"] == "PENDING" and slurm.idle(),
        60,
        lambda: f"{slurm.state(job)}\n{slurm.said(job)}",
    )
    assert (tmp_path / "latest").read_text() == f"step_{steps(tmp_path)[-1]:06}"
    assert slurm.state(job)["Restarts"] == "1"
    slurm.call("scancel", job)


def test_a_mistake_is_one_line_and_not_requeued(slurm: Slurm, sft: list[str], tmp_path: Path):
    wrong = slurm.submit("launch.sh", *sft, "optim.lrr=1")
    assert slurm.wait_state(wrong, "FAILED")["ExitCode"] == "2:0"
    assert slurm.said(wrong).splitlines() == ["rlhf: unknown key 'optim.lrr': did you mean 'optim.lr'?"]
    on_the_nodes = slurm.submit("launch.sh", *sft, f"data.train={tmp_path}/none.jsonl")
    assert (
        slurm.wait_state(on_the_nodes, "FAILED")["Restarts"] == "0"
    )  # srun ends the other node, and returns the higher exit code
    assert len([line for line in slurm.said(on_the_nodes).splitlines() if line.startswith("rlhf: ")]) == 1
