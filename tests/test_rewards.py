"""Reward functions of the user: their mistakes, in real processes."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest

from rlhf import rewards
from rlhf.config import Reward
from rlhf.errors import UserError
from rlhf.rewards import Rewards, child

FUNCTIONS = '''
import json, os, re, subprocess, sys, time
from neighbour import half

broken = 3

def act(prompt, response, record):
    """Do what the response says."""
    if response == "hang":
        time.sleep(60)
    if response == "hang inside C":
        re.match("(a+)+$", "a" * 60 + "b")
    if response == "hang with a child":
        with subprocess.Popen(["sleep", "61.25"]) as child:
            if record:
                open(record["file"], "w").write(str(child.pid))
    if response == "end":
        os._exit(3)
    if response == "exit":
        sys.exit(4)
    if response == "raise":
        raise ZeroDivisionError("on purpose")
    if response == "take memory":
        return len(bytearray(1 << 30))
    if response == "print":
        print("x" * 100_000)
        sys.stderr.write("y" * 1000)
        os.write(1, b"z" * 1000)
        return len(sys.stdin.read())
    if response == "process":
        return os.getpid()
    wrong = {"nan": float("nan"), "text": "1", "none": None, "infinite": 10**400, "yes": True}
    return (wrong | {"half": half(prompt)}).get(response, 0)

def echo(prompt, response, record):
    time.sleep(record["seconds"])
    return float(response)
'''


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "neighbour.py").write_text("def half(text, *rest):\n    return len(text) / 2\n")
    (tmp_path / "json.py").write_text(FUNCTIONS)  # a file may have the name of a module that is already imported
    return tmp_path / "json.py"


def items(*responses: str) -> list[rewards.functions.Item]:
    return [("abc", response, {}) for response in responses]


def scored(function: Rewards, given: list[rewards.functions.Item]) -> list[float | None]:
    """Return the reward of each response; None if it failed."""
    return [None if score.failed else score.value for score in function.score(given)]


def gone(pid: int) -> bool:
    """Return whether a process has ended, or ends within three seconds."""
    for _ in range(60):
        stat = Path(f"/proc/{pid}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_values_and_failures_in_order(file, capfd):
    expected = {
        "half": 1.5,
        "nan": None,
        "hang": None,
        "yes": 1.0,
        "text": None,
        "end": None,
        "none": None,
        "print": 0.0,
        "hang inside C": None,
        "raise": None,
        "infinite": None,
        "exit": None,
        "zero": 0.0,
    }
    with Rewards([f"{file}:act"], Reward(timeout=0.5, workers=2)) as function:
        start = time.monotonic()
        assert dict(zip(expected, scored(function, items(*expected)), strict=True)) == expected
        assert time.monotonic() - start < 4
        assert scored(function, items("half")) == [1.5], "it goes on after all of that"
        assert scored(function, []) == []
    assert "x" * 100_000 in capfd.readouterr().out, "what it prints is seen, and is no result"


@pytest.mark.parametrize(
    ("response", "says"),
    [
        ("raise", "ZeroDivisionError: on purpose"),
        ("hang", "time limit"),
        ("end", "exit code 3"),
        ("exit", "SystemExit: 4"),
        ("nan", "finite number, but is nan"),
        ("text", "finite number, but is '1'"),
    ],
)
def test_the_first_failure_is_kept(file, response, says):
    with Rewards([f"{file}:act"], Reward(timeout=0.5, workers=1)) as function:
        assert scored(function, items("half")) == [1.5]
        assert function.failure == ""
        function.score(items(response, "none"))
        assert says in function.failure
        if response == "raise":
            assert 'json.py", line' in function.failure, "the place in the user's file"


def test_memory_is_bounded(file):
    """A function that needs more fails, and the next call works. Without a limit it does not fail."""
    with Rewards([f"{file}:act"], Reward(timeout=5, workers=1, memory=0.5)) as function:
        assert scored(function, items("take memory", "half")) == [None, 1.5]
        assert function.failure.splitlines()[-1] == "MemoryError"
    with Rewards([f"{file}:act"], Reward(timeout=5, workers=1)) as function:
        assert scored(function, items("take memory")) == [float(1 << 30)]
    with pytest.raises(UserError, match="cannot be loaded"):
        rewards.check(f"{file}:act", memory=1e-4)


def test_results_keep_their_order_whoever_is_faster(file):
    given = [("", str(i), {"seconds": 0.05 * (i % 3 == 0)}) for i in range(30)]
    with Rewards([f"{file}:echo"], Reward(timeout=5, workers=3)) as function:
        assert scored(function, given) == [float(i) for i in range(30)]


def test_a_time_limit_may_be_longer_than_the_system_waits(file):
    with Rewards([f"{file}:act"], Reward(timeout=2**31 - 1, workers=1)) as function:
        assert scored(function, items("half")) == [1.5]


def test_processes_are_kept_and_replaced(file):
    with Rewards([f"{file}:act"], Reward(timeout=0.5, workers=1)) as function:
        scores = function.score(items("process", "process", "hang", "process"))
        first, again, _, other = (int(score.value) for score in scores)
        assert first == again != other
        assert gone(first)
        assert Path(f"/proc/{other}").exists()
    assert gone(other)


def test_a_time_out_ends_what_the_function_started(file, tmp_path):
    """Its whole process group is ended, and no pipes of it stay open here."""
    before = set(os.listdir("/proc/self/fd"))
    with Rewards([f"{file}:act"], Reward(timeout=0.5, workers=1)) as function:
        given = ("abc", "hang with a child", {"file": str(tmp_path / "child")})
        assert scored(function, [*items("half"), given, *items("half")]) == [1.5, None, 1.5]
        assert gone(int((tmp_path / "child").read_text()))
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_module_may_load_longer_than_a_response_may_take(file):
    """Modules that import torch are slow to load. The limit applies to each response only."""
    (file.parent / "slow.py").write_text(
        "import time\ntime.sleep(1.2)\n\ndef one(prompt, response, record):\n    return 1\n"
    )
    with Rewards([f"{file.parent}/slow.py:one"], Reward(timeout=0.5, workers=2)) as function:
        assert scored(function, items("a", "b", "c")) == [1.0] * 3


def test_results_of_an_interrupted_call_do_not_reach_the_next(file):
    """Ctrl-C comes while a function works on a response. Its process was used before, and would be used again."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with Rewards([f"{file}:echo"], Reward(timeout=10, workers=1)) as function:
        assert scored(function, [("", "1", {"seconds": 0})]) == [1.0]
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                function.score([("", "2", {"seconds": 1.0}), ("", "3", {"seconds": 0})])
        finally:
            signal.signal(signal.SIGALRM, before)
        assert scored(function, [("", "4", {"seconds": 0}), ("", "5", {"seconds": 0})]) == [4.0, 5.0]


def test_a_process_that_ended_while_idle_fails_no_response(file):
    with Rewards([f"{file}:act"], Reward(timeout=5, workers=1)) as function:
        [score] = function.score(items("process"))
        os.kill(int(score.value), signal.SIGKILL)
        assert scored(function, items("half", "half", "half")) == [1.5, 1.5, 1.5]
        assert function.failure == ""


def test_no_process_survives_the_parent(file, tmp_path):
    """The parent is killed.

    At this time one function waits for its own child process, one hangs in C code, and one is idle.
    """
    program = f"""
from rlhf.config import Reward
from rlhf.rewards import Rewards
function = Rewards([{str(file) + ":act"!r}], Reward(timeout=60, workers=3))
print(*[int(s.value) for s in function.score([("", "process", {{}})] * 50)], flush=True)
function.score([("", response, {{}}) for response in ("hang inside C", "hang with a child", "half")])
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert parent.stdout is not None
    processes = {int(pid) for pid in parent.stdout.readline().split()}
    processes |= children(parent.pid)
    assert len(processes) == 3
    deadline = time.monotonic() + 3
    while not (grandchildren := set().union(*map(children, processes))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert grandchildren
    parent.kill()
    parent.wait()
    assert all(gone(pid) for pid in processes | grandchildren)


def test_a_process_whose_parent_ended_prints_nothing(file, tmp_path):
    """The parent's end of the connection closes while the functions load. SIGKILL may arrive only later."""
    own, theirs = Pipe()
    end, lifeline = os.pipe()
    command = [sys.executable, "-P", child.__file__, str(theirs.fileno()), str(end)]
    with subprocess.Popen(command, pass_fds=(theirs.fileno(), end), stderr=subprocess.PIPE, process_group=0) as process:
        theirs.close()
        own.send((sys.path, str(file), "act", "function", 0, 10.0))
        own.close()
        assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 0
    os.close(end)
    os.close(lifeline)


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("maths", "choose math"),
        ("module:", "choose math"),
        (":function", "choose math"),
        ("no_such_module:function", "No module named 'no_such_module'"),
        ("no/such/file.py:function", "No such file or directory"),
        ("{file}:absent", "has no attribute 'absent'"),
        ("{file}:broken", "it is 3, not a function"),
        ("json:JSONDecoderr", "has no attribute 'JSONDecoderr'"),
        ("{folder}/typo.py:function", "SyntaxError"),
        ("{folder}/ends.py:function", "exit code 5"),
    ],
)
def test_check_names_what_is_wrong(file, spec, says):
    (file.parent / "typo.py").write_text("def function(:\n")
    (file.parent / "ends.py").write_text("import os\nos._exit(5)\n")
    spec = spec.format(file=file, folder=file.parent)
    with pytest.raises(UserError) as error:
        rewards.check(spec)
    assert says in str(error.value)
    assert f"reward.function={spec!r}" in str(error.value)
    assert "\n" not in str(error.value)


def test_check_takes_what_is_right(file, monkeypatch):
    rewards.check("math")
    rewards.check(f"{file}:act")
    monkeypatch.chdir(file.parent)
    rewards.check("json.py:act")
    monkeypatch.syspath_prepend(file.parent)
    rewards.check("neighbour:half")
    assert "neighbour" not in sys.modules, "the user's module is imported in a process of its own"


def test_the_current_folder_may_be_gone(file, monkeypatch):
    (file.parent / "gone").mkdir()
    monkeypatch.chdir(file.parent / "gone")
    (file.parent / "gone").rmdir()
    rewards.check(f"{file}:act")


def test_modules_of_the_current_folder_come_last(file):
    """They are found although launch.sh uses Python's -P.

    They do not replace a module that another one imports, such as json.py.
    """
    program = "import sys\nfrom rlhf.config import Reward\nfrom rlhf.rewards import Rewards, check\n"
    program += "check(*sys.argv[1:])\nwith Rewards(sys.argv[1:], Reward()) as function:\n"
    program += "    print(function.score([('abc', '', {})])[0].value)"
    command = [sys.executable, "-P", "-c", program, "neighbour:whole"]
    (file.parent / "neighbour.py").write_text("import json\n\ndef whole(*_):\n    return len(json.dumps([1]))\n")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=file.parent, env=env, capture_output=True, text=True)
    assert done.stdout == "3.0\n", done.stderr


def test_a_function_may_print_where_nobody_reads(file):
    """It may also print characters that the terminal cannot show. The function does not fail."""
    (file.parent / "talks.py").write_text(
        "def talk(prompt, response, record):\n    print(response * 9999, flush=True)\n    return 1\n"
    )
    program = "from rlhf.config import Reward\nfrom rlhf.rewards import Rewards\n"
    program += f"with Rewards(['{file.parent}/talks.py:talk'], Reward()) as function:\n"
    program += "    assert function.score([('', '\\ud800', {})])[0][:2] == (1.0, False), function.failure"
    for target in ("/dev/full", "&-", "/dev/null"):
        command = ["bash", "-c", f'{sys.executable} -c "$0" >{target}', program]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_check_starts_fast_and_without_torch(file):
    program = f"import sys\nfrom rlhf import rewards\nrewards.check({str(file) + ':act'!r})\n"
    program += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
    start = time.monotonic()
    rewards.check(f"{file}:act")
    assert time.monotonic() - start < 3  # about 0.1 s on an idle machine; importing torch would take longer


def test_math_compares_with_the_answer_of_the_record():
    with Rewards(["math"], Reward(timeout=1, workers=1)) as function:
        record = {"answer": "3 * 6 = 18\n#### 18"}
        given = [
            ("", "#### 18", record),
            ("", "#### 19", record),
            ("", "18", record),
            ("", "The answer is $18.", {"answer": 18}),
        ]
        assert scored(function, given) == [1.0, 0.0, 0.0, 1.0]
        with pytest.raises(UserError, match="'answer'"):
            function.score(items("#### 18"))
        assert function.pool == [], "no process for what is bounded by itself"
