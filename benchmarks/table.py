"""Write the README's table of speed from benchmarks/results/: python benchmarks/table.py.

The table stands between two comments in the README. Each row has the result, its target and the command. If a row was
measured several times, the last result counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks/table.py -->\n", "<!-- end -->\n"
Lines = dict[tuple[str, str], list[dict]]

TWO = "--kernels fused --cases fixed --repeat 2"
# what | benchmark | case | text of the result, from the case's last line and all lines | target
ROWS: list[tuple[str, str, str, Callable[[dict, Lines], str], str]] = [
    (
        "forward and backward, rows of 4k",
        "train",
        "fixed, fused",
        lambda x, _: rate(x),
        "80 %",
    ),
    (
        "the same in plain torch",
        "train",
        "fixed, plain",
        lambda x, _: rate(x),
        "",
    ),
    (
        "lognormal lengths of mean 600, per token",
        "train",
        "lognormal, fused",
        lambda x, lines: beside(x, lines),
        "95 %",
    ),
    (
        "log-probs alone, per token",
        "train",
        "fixed, fused",
        lambda x, _: f"{x['score_speedup']:.2f} x the rate of forward and backward",
        "2.8 x",
    ),
    (
        "optimizer with clipping",
        "train",
        "fixed, fused",
        lambda x, _: f"{x['optimizer_s']:.3f} s: {x['optimizer_bytes_ratio']:.2f} x the time to move its bytes",
        "1.5 x",
    ),
    (
        "times that the host waits for the device, in all micro-batches",
        "train",
        "fixed, fused",
        lambda x, _: str(x.get("host_waits", "")),
        "0",
    ),
    (
        "rollout, relative to vLLM alone",
        "rollout",
        "sampler",
        lambda x, _: f"{x['tokens_per_s']:,.0f} tokens/s: {x['share_of_alone']:.1%}",
        "97 %",
    ),
    (
        "rollout of 64 groups of 8, lognormal lengths of mean 906, time per token",
        "tail",
        "64 groups, 1 in flight",
        lambda x, _: tail(x),
        "",
    ),
    (
        "the same, with 1.5 times the groups in flight",
        "tail",
        "64 groups, 1.5 in flight",
        lambda x, _: tail(x),
        "1.5 x",
    ),
    (
        "the same on two GPUs, with an engine on each",
        "tail",
        "--groups 64 --max-lag 6 --inflight 1.5",
        lambda x, _: tail(x),
        "",
    ),
    ("rollout of 16 such groups, time per token", "tail", "16 groups, 1 in flight", lambda x, _: tail(x), ""),
    (
        "the same, with 1.5 times the groups in flight",
        "tail",
        "16 groups, 1.5 in flight",
        lambda x, _: tail(x),
        "1.9 x",
    ),
    (
        "publish 7B",
        "publish",
        "",
        lambda x, _: f"{1000 * x['seconds']:.0f} ms: {x['ratio']:.2f} x the time to copy its bytes",
        "30 ms",
    ),
    (
        "publish 7B into vLLM's parameters",
        "publish",
        "vllm",
        lambda x, _: f"{1000 * x['seconds']:.0f} ms: {x['ratio']:.2f} x the time to copy its bytes",
        "30 ms",
    ),
    (
        "publish 7B on two GPUs, TP2 to two engines",
        "publish",
        "--train-tp 2 --engine-tp 1",
        lambda x, _: transfer(x),
        "2 x",
    ),
    ("publish 7B on two GPUs, PP2 to TP2", "publish", "--train-pp 2 --engine-tp 2", lambda x, _: transfer(x), "2 x"),
    (
        "save a checkpoint: what the next step waits for",
        "save",
        "2.7B",
        lambda x, _: (
            f"{x['held_s']:.2f} s for {x['checkpoint_gb']:.0f} GB: {x['held_by_copy']:.2f} x a copy to the host; "
            f"the first save {x['first_s']:.0f} s; checkpoint.background=false {x['at_once_s']:.0f} s"
        ),
        "1.2 x",
    ),
    ("forward and backward on two GPUs, DP2", "train", TWO, lambda x, lines: share(x, lines), "96 %"),
    ("forward and backward on two GPUs, TP2", "train", f"{TWO} --tp 2", lambda x, lines: share(x, lines), "92 %"),
    ("forward and backward on four GPUs, TP4", "train", f"{TWO} --tp 4", lambda x, lines: share(x, lines), ""),
    (
        "engine: sleep, and wake",
        "switch",
        "engine",
        lambda x, _: (
            f"{x['sleep_s']:.2f} s, {x['wake_weights_s'] + x['wake_s']:.2f} s; sleep frees {x['sleep_gib']:.0f} GiB"
        ),
        "",
    ),
    (
        "learner: offload to host memory, and back",
        "switch",
        "parking",
        lambda x, _: f"{x['park_gib_per_s']:.0f} and {x['unpark_gib_per_s']:.0f} GiB/s",
        "",
    ),
    (
        "switching in a GRPO step",
        "step",
        "grpo 7b",
        lambda x, _: f"{x['switching']:.1%} of the step" if "switching" in x else "",
        "3 %",
    ),
    ("GRPO step of 512 samples, 3.5B of 7B's layers", "step", "grpo 7b", lambda x, _: phases(x), ""),
    ("PPO step of 512 samples, four models of 1B", "step", "rlhf 1b", lambda x, _: phases(x), ""),
    (
        "PPO step of 64 samples, four models of 4.3B, offloaded when unused",
        "step",
        "rlhf 7b",
        lambda x, _: phases(x),
        "",
    ),
    ("the same: memory, relative to the ledger", "step", "rlhf 7b", lambda x, _: ledger(x), "within 10 %"),
    ("the same: growth of memory over 20 steps", "step", "rlhf 7b", lambda x, _: leaks(x), "none"),
    ("GRPO step of 512 samples on two GPUs, 7B", "step", "grpo 7b, 2 GPUs", lambda x, _: phases(x), ""),
    ("PPO step of 512 samples on two GPUs, four models of 1B", "step", "rlhf 1b, 2 GPUs", lambda x, _: phases(x), ""),
    (
        "PPO step of 64 samples on two GPUs, four models of 8.2B, offloaded when unused",
        "step",
        "rlhf 7b, 2 GPUs",
        lambda x, _: phases(x),
        "",
    ),
    ("the same: memory, relative to the ledger", "step", "rlhf 7b, 2 GPUs", lambda x, _: ledger(x), "within 10 %"),
    ("the same: growth of memory over 20 steps", "step", "rlhf 7b, 2 GPUs", lambda x, _: leaks(x), "none"),
    (
        "GRPO step of 1,024 samples, relative to TRL's GRPOTrainer",
        "trl",
        "grpo 7b, float32",
        lambda x, _: against(x),
        "2 x",
    ),
    ("the same, with TRL's weights and optimizer in bfloat16", "trl", "grpo 7b, bfloat16", lambda x, _: against(x), ""),
]


def rate(line: dict) -> str:
    moment = f"{line['share_of_matmul']:.0%} of a large matrix product's peak rate ({line['matmul_tflops']:.0f})"
    lasting = f"{line['share_of_sustained']:.0%} of its rate over seconds ({line['sustained_tflops']:.0f})"
    return f"{line['tflops_per_device']:.0f} TFLOP/s: {moment}, {lasting}"


def tail(line: dict) -> str:
    longest = f"{line['ratio']:.2f} x the time with equal lengths; longest response {line['longest']:,} tokens"
    old = 1 - line["lag/0"] if "lag/0" in line else 0
    return longest + (f"; {old:.0%} of the tokens are from older weights" if old else "")


def transfer(line: dict) -> str:
    sent = f"{line['bytes_crossing_per_rank'] / 1e9:.1f} GB between GPUs at {line['link_gb_per_s']:.0f} GB/s"
    return f"{1000 * line['seconds']:.0f} ms: {line['ratio']:.2f} x the time to send {sent}, measured in the same run"


def beside(line: dict, lines: Lines) -> str:
    """Return the rate relative to rows of 4k in the same process, which has the same measured peak rate."""
    for other in lines.get(("train", "fixed, fused"), []):
        if other["matmul_tflops"] == line["matmul_tflops"]:
            return f"{line['tokens_per_s_per_device'] / other['tokens_per_s_per_device']:.0%} of rows of 4k"
    return ""


def share(line: dict, lines: Lines) -> str:
    alone = lines["train", "fixed, fused"][-1]["tflops_per_device"]
    return f"{line['tflops_per_device']:.0f} TFLOP/s per GPU: {line['tflops_per_device'] / alone:.0%} of one GPU"


def phases(line: dict) -> str:
    parts = ", ".join(f"{name} {line[f'time/{name}']:.2f}" for name in ("rollout", "score", "learn", "publish"))
    return f"{line['time/step']:.1f} s ({parts}), {line['tokens_per_second']:,.0f} tokens/s"


def against(line: dict) -> str:
    rates = f"{line['ours/tokens_per_second']:,.0f} and {line['trl/tokens_per_second']:,.0f} tokens/s"
    lengths = f"{line['ours/response_tokens']:.0f} and {line['trl/response_tokens']:.0f} tokens"
    return f"{line['ratio']:.2f} x: {rates}, responses of {lengths}"


def ledger(line: dict) -> str:
    measured = max(value for name, value in line.items() if name.startswith("memory/") and name != "memory/host")
    return f"largest error of a phase {abs(line['ledger_error']):.1%}; largest phase {measured:.0f} GiB"


def leaks(line: dict) -> str:
    device = max(value for name, value in line.items() if name.startswith("rise/") and name != "rise/host")
    return f"{device:.2f} GiB on the device, {line['rise/host']:.2f} GiB in host memory"


def read(folder: Path) -> Lines:
    """Return the lines by (benchmark, case), in order of file names. With several ranks the case is the arguments."""
    found: Lines = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            alone = line.get("ranks", 1) == 1
            case = line.get("case", "") if alone else line["command"].partition(" ")[2]
            found.setdefault((line["benchmark"], case), []).append(line)
    return found


def table(lines: Lines) -> str:
    rows = ["| what | measured | target | command |\n|---|---|---|---|\n"]
    for what, benchmark, case, measured, target in ROWS:
        line = lines.get((benchmark, case), [{}])[-1]
        said = measured(line, lines) if line else ""
        if said:
            rows.append(f"| {what} | {said} | {target} | `{line['command']}` ({line['device']}) |\n")
    return "".join(rows) if len(rows) > 1 else ""


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(before + BEGIN + table(read(ROOT / "benchmarks" / "results")) + END + after)


if __name__ == "__main__":
    main()
