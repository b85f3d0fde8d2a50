"""A stopped, a looping and a lost rank end the run in time, under the launcher, torchrun and alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf import progress
from rlhf.config import Watchdog
from rlhf.interrupt import HUNG
from rlhf.watchdog import Status, awaited, listed, suspects

ROOT = Path(__file__).parents[1]

# The program of a rank. It makes progress until a file appears. Then ranks wait for each other at a collective, and
# rank 1 does what the file says.
RANK = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from rlhf import progress, watchdog
from rlhf.config import Watchdog
rank, world, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])

def looping():
    while True: pass

def call():
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    progress.enter(progress.MEETING)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import torch.distributed as dist
        dist.init_process_group("gloo", timeout=timedelta(hours=1))
    while world > 1 and sys.argv[3:] == ["alone"]:
        time.sleep(0.1)
    progress.begin("step 1")
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    while not (folder / "told").exists():
        progress.move()
        time.sleep(0.05)
    told = (folder / "told").read_text()
    if rank == 1 and told == "loop":
        looping()
    while rank == 1 and told == "stop":
        time.sleep(0.1)
    if told == "long":
        for _ in range(100 * rank):
            progress.move()
            time.sleep(0.1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.barrier()
    while not all((folder / f"pid{other}").read_text() == "done" for other in range(world) if other != rank):
        (folder / f"pid{rank}").write_text("done")
        Popen(["sleep", "0.3"])
        os.wait()  # without torch, the ranks wait here for each other
    (folder / f"pid{rank}").write_text("done")
    os._exit(0)

keys = Watchdog(timeout=float(sys.argv[2]), start=60.0)
sys.exit(watchdog.supervised(keys, folder / "watchdog/run", rank, world, "127.0.0.1:1", call))
"""
LAUNCHER = """
import os, sys
from rlhf import launcher
from rlhf.cluster import Node, free_port, ranks_of
ranks = ranks_of(Node(0, 1, "127.0.0.1", free_port()), int(sys.argv[1]), {})
sys.exit(launcher.run([sys.executable, *sys.argv[2:]], [{**os.environ, **rank} for rank in ranks]))
"""


class Run:
    """A run of RANK."""

    def __init__(self, folder: Path, ranks: int, timeout: float, torchrun: bool = False):
        self.folder, self.ranks = folder, ranks
        (folder / "rank.py").write_text(RANK)
        arguments = [str(folder / "rank.py"), str(folder), str(timeout)]
        command = [sys.executable, "-c", LAUNCHER, str(ranks), *arguments]
        if torchrun:
            elastic = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [*elastic, *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    def tell(self, what: str) -> list[int]:
        """Wait for the ranks, tell them what to do, and return their process ids."""
        files = [self.folder / f"pid{rank}" for rank in range(self.ranks)]
        wait(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [int(file.read_text()) for file in files]
        if what == "stop":
            os.kill(pids[1], signal.SIGSTOP)
        (self.folder / "partial").write_text(what)
        (self.folder / "partial").rename(self.folder / "told")  # so that no rank reads an empty file
        self.began = time.monotonic()
        return pids

    def end(self) -> tuple[str, float]:
        """Return what the run printed to standard error, and the seconds since tell()."""
        said = self.process.communicate(timeout=60)[1]
        return said, time.monotonic() - self.began


def wait(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@dataclass
class Ended:
    """How a run ended."""

    pids: list[int]
    code: int
    said: str  # what it printed to standard error
    seconds: float  # from tell() to its end


RUNS: dict[str, tuple[str, int, float, bool]] = {  # name -> what rank 1 does, ranks, timeout, torchrun
    "stop": ("stop", 2, 10, False),
    "loop": ("loop", 4, 10, False),
    "torchrun": ("loop", 2, 10, True),
    "signal": ("loop", 2, 60, False),
    "long": ("long", 2, 4, False),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Ended]]:
    """Start all RUNS at once, because they mostly wait, and return a function that waits for one of them to end."""

    def carry_out(name: str) -> Ended:
        what, ranks, timeout, torchrun = RUNS[name]
        run = Run(tmp_path_factory.mktemp(name), ranks, timeout, torchrun)
        pids = run.tell(what)
        if name == "signal":
            run.process.send_signal(signal.SIGTERM)
        said, seconds = run.end()
        if name == "long":
            assert not (run.folder / "watchdog").exists(), "the watchers remove their files"
        return Ended(pids, run.process.returncode, said, seconds)

    with ThreadPoolExecutor(len(RUNS)) as pool:
        ends = {name: pool.submit(carry_out, name) for name in RUNS}
        yield lambda name: ends[name].result()


@pytest.mark.parametrize("name", ["stop", "loop", "torchrun"])
def test_a_rank_that_stands_still_ends_the_run(name: str, ended: Callable[[str], Ended]):
    run, (what, _, _, torchrun) = ended(name), RUNS[name]
    print(f"{name}: {run.seconds:.1f} s")
    assert 10 <= run.seconds < 40
    assert run.code == (1 if torchrun else HUNG), run.said
    assert run.said.count("no rank has made progress for 10 s (watchdog.timeout): ending the run") == 1, run.said
    assert "; the run ends after 10 s" in run.said, "the warning"
    reason = {"stop": "is stopped (SIGSTOP)", "loop": "does not wait for other ranks"}[what]
    assert f"{reason}; it stands in 'step 1: begins'" in run.said
    assert "rank 1 on " in run.said
    assert what == "stop" or "in looping" in run.said.partition("rank 1 is here")[2]
    wait(lambda: gone(run.pids), 15)


def test_a_signal_ends_a_looping_run_sooner(ended: Callable[[str], Ended]):
    """The ranks ignore the signal, as in a loop that does not end. The limit is a tenth."""
    run = ended("signal")
    assert run.code == HUNG, run.said
    assert run.seconds < 40
    assert "no rank has made progress for 6 s" in run.said


def test_a_rank_that_waits_for_one_that_moves_is_no_hang(ended: Callable[[str], Ended]):
    run = ended("long")
    assert run.seconds >= 10
    assert (run.code, run.said) == (0, "")


def test_a_lost_rank_is_named():
    from rlhf.watchdog import report

    here = [Status(rank, "n1", phases=3, text="step 2: learn", still=70.0) for rank in (0, 1)]
    said = report(here, [2, 3], 60, True)
    assert "  ranks 2-3: lost, because its process or its node does not answer\n" in said
    assert "  ranks 0-1 on n1: in 'step 2: learn' for 70 s" in said


def test_who_is_the_cause():
    here = [Status(rank, "n1", phases=3) for rank in range(3)]
    assert suspects(here) == {}
    here[1].phases = 2
    assert suspects(here) == {1: "has entered fewer phases"}
    here[2].state = "T"
    assert suspects(here) == {2: "is stopped (SIGSTOP)"}
    assert listed([0, 1, 2, 5]) == "ranks 0-2, 5"


def test_what_is_awaited():
    said = awaited("no.such.host.invalid:29500", 4, [2, 3], 60)
    assert "MASTER_ADDR cannot be resolved on" in said
    assert "nothing is seen of ranks 2-3" in awaited("127.0.0.1:29500", 4, [2, 3], 60)


def test_missing_ranks_are_awaited_and_end_the_run(tmp_path: Path):
    program = RANK.replace("start=60.0", "start=8.0")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "8", "alone"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == HUNG
    assert "waiting for all 2 ranks to connect to MASTER_ADDR=127.0.0.1 MASTER_PORT=1: nothing is seen" in done.stderr
    assert "rank 1: lost" in done.stderr
    assert "(watchdog.start)" in done.stderr


def test_a_call_costs_little():
    board, count = progress.Board(), 20_000
    began = time.process_time()
    for _ in range(count):
        board.move()
    assert (time.process_time() - began) / count < 20e-6
    assert board.read().moves == count + 1


def test_without_a_timeout_there_is_no_other_process(tmp_path: Path):
    from rlhf.watchdog import supervised

    assert supervised(Watchdog(timeout=0.0), tmp_path, 0, 1, "127.0.0.1:1", os.getpid) == os.getpid()
