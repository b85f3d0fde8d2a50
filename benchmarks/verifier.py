"""Compare the math verifier with human judgements of pairs of answers, and measure its CPU time.

    python benchmarks/verifier.py [PAIRS.jsonl] [--math-verify PYTHON]

A line of PAIRS has `answer` (of the record), `boxed` (the content of a response's box) and `equal`. --math-verify is
the Python of a separate environment with math-verify (pip install math-verify), to compare with. "both" uses
math-verify if this verifier finds a pair unequal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rlhf.rewards.answers import verify  # noqa: E402

PAIRS = ROOT / "tests" / "fixtures" / "answer_pairs.jsonl"
LIBRARY = r"""
import json, sys, time
from math_verify import parse, verify
pairs = [json.loads(line) for line in open(sys.argv[1])]
start, found = time.process_time(), []
for pair in pairs:
    found.append(bool(verify(parse("\\boxed{" + pair["answer"] + "}"), parse("So \\boxed{" + pair["boxed"] + "}."))))
print(json.dumps([found, time.process_time() - start]))
"""


def ours(pairs: list[dict]) -> tuple[list[bool], float]:
    start = time.process_time()
    found = [verify(f"So \\boxed{{{pair['boxed']}}}.", pair["answer"]) == 1.0 for pair in pairs]
    return found, time.process_time() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("pairs", nargs="?", type=Path, default=PAIRS)
    p.add_argument("--math-verify", default="", metavar="PYTHON")
    p.add_argument("--answers", type=int, default=10_000, help="number of answers to time (default: %(default)s)")
    a = p.parse_args()
    pairs = [json.loads(line) for line in a.pairs.read_text().splitlines()]
    fast, seconds = ours(pairs)
    rows = {"this verifier": (fast, seconds)}
    if a.math_verify:
        output = subprocess.run(
            [a.math_verify, "-c", LIBRARY, str(a.pairs)], check=True, capture_output=True, text=True
        ).stdout
        library, library_seconds = json.loads(output.splitlines()[-1])
        asked = fast.count(False) / len(pairs)
        rows["math-verify"] = (library, library_seconds)
        rows["both"] = ([x or y for x, y in zip(fast, library, strict=True)], seconds + asked * library_seconds)
    equal = sum(pair["equal"] for pair in pairs)
    print(
        f"| {len(pairs)} pairs | equal ones missed, of {equal} "
        f"| unequal ones accepted, of {len(pairs) - equal} | CPU seconds |"
    )
    print("|---|---|---|---|")
    for name, (found, took) in rows.items():
        missed = sum(pair["equal"] and not said for pair, said in zip(pairs, found, strict=True))
        accepted = sum(said and not pair["equal"] for pair, said in zip(pairs, found, strict=True))
        print(f"| {name} | {missed} | {accepted} | {took:.2f} |")
    print(
        f"CPU seconds per {a.answers} answers like these: "
        f"{ours([pairs[i % len(pairs)] for i in range(a.answers)])[1]:.2f}"
    )
    numbers = [{"boxed": f"{i * 37}", "answer": f"{i * 37:,}"} for i in range(a.answers)]
    print(f"CPU seconds per {a.answers} whole numbers: {ours(numbers)[1]:.2f}")


if __name__ == "__main__":
    main()
