"""The processes of a node: environment of the ranks, exit codes, signals, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A launcher of three ranks that run the program given as its argument.
LAUNCHER = """
import os, sys
from rlhf import launcher
launcher.GRACE = 2
sys.exit(launcher.run([sys.executable, "-c", sys.argv[1]], [{**os.environ, "RANK": str(rank)} for rank in range(3)]))
"""
# The start of each rank's program. Each rank also starts a child process, and prints both process ids.
RANK = """
import os, signal, subprocess, sys, time
rank = os.environ["RANK"]
child = subprocess.Popen(["sleep", "60"])
def told(number, frame): os.write(1, f"{rank} got {number}\\n".encode())
def ready(): os.write(1, f"{rank} runs {os.getpid()} {child.pid}\\n".encode())
"""


def start(program: str, **variables: str) -> subprocess.Popen[str]:
    command, env = [sys.executable, "-c", LAUNCHER, RANK + program], {**os.environ, **variables}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def ready(process: subprocess.Popen[str]) -> list[int]:
    """Wait for the three ranks. Return the ids of their processes and of their children."""
    return [int(word) for _ in range(3) for word in process.stdout.readline().split()[2:]]


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    def alive(pid: int) -> bool:
        try:
            return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_all_well():
    process = start("child.kill(); ready()")
    assert len(ready(process)) == 6
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit(2)", 2, ""),  # it has reported the user's mistake
        ("sys.exit(7)", 7, "rlhf: rank 1 ended with exit code 7; ending the other ranks\n"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "rlhf: rank 1 ended with exit code 137; ending the other ranks\n",
        ),
    ],
)
def test_the_first_failure_counts_and_ends_the_others(end: str, code: int, said: str):
    """One other rank ends at SIGTERM, and one ignores it.

    All ranks and their children are ended.
    """
    process = start(
        f'if rank == "0": signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n'
        f'if rank == "2": signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
        f'ready()\nif rank == "1": time.sleep(0.5); {end}\ntime.sleep(60)'
    )
    pids = ready(process)
    assert process.communicate(timeout=20)[1] == said
    assert process.returncode == code
    assert gone(pids)


def test_a_lost_rank_saves_no_step():
    """The other ranks get no signal that would make them save the current step. They end at once."""
    program = "from rlhf.interrupt import Interrupt\nInterrupt(told=rank == '0')\nready()\n"
    process = start(f"{program}if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    pids, began = ready(process), time.monotonic()
    assert process.communicate(timeout=20) == ("", "rlhf: rank 1 ended with exit code 137; ending the other ranks\n")
    assert time.monotonic() - began < 2, "the launcher's GRACE in these tests"
    assert process.returncode == 137
    assert gone(pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank(number: signal.Signals):
    ignore = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)"  # the slower ranks get SIGTERM when the first one has ended
    )
    process = start(
        f"{ignore}\nsignal.signal({number:d}, told)\nready()\nsignal.pause()\nchild.kill()\nsys.exit(128 + {number:d})"
    )
    pids = ready(process)
    process.send_signal(number)
    said, errors = process.communicate(timeout=20)
    assert set(said.splitlines()) == {f"{rank} got {number:d}" for rank in range(3)}
    assert errors == f"rlhf: ended by {number.name}; nothing new is saved\n"
    assert process.returncode == 128 + number
    assert gone(pids)


@pytest.mark.parametrize(("number", "tasks"), [("SIGTERM", 2), ("SIGTERM", 1), ("SIGUSR1", 2)])
def test_srun_prints_that_it_ends_a_step(number: str, tasks: int):
    """srun sends SIGTERM to the other tasks when one has failed, so no task prints a line about it.

    This holds during the imports of the program, before the ranks start, and while they run.
    """
    env, wanted = {"SLURM_STEP_NUM_TASKS": str(tasks)}, 128 + signal.Signals[number]
    end = f"lambda *_: os.kill(os.getpid(), signal.{number})"
    for handler, said in (("leave", "before anything began"), ("interrupt", "nothing more was saved")):
        program = f"import os, signal, sys, rlhf.__main__ as m\nm.answer(m.{handler})\nm.carry_out = {end}\n"
        command = [sys.executable, "-c", f"{program}sys.exit(m.main([]))"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
        quiet = number == "SIGTERM" and tasks > 1
        assert done.returncode == wanted
        assert (said in done.stderr, bool(done.stderr)) == (not quiet, not quiet)
    process = start("ready()\nsignal.pause()", **env)
    ready(process)
    process.send_signal(signal.Signals[number])
    assert process.communicate(timeout=20)[1] == ("" if quiet else f"rlhf: ended by {number}; nothing new is saved\n")
    assert process.returncode == wanted


def test_the_second_sigint_ends_now_and_the_second_sigterm_does_not():
    process = start(
        "signal.signal(signal.SIGTERM, told)\nsignal.signal(signal.SIGINT, told)\nready()\nwhile True: time.sleep(1)"
    )
    pids = ready(process)
    for _ in range(2):  # Slurm sends two when it preempts
        process.send_signal(signal.SIGTERM)
        assert sorted(process.stdout.readline() for _ in range(3)) == [f"{rank} got 15\n" for rank in range(3)]
    process.send_signal(signal.SIGINT)
    assert sorted(process.stdout.readline() for _ in range(3)) == [f"{rank} got 2\n" for rank in range(3)]
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "rlhf: ended by SIGINT and SIGTERM; nothing new is saved\n"
    assert process.returncode == 130
    assert gone(pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_before_the_loop_a_signal_ends_at_once(number: signal.Signals):
    """There is no traceback, and no message that a step is saved."""
    begin = "import rlhf.__main__, types\n"
    busy = "sys.modules['rlhf.assemble'] = types.SimpleNamespace(run=lambda config: (ready(), time.sleep(60)))\n"
    begin += "os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='1', WORLD_SIZE='3')\n"
    config = "rlhf.config.Config(out='/nowhere')"
    process = start(
        f"{begin}{busy}import rlhf\nrlhf.assemble = sys.modules['rlhf.assemble']\nrlhf.__main__.run({config})"
    )
    pids = ready(process)
    process.send_signal(number)
    assert process.communicate(timeout=20)[1] == f"rlhf: ended by {number.name}; nothing new is saved\n"
    assert process.returncode == 128 + number
    assert gone(pids)


def test_in_the_loop_a_signal_is_remembered_and_told_once():
    program = "from rlhf.interrupt import Interrupt\ninterrupt = Interrupt(told=rank == '0')\nready()\n"
    process = start(
        f"{program}while not interrupt.came: time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\nchild.kill()\nsys.exit(75)"
    )
    pids = ready(process)
    process.send_signal(signal.SIGTERM)
    assert (
        process.communicate(timeout=20)[1] == "rlhf: SIGTERM: the run finishes and saves the current step, then ends\n"
    )
    assert process.returncode == 75
    assert gone(pids)


def test_nothing_survives_the_launcher():
    process = start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\ntime.sleep(60)")
    pids = ready(process)
    process.kill()
    process.wait()
    assert gone(pids)


def test_what_has_a_session_of_its_own_ends_too():
    """This holds if its rank is killed or ends normally, and for any parent process.

    Processes that end earlier leave no zombies.
    """
    program = "own = subprocess.Popen(['sh', '-c', 'setsid sleep 60 & sleep 60'], start_new_session=True)\n"
    program += "for _ in range(5): subprocess.run(['sh', '-c', 'setsid true &'])\ntime.sleep(1.5)\n"
    program += "found = subprocess.run(['pgrep', '-x', 'sleep', '-P', str(own.pid)], "
    program += "capture_output=True, text=True).stdout.split()\n"
    program += "zombies = subprocess.run(['ps', '-o', 'stat=', '--ppid', str(os.getppid())], "
    program += "capture_output=True, text=True).stdout\n"
    program += "assert 'Z' not in zombies, zombies\n"
    program += "os.write(1, f'{rank} runs {own.pid} {\" \".join(found)}\\n'.encode())\n"
    process = start(program + "if rank == '1': time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)")
    pids = [int(word) for _ in range(3) for word in process.stdout.readline().split()[2:]]
    assert len(pids) == 9
    process.communicate(timeout=20)
    assert process.returncode == 137
    assert gone(pids)


def test_it_loads_no_torch():
    code = "import sys, rlhf.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_rank_tells_why_it_ends():
    """Its traceback is printed, although torch.distributed replaces the hook that prints it."""
    program = """
import sys
from rlhf.__main__ import fail
sys.excepthook = fail
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
raise ValueError("this must be seen")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ValueError: this must be seen" in done.stderr
