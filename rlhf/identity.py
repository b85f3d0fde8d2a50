"""What makes a run this run: the keys that decide its result, and what it reads. Checkpoints keep it, so that no other takes them up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.algorithms import ALGORITHMS
from rlhf.config import Config
from rlhf.errors import UserError

Identity = dict[str, dict[str, Any]]
FREE = {  # sections and keys that decide how, where and how often, and those of files and folders, which are known by what they hold
    *("out", "steps", "resume", "dtype", "memory", "checkpoint", "evaluate", "log", "parallel", "reference"),  # checkpoints know the layout
    *("policy.load", "policy.tokenizer", "critic.load", "reward.load", "data.train", "data.eval", "batch.tokens"),
    *("rollout.tp", "rollout.memory", "rollout.cache", "rollout.check", "rollout.bucket"),
    *("reward.timeout", "reward.workers", "reward.memory"),
}
TOLD = ("optim.", "critic.lr")  # may differ from some step on, and that is said
CODE = ("reward.function", "rollout.environment")  # whose files may have been put right since, and that is said, too
BLOCK, BLOCKS = 4096, 64  # of a file of weights that are looked at


def identity(config: Config, read: Mapping[str, tuple[str, str]]) -> Identity:
    """As a checkpoint's meta.json keeps it. read: key -> (path, fingerprint of what is there)."""
    algorithm, found = ALGORITHMS[config.mode], asdict(config)
    sections = found.pop("sections")
    if not algorithm.online:
        del found["rollout"], found["reward"]
    if algorithm.section:
        found[algorithm.section[0]] = sections[algorithm.section[0]]
    keys: dict[str, Any] = {}
    for name, value in found.items():
        flat = {f"{name}.{key}": held for key, held in value.items()} if isinstance(value, dict) else {name: value}
        keys |= {key: list(held) if isinstance(held, tuple) else held for key, held in flat.items() if not {name, key} & FREE}
    return {"keys": keys, "read": {key: list(pair) for key, pair in read.items()}}


def compare(folder: Path, meta: Mapping[str, Any], config: Config, now: Identity) -> list[str]:
    """What is to be said where a run goes on from a checkpoint with other keys. Raises UserError where it would be another run."""
    then, remedy = {"keys": {}, "read": {}} | meta.get("run", {}), "run it alike, or set another out"
    saved = {"mode": meta["mode"], "seed": meta["seed"], **then["keys"]}  # checkpoints of before know no more
    remarks = []
    for key, value in now["keys"].items():
        if key not in saved or saved[key] == value:
            continue
        if not key.startswith(TOLD):
            raise UserError(f"{folder} was saved with {key}={saved[key]}, this run has {value}: {remedy}")
        remarks.append(f"{key}={value} from here on; {folder.name} was saved with {saved[key]}")
    for key, (path, print) in now["read"].items():
        if key in then["read"] and then["read"][key][1] != print:
            if key in CODE:
                remarks.append(f"another content of {key}={path} from here on")
                continue
            before = then["read"][key][0]
            what = f"{key}={before}, this run has {path}" if before != path else f"another content of {key}={path}"
            raise UserError(f"{folder} was saved with {what}: {remedy}")
    steps = meta.get("steps", config.steps)
    if steps != config.steps and config.optim.schedule != "constant":
        remarks.append(f"steps={config.steps} stretches optim.schedule={config.optim.schedule} from here on; it was {steps}")
    return remarks


def description(arch: object) -> str:
    """A fingerprint of an architecture."""
    return hashlib.blake2b(repr(arch).encode(), digest_size=8).hexdigest()


def weights(files: Iterable[Path]) -> str:
    """A fingerprint of a model's files: names, sizes and some blocks, as they are too large to be read twice."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for i in range(BLOCKS):
                stream.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()
