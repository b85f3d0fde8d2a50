"""The shell variables of the ChatLearn tutorial for Llama, with the meaning that its scripts give them.

A variable overrides TOML files, and key=value overrides the variable. The functions depend only on the given
environment and on which files exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf import cluster, texts
from rlhf.algorithms import ALGORITHMS
from rlhf.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = ", ".join(ALGORITHMS)
TRAIN = ", ".join(mode for mode, made in ALGORITHMS.items() if made.trains)
# the stages before alignment
BEFORE = ", ".join(mode for mode, made in ALGORITHMS.items() if made.trains and not made.aligns)
ALIGN = ", ".join(mode for mode, made in ALGORITHMS.items() if made.trains and made.aligns)
RATED = ", ".join(mode for mode, made in ALGORITHMS.items() if made.trains and made.online)
GRADED = ", ".join(mode for mode, made in ALGORITHMS.items() if made.online)
OTHERS = ", ".join(mode for mode, made in ALGORITHMS.items() if made.aligns)

# Name -> (modes that use it, the key that it sets, meaning). rlhf.convert reads those of the conversions.
VARIABLES: dict[str, tuple[str, str, str]] = {
    "model_size": (
        ALL,
        "configs/SIZE.toml",
        "llama2-7B, llama2-13B or llama2-70B; this file is read before the files on the command line",
    ),
    "LOAD_PATH": (BEFORE, "policy.load", "model to start from; convert*: folder to read"),
    "POLICY_LOAD": (OTHERS, "policy.load", "model to start from; also the reference"),
    "REWARD_LOAD": (
        RATED,
        "reward.load",
        "reward model; rlhf: also the initial critic; grpo: added to math, unless reward.function is set",
    ),
    "REWARD_LOAD_ITERATION": (
        RATED,
        "reward.load",
        "checkpoint in REWARD_LOAD; 1000: iter_0001000, or step_001000 of a run",
    ),
    "JUDGE_URL": (GRADED, "judge.url", "endpoint of the judge (docs/judges.md)"),
    "JUDGE_MODEL": (GRADED, "judge.model", "name of the judge at the endpoint"),
    "TOKENIZER_MODEL": (ALL, "policy.tokenizer", "tokenizer.model, or its folder"),
    "DATASET_PATH": (
        TRAIN,
        "data.train",
        "file, or folder with train.jsonl; dev.jsonl in this folder becomes data.eval",
    ),
    "EVAL_DATASET_PATH": (ALL, "data.eval", "file, or folder with dev.jsonl"),
    "CHECKPOINT_PATH": (BEFORE, "out", "folder of the run"),
    "output_dir": (ALIGN, "out", "folder of all runs; out is output_dir/exp_name"),
    "exp_name": (ALIGN, "out", "name of the run; default: model_size and mode, such as llama2-7B-rlhf"),
    "TP": (
        TRAIN,
        "parallel.tp",
        "tensor parallel size; sets parallel.dp=0 (as many replicas as fit). For convert_hf_to_megatron: "
        "that of the written folder",
    ),
    "PP": (TRAIN, "parallel.pp", "pipeline parallel size; otherwise like TP"),
    "SAVE_PATH": ("convert*", "--to", "folder to write"),
    "VOCAB_PATH": (
        "convert*",
        "--config",
        "folder with the tokenizer, and with config.json if LOAD_PATH has none; same as TOKENIZER_MODEL",
    ),
    "USE_LEGACY_MODELS": (
        "convert_hf_to_megatron",
        "--format",
        "True (default): Megatron's legacy format; False: megatron-core's format",
    ),
    "target_params_dtype": ("convert*", "--dtype", "bf16, fp16 or fp32; default: the dtype is kept"),
}


@texts.paths()
def arguments(mode: str, given: list[str], env: Mapping[str, str]) -> list[str]:
    """Return the arguments of configuration.load(): the command's own and those that the variables stand for.

    The order is: the file of model_size, the command's files, key=value of the variables, key=value of the command.
    The last value of a key wins.
    """
    overrides = [argument for argument in given if "=" in argument and not argument.startswith("-")]
    files = [argument for argument in given if argument not in overrides]
    below, above = [], [f"{key}={value}" for key, value in settings(mode, env).items()]
    taken = _taken(mode, env)
    if "model_size" in taken:
        below.append(_size(taken["model_size"]))
    rule = ALGORITHMS[mode].rule
    if rule and "REWARD_LOAD" in taken:
        below.append(f"reward.function={rule}")  # as in the tutorial: the sum of rule and reward model
    return [*below, *files, *above, *overrides]


def settings(mode: str, env: Mapping[str, str]) -> dict[str, str]:
    """Return key -> value for the variables of a mode. Raises UserError if a checkpoint does not exist."""
    taken = _taken(mode, env)
    keys = {
        VARIABLES[name][1]: value
        for name, value in taken.items()
        if VARIABLES[name][1] in ("policy.tokenizer", "parallel.tp", "parallel.pp", "judge.url", "judge.model")
    }
    if taken.keys() & {"TP", "PP"}:
        keys["parallel.dp"] = "0"  # a file's value belongs to the layout of that file
    for name in ("LOAD_PATH", "POLICY_LOAD", "REWARD_LOAD"):
        if name in taken:
            iteration = taken.get("REWARD_LOAD_ITERATION", "") if name == "REWARD_LOAD" else ""
            keys[VARIABLES[name][1]] = _model(Path(taken[name]), iteration)
    if "DATASET_PATH" in taken:
        folder = Path(taken["DATASET_PATH"])
        keys["data.train"] = str(_within(folder, "train.jsonl"))
        if (folder / "dev.jsonl").exists():
            keys["data.eval"] = str(folder / "dev.jsonl")
    if "EVAL_DATASET_PATH" in taken:
        keys["data.eval"] = str(_within(Path(taken["EVAL_DATASET_PATH"]), "dev.jsonl"))
    if "CHECKPOINT_PATH" in taken:
        keys["out"] = taken["CHECKPOINT_PATH"]
    if taken.keys() & {"output_dir", "exp_name"}:
        name = taken.get("exp_name") or "-".join(part for part in (taken.get("model_size"), mode) if part)
        keys["out"] = str(Path(taken.get("output_dir", "runs")) / name)
    return keys


def without(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without these variables, for commands that use their own models and data."""
    return {name: value for name, value in env.items() if name not in VARIABLES}


def rows() -> list[tuple[str, str, str, str]]:
    """Return the rows of the table in README and --help: name, key, modes, meaning."""
    return [
        (name, key, {ALL: "all modes"}.get(modes, modes), meaning) for name, (modes, key, meaning) in VARIABLES.items()
    ]


def _taken(mode: str, env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are set and that the mode uses."""
    return {name: env[name] for name, (modes, _, _) in VARIABLES.items() if env.get(name) and mode in modes.split(", ")}


def _size(name: str) -> str:
    path = CONFIGS / f"{name}.toml"
    if not path.is_file():
        remedy = "give the name of a file in configs/, or unset model_size and set policy.load"
        raise UserError(f"model_size={name}: {path} does not exist; {remedy}")
    return str(path)


def _model(folder: Path, iteration: str) -> str:
    """Return the folder of the checkpoint of `iteration` in a folder of checkpoints; without one, the folder itself."""
    if not iteration:
        return str(folder)
    number = cluster.number({"REWARD_LOAD_ITERATION": iteration}, "REWARD_LOAD_ITERATION")
    names = (f"iter_{number:07}", f"step_{number:06}")
    found = [folder / name for name in names if (folder / name).is_dir()]
    if not found:
        raise UserError(
            f"REWARD_LOAD_ITERATION={iteration}: REWARD_LOAD={folder} contains neither {names[0]} nor {names[1]}"
        )
    return str(found[0])


def _within(path: Path, name: str) -> Path:
    """Return the file of that name in the folder `path`, or `path` itself if there is none."""
    return path / name if (path / name).exists() else path
