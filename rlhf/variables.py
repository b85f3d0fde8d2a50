"""The shell variables of the ChatLearn tutorial for Llama, as its scripts understand them.

They win over TOML files and lose to key=value. Pure functions of an environment, but for a look at which files exist.
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
BEFORE = ", ".join(mode for mode, made in ALGORITHMS.items() if made.trains and not made.aligns)  # the stages before alignment
ALIGN = ", ".join(mode for mode, made in ALGORITHMS.items() if made.trains and made.aligns)
RATED = ", ".join(mode for mode, made in ALGORITHMS.items() if made.trains and made.online)
OTHERS = ", ".join(mode for mode, made in ALGORITHMS.items() if made.aligns)

# Name -> (modes that take it, the key it sets, meaning). Conversions take theirs by themselves.
VARIABLES: dict[str, tuple[str, str, str]] = {
    "model_size": (ALL, "configs/SIZE.toml", "llama2-7B, llama2-13B, llama2-70B: this file is read before those of the command"),
    "LOAD_PATH": (BEFORE, "policy.load", "model to start from; convert*: the folder to read"),
    "POLICY_LOAD": (OTHERS, "policy.load", "model to start from, which is the reference too"),
    "REWARD_LOAD": (
        RATED,
        "reward.load",
        "reward model, and first critic of rlhf; grpo adds it to the rule math, unless reward.function is set",
    ),
    "REWARD_LOAD_ITERATION": (RATED, "reward.load", "which checkpoint of REWARD_LOAD: 1000 is iter_0001000, or step_001000/hf of a run"),
    "TOKENIZER_MODEL": (ALL, "policy.tokenizer", "tokenizer.model, or the folder it is in"),
    "DATASET_PATH": (TRAIN, "data.train", "file; of a folder its train.jsonl, with its dev.jsonl as data.eval"),
    "EVAL_DATASET_PATH": (ALL, "data.eval", "file; of a folder its dev.jsonl"),
    "CHECKPOINT_PATH": (BEFORE, "out", "folder of the run"),
    "output_dir": (ALIGN, "out", "folder of runs: out is output_dir/exp_name"),
    "exp_name": (ALIGN, "out", "name of the run; without it model_size and mode, as llama2-7B-rlhf"),
    "TP": (
        TRAIN,
        "parallel.tp",
        "tensor parallel size; parallel.dp is what is left. convert_hf_to_megatron: of the folder it writes",
    ),
    "PP": (TRAIN, "parallel.pp", "pipeline parallel size, in the same way"),
    "SAVE_PATH": ("convert*", "--to", "the folder to write"),
    "VOCAB_PATH": ("convert*", "--config", "folder of tokenizer, and config.json where LOAD_PATH has none; TOKENIZER_MODEL does the same"),
    "USE_LEGACY_MODELS": ("convert_hf_to_megatron", "--format", "True (the default): Megatron's legacy format; False: megatron-core's"),
    "target_params_dtype": ("convert*", "--dtype", "bf16, fp16 or fp32; without it as they are"),
}


@texts.paths()
def arguments(mode: str, given: list[str], env: Mapping[str, str]) -> list[str]:
    """The command's files and key=value with those of the variables put in their place: of several that set a key the last wins."""
    overrides = [argument for argument in given if "=" in argument and not argument.startswith("-")]
    files = [argument for argument in given if argument not in overrides]
    below, above = [], [f"{key}={value}" for key, value in settings(mode, env).items()]
    taken = _taken(mode, env)
    if "model_size" in taken:
        below.append(_size(taken["model_size"]))
    rule = ALGORITHMS[mode].rule
    if rule and "REWARD_LOAD" in taken:
        below.append(f"reward.function={rule}")  # the tutorial's merge: the sum of rule and reward model
    return [*below, *files, *above, *overrides]


def settings(mode: str, env: Mapping[str, str]) -> dict[str, str]:
    """Key -> value that the variables set in a mode. Raises UserError for a checkpoint that is not there."""
    taken = _taken(mode, env)
    keys = {
        VARIABLES[name][1]: value
        for name, value in taken.items()
        if VARIABLES[name][1] in ("policy.tokenizer", "parallel.tp", "parallel.pp")
    }
    if taken.keys() & {"TP", "PP"}:
        keys["parallel.dp"] = "0"  # that of a file would be for another layout
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
    """An environment in which none of them is set, for commands that bring their own models and data."""
    return {name: value for name, value in env.items() if name not in VARIABLES}


def rows() -> list[tuple[str, str, str, str]]:
    """The table for people: name, key, modes and meaning."""
    return [(name, key, {ALL: "all modes"}.get(modes, modes), meaning) for name, (modes, key, meaning) in VARIABLES.items()]


def _taken(mode: str, env: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set, of those that the mode takes."""
    return {name: env[name] for name, (modes, _, _) in VARIABLES.items() if env.get(name) and mode in modes.split(", ")}


def _size(name: str) -> str:
    path = CONFIGS / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"model_size={name}: {path} is not there; give the name of a file in configs/, or unset it and set policy.load")
    return str(path)


def _model(folder: Path, iteration: str) -> str:
    """The model in a folder: the folder, the checkpoint of an iteration in it, or where it is that of a run, its newest hf/."""
    if iteration:
        number = cluster.number({"REWARD_LOAD_ITERATION": iteration}, "REWARD_LOAD_ITERATION")
        names = (f"iter_{number:07}", f"step_{number:06}/hf")
        found = [folder / name for name in names if (folder / name).is_dir()]
        if not found:
            raise UserError(f"REWARD_LOAD_ITERATION={iteration}: REWARD_LOAD={folder} holds neither {names[0]} nor {names[1]}")
        return str(found[0])
    return str(folder / "hf" if (folder / "hf").is_dir() and not (folder / "config.json").exists() else folder)


def _within(path: Path, name: str) -> Path:
    """The file of that name, if path is a folder that has one."""
    return path / name if (path / name).exists() else path
