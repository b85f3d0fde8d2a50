"""The identity of a run: the keys that determine its result, and fingerprints of the files that it reads.

Every checkpoint saves it, so that a different run cannot resume from the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.algorithms import ALGORITHMS
from rlhf.config import JUDGE, Config
from rlhf.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Identity = dict[str, dict[str, Any]]
# Sections and keys that may differ when a run resumes. Files and folders are compared by their content instead of their
# paths. rlhf.checkpoint compares the layout and the dtype.
FREE = {
    *("out", "steps", "epochs", "resume", "dtype", "memory", "checkpoint", "evaluate", "log", "parallel", "reference"),
    *("mtbench", "watchdog"),
    *("policy.load", "policy.tokenizer", "critic.load", "reward.load", "data.train", "data.eval", "batch.tokens"),
    "data.weights",  # of several data sets, their ratios are compared instead, because a name may be that of a file
    "data.invalid",  # data sets with invalid lines are refused without skip, and others are read alike
    *("rollout.tp", "rollout.memory", "rollout.cache", "rollout.check", "rollout.bucket"),
    *("reward.timeout", "reward.workers", "reward.concurrency", "reward.memory", "reward.max_failed"),
    *("judge.url", "judge.key", "judge.concurrency", "judge.timeout", "judge.retries", "judge.rubric"),
}
TOLD = ("optim.", "critic.lr")  # keys that may change when a run resumes; the change is printed
# The files of these keys may change, too. The change is printed.
CODE = ("reward.function", "rollout.environment", "judge.rubric")
BLOCK, BLOCKS = 4096, 64  # bytes per block, and number of blocks, that the fingerprint of a weight file covers
OTHER_RUN = "start with the same settings and files, or set another out"


def identity(config: Config, read: Mapping[str, tuple[str, str]]) -> Identity:
    """Return the identity as a checkpoint's meta.json stores it. read: key -> (path, fingerprint of its content)."""
    algorithm, found = ALGORITHMS[config.mode], asdict(config)
    sections = found.pop("sections")
    if not algorithm.online:
        del found["rollout"], found["reward"]
    if not algorithm.online or JUDGE not in config.reward.function:
        del found["judge"]
    if algorithm.section:
        found[algorithm.section[0]] = sections[algorithm.section[0]]
    keys: dict[str, Any] = {}
    for name, value in found.items():
        flat = {f"{name}.{key}": held for key, held in value.items()} if isinstance(value, dict) else {name: value}
        keys |= {
            key: list(held) if isinstance(held, tuple) else held for key, held in flat.items() if not {name, key} & FREE
        }
    return {"keys": keys, "read": {key: list(pair) for key, pair in read.items()}}


def compare(folder: Path, meta: Mapping[str, Any], config: Config, now: Identity) -> list[str]:
    """Return remarks about keys that have changed since a checkpoint was saved.

    Raises UserError if a key or file has changed that would make this a different run.
    """
    then = {"keys": {}, "read": {}} | meta.get("run", {})
    saved = {"mode": meta["mode"], "seed": meta["seed"], **then["keys"]}  # older checkpoints have mode and seed only
    remarks = []
    for key, value in now["keys"].items():
        if isinstance(value, list) and isinstance(saved.get(key), str):  # older versions had one text, perhaps empty
            saved[key] = [saved[key]] if saved[key] else []
        if key not in saved or saved[key] == value:
            continue
        if not key.startswith(TOLD):
            raise UserError(f"{folder} was saved with {key}={saved[key]}, this run has {value}: {OTHER_RUN}")
        remarks.append(f"{key}={value} from here on; {folder.name} was saved with {saved[key]}")
    for key, (path, print) in now["read"].items():
        if key in then["read"] and then["read"][key][1] != print:
            if key in CODE:
                remarks.append(f"another content of {key}={path} from here on")
                continue
            before = then["read"][key][0]
            what = f"{key}={before}, this run has {path}" if before != path else f"another content of {key}={path}"
            raise UserError(f"{folder} was saved with {what}: {OTHER_RUN}")
    return remarks


def rescheduled(meta: Mapping[str, Any], config: Config) -> list[str]:
    """Return a remark if the number of steps has changed since a checkpoint was saved, and with it the schedule."""
    steps = meta.get("steps", config.steps)
    if steps == config.steps or config.optim.schedule == "constant":
        return []
    return [f"steps={config.steps} changes optim.schedule={config.optim.schedule} from here on; it was steps={steps}"]


def description(arch: DataclassInstance) -> str:
    """Return a fingerprint of an architecture. It does not change if a new version adds a field with a default."""
    set_fields = {
        each.name: getattr(arch, each.name)
        for each in fields(arch)
        if getattr(arch, each.name) != (each.default if each.default_factory is MISSING else each.default_factory())
    }
    return hashlib.blake2b(repr(sorted(set_fields.items())).encode(), digest_size=8).hexdigest()


def weights(files: Iterable[Path]) -> str:
    """Return a fingerprint of a model's files. It covers names, sizes and some blocks, because the files are large."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for i in range(BLOCKS):
                stream.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()
