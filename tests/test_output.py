"""Printing never ends a process. Text that cannot be encoded or has no reader is dropped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = {**os.environ, "PYTHONPATH": str(ROOT)}
PRINTS = """
import sys
from rlhf import output
from rlhf.__main__ import end
output.secure()
file = open("file", "w")
for stream in (sys.stdout, sys.stderr):
    print("half of a pair \\udc80, and what latin-1 lacks: \\u2192", file=stream, flush=True)
    print("x" * 100_000, file=stream)
print("\\ud800", flush=True)
assert file.fileno() > 2, "what was closed is another file now"
end(0)
"""


@pytest.mark.parametrize(
    "command", ["{0}", "{0} | head -c 20", "{0} 2>&1 | true", "{0} >/dev/full 2>&1", "{0} >&- 2>&-", "{0} <&- >&- 2>&-"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_what_is_printed_ends_nothing(command, encoding, tmp_path):
    (tmp_path / "prints.py").write_text(PRINTS)
    program = f"set -o pipefail; {command.format(f'{sys.executable} prints.py')}"
    env = {**HERE, "PYTHONIOENCODING": encoding}
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, env=env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr + done.stdout
    if command == "{0}":
        arrow = "\u2192" if encoding == "utf-8" else "\\u2192"
        assert done.stdout.decode().splitlines()[0] == f"half of a pair \\udc80, and what latin-1 lacks: {arrow}"
        assert done.stdout.endswith(b"x\n\\ud800\n")


@pytest.mark.parametrize("target", ["/dev/full", "&-"])
def test_a_mistake_is_one_even_if_nobody_hears_of_it(target):
    command = f"{sys.executable} -m rlhf gprm 2>{target}"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, env=HERE, timeout=60).returncode == 2


def test_errors_are_seen_at_once():
    """Also in a file or a pipe: the reason why ranks are ended must not appear only at the end of the run."""
    program = "import os, sys; from rlhf import output; output.secure(); print('seen', file=sys.stderr); os._exit(0)"
    assert (
        subprocess.run([sys.executable, "-c", program], env=HERE, capture_output=True, timeout=60).stderr == b"seen\n"
    )
