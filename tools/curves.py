"""Draw curves of metrics.jsonl as text and as SVG.

python tools/curves.py METRIC OUT NAME=RUN_FOLDER ... writes OUT.txt and OUT.svg.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 360, 60, 30, 130, 40
BLOCKS = "▁▂▃▄▅▆▇█"

Rows = Sequence[Mapping[str, float]]


def draw(runs: Mapping[str, Rows], metric: str, out: Path) -> None:
    """Write out.txt and out.svg: one metric over the steps of each run. Runs without the metric are omitted."""
    points = {name: [(row["step"], row[metric]) for row in rows if metric in row] for name, rows in runs.items()}
    points = {name: found for name, found in points.items() if found}
    out.with_suffix(".txt").write_text("".join(text(name, found, metric) for name, found in points.items()))
    out.with_suffix(".svg").write_text(svg(points, metric))


def text(name: str, points: Sequence[tuple[float, float]], metric: str) -> str:
    """Return one line of text, with a block per value, scaled between the lowest and the highest value."""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    bars = "".join(BLOCKS[round((value - low) / (high - low or 1) * (len(BLOCKS) - 1))] for value in values)
    return (
        f"{name:14} {metric}, steps {points[0][0]:g} to {points[-1][0]:g}: {values[0]:8.3f} {bars} {values[-1]:.3f}\n"
    )


def svg(points: Mapping[str, Sequence[tuple[float, float]]], title: str) -> str:
    """Return a line chart with a legend and labels at the ends of both axes."""
    steps = [step for found in points.values() for step, _ in found]
    values = [value for found in points.values() for _, value in found]
    x0, x1, y0, y1 = min(steps), max(steps), min(values), max(values)

    def x(step: float) -> float:
        return LEFT + (step - x0) / (x1 - x0 or 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y0) / (y1 - y0 or 1) * (HEIGHT - TOP - BOTTOM)

    def label(at_x: float, at_y: float, content: str, anchor: str = "middle") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}">{content}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="black"/>',
        label((LEFT + WIDTH - RIGHT) / 2, TOP - 10, title),
        label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "step"),
        *[label(LEFT - 6, y(value) + 4, f"{value:.2f}", "end") for value in (y0, (y0 + y1) / 2, y1)],
        *[label(x(step), HEIGHT - BOTTOM + 16, f"{step:g}") for step in (x0, x1)],
    ]
    for i, (name, found) in enumerate(points.items()):
        colour, line = COLOURS[i % len(COLOURS)], " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in found)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<path d="M{WIDTH - RIGHT + 10} {TOP + 10 + 20 * i}h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(label(WIDTH - RIGHT + 34, TOP + 14 + 20 * i, name, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(arguments: list[str]) -> None:
    metric, out, *named = arguments
    runs = {}
    for name, _, folder in (item.partition("=") for item in named):
        runs[name] = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    draw(runs, metric, Path(out))


if __name__ == "__main__":
    main(sys.argv[1:])
