"""Writes the report of runs: one HTML file with curves, times, memory, configurations and samples.

./launch.sh report RUN [RUN ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf import texts
from rlhf.errors import told
from rlhf.report import page
from rlhf.report.page import FILE


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = texts.Parser(
        prog="./launch.sh report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several are shown in one page")
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"file to write; default: RUN/{FILE}, or {FILE} in the current folder for several runs",
    )
    return p


@texts.paths()
def main(arguments: Sequence[str]) -> None:
    """Run the command line. Raises UserError for the first mistake."""
    asked = parser().parse_args(arguments)
    folders = [*dict.fromkeys(asked.runs)]
    file = asked.out or (folders[0] / FILE if len(folders) == 1 else Path(FILE))
    size = page.write(folders, file)
    print(f"the report: {file} ({size / 1e6:.1f} MB)")


def carry_out() -> int:
    main(sys.argv[1:])
    return 0


if __name__ == "__main__":  # a run starts it as a process of its own (rlhf.report.background)
    sys.exit(told("rlhf", carry_out))
