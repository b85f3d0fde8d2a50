"""One training step of a mode on each of some files: python tests/ranks/steps.py FOLDER MODE=FILE ...

FOLDER holds sft/ and reward/ as tests/test_modes.py makes them. Prints the loss of each step.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from modes import train

from rlhf import configuration
from rlhf.parallel.mesh import Mesh

KEYS = [
    "steps=1",
    "batch.prompts=4",
    "batch.tokens=2048",
    "data.max_tokens=384",
    "data.overlong=truncate",
    "rollout.engine=kvcache",
]
KEYS += ["rollout.max_tokens=32", "rollout.group=4", "checkpoint.every=0", "checkpoint.export=false", "optim.lr=1e-4"]
JUDGED = ("rlhf", "online-dpo")  # by the reward model; grpo has the math verifier


def main() -> None:
    folder, pairs = Path(sys.argv[1]), [argument.split("=", 1) for argument in sys.argv[2:]]
    mesh = Mesh(configuration.load("sft", []).parallel, 1)
    for i, (mode, file) in enumerate(pairs):
        judge, out = [f"reward.load={folder}/reward"] if mode in JUDGED else [], folder / f"step{i}"
        config = configuration.load(
            mode, [*KEYS, *judge, f"policy.load={folder}/sft", f"data.train={file}", f"out={out}"]
        )
        train(config, mesh)
        row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        assert math.isfinite(row["loss"]), row
        assert row["grad_norm"] >= 0
        print("stepped", mode, file, row["loss"], row["grad_norm"], flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
