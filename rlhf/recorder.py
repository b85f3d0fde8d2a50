"""Writes sampled responses to out/samples/step_NNNNNN.jsonl: one line per response of a step and of its evaluation.

Mode evaluate writes one file, evaluate.jsonl.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from rlhf.contracts import ABSENT, Sample

Use = Literal["train", "evaluate"]
NAME = re.compile(r"step_(\d{6,})\.jsonl")


class Recorder:
    """Writes sample files in a thread, so that no step waits for it. Each file appears only when it is complete.

    start   number of steps that the run has done; files of later steps are deleted, because these steps run again;
            -1: no file is deleted
    name    name of the only file to write; "": one file per step
    """

    def __init__(self, out: Path, start: int, name: str = ""):
        self.folder, self.name = out / "samples", name
        self._kept: list[tuple[Use, Sample]] = []
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        for file in self.folder.glob("step_*.jsonl") if start >= 0 else ():
            known = NAME.fullmatch(file.name)
            if known and (start == 0 or int(known[1]) > start):
                file.unlink()

    def keep(self, use: Use, samples: Sequence[Sample]) -> None:
        """Add sampled responses to the file of the current step."""
        self._kept += [(use, sample) for sample in samples]

    def write(self, step: int) -> list[tuple[Use, Sample]]:
        """Start to write the file of a step, after the previous file is complete. Return its samples."""
        kept, self._kept = self._kept, []
        if kept:
            self.finish()
            self._writing = self._writer.submit(
                _write, self.folder / f"{self.name or f'step_{step:06}'}.jsonl", step, kept
            )
        return kept

    def finish(self) -> None:
        """Wait until the current file is complete. Raises the error of the write, if there was one."""
        if self._writing:
            self._writing.result()


def describe(step: int, use: Use, sample: Sample) -> dict[str, Any]:
    """Return the content of a line. advantage is the mean over the response; None if the algorithm has none."""
    text, verdict, first = sample.text, sample.verdict, int(sample.mask.argmax()) + 1
    return {
        "step": step,
        "use": use,
        "set": text.set,
        "row": text.row,
        "group": sample.group,
        "prompt": text.prompt,
        "response": text.response,
        "turns": list(text.turns) or [{"role": "assistant", "content": text.response}],
        "reward": None if verdict.failed else sample.reward,
        "rule": verdict.rule,
        "score": verdict.score,
        "parts": dict(verdict.parts),
        "failed": verdict.failed,
        "advantage": None if sample.advantages is ABSENT else float(sample.advantages[sample.mask].mean()),
        "finish": "length" if sample.truncated else "stop",
        "versions": sorted({int(version) for version in sample.version[sample.mask]}),  # of the weights that sampled it
        "prompt_tokens": sample.tokens[:first].tolist(),
        "response_tokens": sample.tokens[first:].tolist(),
    }


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """Return the line with None in place of inf and nan, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()
    }


def _write(file: Path, step: int, kept: list[tuple[Use, Sample]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(_finite(describe(step, *each)), allow_nan=False) + "\n" for each in kept))
    partial.replace(file)
