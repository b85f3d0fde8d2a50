"""Break a small run on purpose, repeatedly.

python tools/torture.py OUT [--kills N] [--seed S] [--mode grpo|sft] [--inflight X]

First a run of two ranks on the CPU runs undisturbed. Then the same run, in another folder, is killed, stopped, limited
in storage or damaged. After each break the same command starts it again, until it is done.

The run survives a break if exit code and message are right, and no process is left behind. At the end, the numbers of
every step, the samples and the weights must equal those of the undisturbed run bitwise.

Prints each break, a table by kind, and a line of JSON. The exit code is 1 if a break was not survived. The seed decides
the kinds and times of the breaks. The step that the run has reached by then depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import demo_task
from torture_run import Break, Done, Fault, Run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rlhf import folders  # noqa: E402
from rlhf.interrupt import SAVED  # noqa: E402

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
KEYS = ["policy.load=model", "policy.init=random", "parallel.dp=2", "data.max_tokens=64"]
KEYS += [
    "batch.prompts=4",
    "batch.tokens=256",
    "optim.lr=1e-3",
    "evaluate.prompts=4",
    "evaluate.every=10",
    "log.every=1000",
]
KEYS += ["checkpoint.every=2", "checkpoint.keep=2", "checkpoint.export=false"]
ROLLOUT = [
    "rollout.engine=kvcache",
    "rollout.max_tokens=16",
    "rollout.group=2",
    f"reward.function={ROOT}/tools/demo_task.py:digits",
]
MODES = {
    "grpo": ["data.train=data/train_rl.jsonl", "data.eval=data/heldout.jsonl", "grpo.kl=0.04", *ROLLOUT],
    "sft": ["data.train=data/train_sft.jsonl", "data.eval=data/train_sft.jsonl"],
}
LARGEST = 140_000  # bytes: a little less than the largest file of a checkpoint


# The moments at which a run is broken. Each function waits for its moment, and returns its description.


def at_a_moment(run: Run, draw: random.Random) -> str:
    """Wait for a random moment: in one of four cases while the run starts, else in one of its steps."""
    run.ranks()
    if not run.begun() and draw.random() < 0.25:
        time.sleep(draw.uniform(0, run.startup))
        return "while it starts"
    run.steps_on(draw.randint(1, 4))
    time.sleep(draw.uniform(0, 0.2))
    return "in a step"


def at_a_file_event(run: Run, draw: random.Random) -> str:
    """Wait until a file is made, replaced or deleted.

    In one of five cases it is any file, else a file of a save.
    """
    run.ranks()
    if draw.random() < 0.8:
        run.steps_on(1)
    seen, left, event = run.files(), draw.randint(1, 30), ""

    def reached() -> bool:
        nonlocal seen, left, event
        now = run.files()
        for name in sorted({name for name, _ in now.items() ^ seen.items()}):
            event, left = f"{name} {'made' if name not in seen else 'replaced' if name in now else 'gone'}", left - 1
        seen = now
        return left <= 0

    run.until(reached, 0.0005)
    return re.sub(r"\d{6}", "N", event)


def in_a_save(run: Run, draw: random.Random) -> str:
    """Wait until a save is in flight: its files are being written, or wait for the end of a step."""
    run.steps_on(1)
    run.until(lambda: any(run.out.glob("step_*.partial")), 0.0005)
    time.sleep(draw.uniform(0, 0.1))
    return "with a save in flight" if any(run.out.glob("step_*.partial")) else "after a save"


# The breaks. Each function returns a description when the run has ended, or continues by itself. It raises Done and
# Fault.

Moment = Callable[[Run, random.Random], str]
KILLED = {
    "all ranks": [137],
    "one rank": [137, 1],
    "the launcher": [-9],
}  # exit codes; 1: the other rank noticed it before the launcher


def kill(target: str, moment: Moment, run: Run, draw: random.Random) -> str:
    """Send SIGKILL."""
    pids = run.ranks()
    when = moment(run, draw)
    for pid in {"all ranks": pids, "one rank": [draw.choice(pids)], "the launcher": [run.start().pid]}[target]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.end(*KILLED[target])
    return when


def interrupt(number: signal.Signals, run: Run, draw: random.Random) -> str:
    """Send a signal of a scheduler.

    The run saves the current step, and its exit code tells this. While it starts, it prints that it saved nothing.
    """
    when = at_a_moment(run, draw)
    run.start().send_signal(number)
    text = run.end(SAVED, 128 + number)
    if "nothing new is saved" in text:
        return f"{when}, not saved"
    if run.latest() != f"step_{run.step():06}":
        raise Fault(f"step {run.step()} is not saved, but {run.latest()}:\n{text}")
    return f"{when}, saved"


def pause(run: Run, draw: random.Random) -> str:
    """Send SIGSTOP to a rank, and SIGCONT seconds later. The run continues by itself."""
    when, pid = at_a_moment(run, draw), draw.choice(run.ranks())
    os.kill(pid, signal.SIGSTOP)
    time.sleep(draw.uniform(1, 5))
    os.kill(pid, signal.SIGCONT)
    run.steps_on(1)
    return when


def fill(run: Run, draw: random.Random) -> str:
    """Limit the size of files, as on a full disk. The run prints one line and ends with exit code 1."""
    run.steps_on(draw.randint(1, 4))
    room = draw.randrange(LARGEST)
    for pid in run.ranks():
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, room))
    return told(run.end(1), "File too large")


def told(text: str, wanted: str) -> str:
    """Return the file in the one line that reports the fault.

    Lines of the launcher do not count. Raises Fault if there is not exactly one such line with `wanted`.
    """
    found = [
        line for line in text.splitlines() if line.startswith("rlhf: ") and not re.match("rlhf: rank . ended", line)
    ]
    if len(found) != 1 or wanted not in found[0]:
        raise Fault(f"one line with {wanted!r} was expected:\n{text[-3000:]}")
    return re.sub(r"\d{6}", "N", found[0].split()[1].strip(":").partition("/")[2])


def flip(held: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(held))
    return held[:place] + bytes([held[place] ^ 1 << draw.randrange(8)]) + held[place + 1 :]


def zero(held: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(held))
    changed = held[:first] + bytes(len(held[first : first + 4096])) + held[first + 4096 :]
    return changed if changed != held else bytes(len(held))


def cut(held: bytes, draw: random.Random) -> bytes:
    return held[: draw.randrange(len(held))]


def damage(spoil: Callable[[bytes, random.Random], bytes] | None, run: Run, draw: random.Random) -> str:
    """Change a file of the newest checkpoint while the run is down (spoil=None: remove the file).

    The next run prints one line with a remedy, and ends with exit code 2. The remedy is applied.
    """

    def older() -> list[Path]:
        return [
            folder
            for folder in run.out.glob("step_??????")
            if folder.name < run.latest() and not folders.damage(folder)
        ]

    if run.process or not older():
        run.until(older)
        kill("all ranks", at_a_moment, run, draw)
    file = draw.choice(sorted(path for path in (run.out / run.latest()).iterdir() if path.is_file()))
    held = file.read_bytes()
    file.unlink()
    if spoil:
        file.write_bytes(spoil(held, draw))
    text = run.end(2)
    where = told(text, f"{file.parent.name}/{file.name} is ")
    remedy = re.search(r"before it: (echo \S+ > \S+)$", text, re.MULTILINE)
    if not remedy:
        raise Fault(f"a remedy was expected:\n{text[-3000:]}")
    subprocess.run(remedy[1], shell=True, cwd=run.root, check=True)
    return where


KINDS: dict[str, Callable[[Run, random.Random], str]] = {
    **{
        f"SIGKILL {target}, {name}": partial(kill, target, moment)
        for target in KILLED
        for name, moment in (("any moment", at_a_moment), ("a file event", at_a_file_event), ("a save", in_a_save))
    },
    "SIGTERM": partial(interrupt, signal.SIGTERM),
    "SIGUSR1": partial(interrupt, signal.SIGUSR1),
    "SIGSTOP, SIGCONT": pause,
    "a full disk": fill,
    "damage: a bit": partial(damage, flip),
    "damage: 4 KB of zeros": partial(damage, zero),
    "damage: a file cut short": partial(damage, cut),
    "damage: a file missing": partial(damage, None),
}


def torture(whole: Run, kinds: list[str], draw: random.Random) -> Iterator[Run]:
    """Yield runs. Each was broken, one kind after the other, and then continued to its end."""
    while kinds:
        run = replace(whole, name="broken", breaks=[])
        shutil.rmtree(run.out, ignore_errors=True)
        with suppress(Done):
            while kinds and not any(found.fault for found in run.breaks):
                run.breaks.append(break_once(run, kinds[0], draw))
                kinds.pop(0)
            finish(run)
        yield run


def break_once(run: Run, kind: str, draw: random.Random) -> Break:
    """Break the run once, and print a line about it."""
    began, before, happened, fault = time.monotonic(), run.step(), "", ""
    try:
        happened = KINDS[kind](run, draw)
    except Fault as error:
        fault = str(error)
        run.abort()
    print(f"{kind:31} {happened:45} steps {before} to {run.step()}, {time.monotonic() - began:.0f} s", flush=True)
    if fault:
        print(f"FAULT: {fault}", flush=True)
    return Break(kind, happened, fault)


def finish(run: Run) -> None:
    """Let the run continue to its end. Raises Done."""
    try:
        run.end()
    except Fault as error:
        print(f"FAULT: {run.name} {error}", flush=True)
        run.abort()


def table(breaks: list[Break]) -> str:
    """Return a Markdown table with a row for each kind of break."""
    rows = ["| break | times | survived bitwise |", "|---|---|---|"]
    for kind in (*KINDS, "all"):
        if faults := [found.fault for found in breaks if kind in (found.kind, "all")]:
            rows.append(f"| {kind} | {len(faults)} | {faults.count('')} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--kills", type=int, default=len(KINDS), help="breaks in all, of each kind alike")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=[*KINDS], metavar="KIND", help="only these: " + "; ".join(KINDS)
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=MODES, default="grpo")
    parser.add_argument("--inflight", type=float, default=1.5, help="rollout.inflight")
    options = parser.parse_args()
    root, draw, began = options.out.resolve(), random.Random(options.seed), time.monotonic()
    if root.exists():
        parser.error(f"{root} is there: name a new folder")
    demo_task.write(root / "data", seed=options.seed, num_sft=300, num_rl=200, num_heldout=8)
    demo_task.make_model(root / "model", root / "data", TINY)
    steps = min(60, 4 + 4 * options.kills)  # enough for all breaks; a new run costs one more start, as a break does
    arguments = [*KEYS, *MODES[options.mode], f"steps={steps}", f"seed={options.seed}"]
    arguments += [f"rollout.inflight={options.inflight}"] if options.mode == "grpo" else []
    whole = Run(root, "whole", options.mode, arguments)
    try:
        whole.ranks()
        start = time.monotonic()
        whole.until(whole.begun)
        whole.startup = time.monotonic() - start
        whole.until(lambda: False)
    except Done:
        print(f"a run that was left alone: {steps} steps, {time.monotonic() - began:.0f} s", flush=True)
    kinds = [options.kinds[i % len(options.kinds)] for i in range(options.kills)]
    draw.shuffle(kinds)
    breaks: list[Break] = []
    for run in torture(whole, kinds, draw):
        difference = run.difference(whole)
        breaks += [replace(found, fault=found.fault or difference) for found in run.breaks]
        print(f"done after {len(run.breaks)} breaks: {difference or 'bitwise'}", flush=True)
    survived = sum(not found.fault for found in breaks)
    happened = Counter(f"{found.kind}: {found.happened}" for found in breaks)
    seconds = round(time.monotonic() - began)
    print(f"\n{table(breaks)}\n\nsurvived bitwise {survived} of {len(breaks)}")
    print(
        json.dumps(
            {
                **vars(options),
                "out": str(root),
                "survived": survived,
                "of": len(breaks),
                "seconds": seconds,
                "happened": happened,
            }
        )
    )
    return int(survived < len(breaks))


if __name__ == "__main__":
    sys.exit(main())
