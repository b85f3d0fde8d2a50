"""The fixture's sequences as samples and model outputs, and the results of published implementations for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.contracts import Algorithm, Batch, Loss, Output, Sample
from rlhf.data.packing import pack

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "losses.json").read_text())
EXPECTED = FIXTURE["expected"]
NAMES = {"old_values": "values"}  # a fixture's name -> the stream's name


def algorithm(mode: str, *overrides: str) -> Algorithm:
    """Return an algorithm with several updates per step, so that old_logp is a separate stream."""
    return ALGORITHMS[mode](configuration.load(mode, ["batch.minibatches=2", *overrides]))


def rows(name: str) -> list[np.ndarray]:
    """Return a stream of the fixture, without its padding."""
    masks = np.array(FIXTURE["streams"]["mask"], bool)
    return [np.array(row, np.float32)[mask] for row, mask in zip(FIXTURE["streams"][name], masks, strict=True)]


def packed(**streams: str) -> Batch:
    """Return the fixture's four sequences in one row.

    `streams` maps a stream to the name of the fixture's stream to use instead.
    """
    given = (
        {n: n for n in ("old_logp", "ref_logp", "sampler_logp", "advantages", "returns")}
        | {"values": "old_values"}
        | streams
    )
    columns = {name: rows(source) for name, source in given.items()}
    lengths = [len(row) for row in rows("logp")]
    samples = [
        Sample(np.zeros(n + 1, np.int32), np.ones(n, bool), i, **{name: column[i] for name, column in columns.items()})
        for i, n in enumerate(lengths)
    ]
    return pack(samples, multiple=8)


def flat(name: str) -> torch.Tensor:
    """Return a stream of the fixture in the layout of packed() [T]."""
    row = np.concatenate(rows(name))
    return torch.from_numpy(np.pad(row, (0, -len(row) % 8)))


def said(logp: str = "logp", value: str = "values") -> Output:
    """Return a model output with the fixture's log-probs and values."""
    return Output(logp=flat(logp), entropy=torch.zeros_like(flat(logp)), value=flat(value))


def means(loss: Loss) -> dict[str, float]:
    return {name: (total / count).item() for name, (total, count) in loss.metrics.items()}


def mean(loss: Loss) -> float:
    return (loss.total / loss.count).item()


def responses(rewards: list[float], group: int, length: int = 2, **fields: object) -> list[Sample]:
    """Return one sample per reward. Each has a prompt of two tokens and a response of `length` tokens."""
    made = []
    for i, reward in enumerate(rewards):
        tokens = np.array([1, 2] + [10 * i + 3 + t for t in range(length)], np.int32)
        made.append(Sample(tokens, np.arange(length + 1) > 0, group, reward=reward, **fields))  # type: ignore[arg-type]
    return made


def with_streams(batch: Batch, **streams: torch.Tensor) -> Batch:
    return dataclasses.replace(batch, streams=batch.streams | streams)
