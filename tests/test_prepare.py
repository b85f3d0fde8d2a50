"""The models of a run, from config.json alone: the folder, use and head of each role."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from rlhf import configuration, convert, folders, prepare, rewards
from rlhf.data import lines
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError
from rlhf.shapes import check_world
from rlhf.shapes import shapes as read_shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task

CONTEXT = {
    "policy": 128,
    "other": 136,
    "reward": 144,
    "critic": 152,
    "classifier": 160,
}  # differs between the folders


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder per name, with only a config.json."""
    root = tmp_path_factory.mktemp("shapes")
    for name, context in CONTEXT.items():
        (root / name).mkdir()
        config = {**demo_task.MODEL, "max_position_embeddings": context}
        if name == "classifier":
            config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def shapes(root: Path, mode: str, *overrides: str) -> dict[str, tuple[str, str, bool, bool]]:
    """Return role -> (use, name of the folder, has an output layer, has a scalar head)."""
    common = [f"policy.load={root}/policy", "data.max_tokens=64", "rollout.max_tokens=16"]
    arch, roles = read_shapes(
        configuration.load(mode, [*common, *(text.replace("ROOT", str(root)) for text in overrides)]), 1
    )
    assert arch.context == CONTEXT["policy"]
    assert all(role.arch.context == CONTEXT[Path(role.folder).name] for role in roles.values())
    return {name: (role.use, Path(role.folder).name, role.arch.lm, role.arch.scalar) for name, role in roles.items()}


POLICY, REFERENCE = ("train", "policy", True, False), ("frozen", "policy", True, False)
CASES = [
    ("sft", [], {"policy": POLICY}),
    ("sft", ["reference.load=ROOT/other", "reward.load=ROOT/reward"], {"policy": POLICY}),
    ("reward", [], {"reward": ("train", "policy", False, True)}),
    ("reward", ["rm.lm=0.1"], {"reward": ("train", "policy", True, True)}),
    ("reward", ["reward.load=ROOT/reward"], {"reward": ("train", "policy", False, True)}),
    ("dpo", [], {"policy": POLICY, "reference": REFERENCE}),
    ("dpo", ["reference.load=ROOT/other"], {"policy": POLICY, "reference": ("frozen", "other", True, False)}),
    ("dpo", ["dpo.reference=false", "reference.load=ROOT/other"], {"policy": POLICY}),
    ("grpo", [], {"policy": POLICY, "reference": REFERENCE}),
    ("grpo", ["grpo.kl=0"], {"policy": POLICY}),
    ("grpo", ["grpo.kl=0", "reward.load=ROOT/reward"], {"policy": POLICY, "reward": ("frozen", "reward", False, True)}),
    (
        "online-dpo",
        ["reference.load=ROOT/other", "reward.load=ROOT/classifier"],
        {
            "policy": POLICY,
            "reference": ("frozen", "other", True, False),
            "reward": ("frozen", "classifier", False, True),
        },
    ),
    (
        "rlhf",
        ["reward.load=ROOT/reward"],
        {
            "policy": POLICY,
            "critic": ("train", "reward", False, True),
            "reference": REFERENCE,
            "reward": ("frozen", "reward", False, True),
        },
    ),
    (
        "rlhf",
        ["reward.load=ROOT/classifier", "critic.load=ROOT/critic", "reference.load=ROOT/other"],
        {
            "policy": POLICY,
            "critic": ("train", "critic", False, True),
            "reference": ("frozen", "other", True, False),
            "reward": ("frozen", "classifier", False, True),
        },
    ),
    ("rlhf", ["ppo.kl=0", "critic.load=ROOT/critic"], {"policy": POLICY, "critic": ("train", "critic", False, True)}),
    ("evaluate", [], {}),
    (
        "evaluate",
        ["reward.load=ROOT/reward", "reference.load=ROOT/other"],
        {"reward": ("frozen", "reward", False, True)},
    ),
    ("evaluate", ["reward.load=ROOT/reward", "evaluate.function=math"], {}),
]


@pytest.mark.parametrize(
    ("mode", "overrides", "wanted"), CASES, ids=lambda case: " ".join(case) if isinstance(case, list) else None
)
def test_roles(root: Path, mode: str, overrides: list[str], wanted: dict) -> None:
    assert shapes(root, mode, *overrides) == wanted


@pytest.mark.parametrize(
    ("mode", "overrides", "wanted"),
    [
        ("rlhf", [], "critic.load and reward.load are not set"),
        (
            "sft",
            ["steps=7", "epochs=0.5"],
            "steps=7 and epochs=0.5 are both set: set epochs=0 to use steps, or steps=100, its default, to use epochs",
        ),
        (
            "grpo",
            ["policy.load=ROOT/classifier"],
            "policy.load=.*/classifier is a reward model without an output layer",
        ),
        (
            "dpo",
            ["reference.load=ROOT/classifier"],
            "reference.load=.*/classifier is a reward model without an output layer",
        ),
        (
            "grpo",
            ["data.max_tokens=132", "policy.load=ROOT/other", "reference.load=ROOT/policy"],
            "the context length 128 of .*/policy: lower it",
        ),
        ("sft", ["policy.load="], "policy.load is not set"),
    ],
)
def test_roles_that_are_not_fit(root: Path, mode: str, overrides: list[str], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        shapes(root, mode, *overrides)


LOADS = ("policy.load", "policy.tokenizer", "reference.load", "critic.load", "reward.load")


def located(*overrides: str) -> list[str]:
    """Return the values of LOADS after the folders of runs are replaced."""
    config = prepare.located(configuration.load("rlhf", list(overrides)))
    return [getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in LOADS]


def checkpoint(out: Path, step: int, *formats: str) -> Path:
    """Make the folder of a checkpoint with exports, and the links of the run."""
    folder = out / f"step_{step:06}"
    for name in formats:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(f"{folder.name}/{name}")
    folder.mkdir(exist_ok=True)
    meta = dict.fromkeys(folders.KEYS, 0) | {"step": step, "state": {}}
    files = folders.checksums(folder, folders.exports(folder, formats))
    (folder / "meta.json").write_text(folders.describe(meta | {"files": files}))
    return folder


def test_a_run_means_its_newest_complete_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/sft")
    whole = [checkpoint(run, step, "mcore", "hf") for step in (10, 20)]
    last = checkpoint(run, 30)
    assert located(*(f"{key}={run}" for key in LOADS)) == [f"{run}/step_000020/hf"] * len(LOADS)
    assert located(*(f"{key}={whole[0]}/" for key in LOADS)) == [f"{run}/step_000010/hf"] * len(LOADS)
    for unchanged in (f"{run}/hf", f"{run}/step_000010/mcore", str(last), "no/folder", "runs", ""):
        assert located(f"policy.load={unchanged}")[0] == unchanged
    for name in ("hf", "mcore"):  # the links are back at an older step
        (run / name).unlink()
        (run / name).symlink_to(f"step_000010/{name}")
    assert located(f"policy.load={run}")[0] == f"{run}/step_000010/hf"
    (whole[0] / "hf/config.json").write_text("{  }")
    assert located(f"policy.load={run}")[0] == f"{run}/step_000020/hf"
    for step, name in ((10, "hf"), (20, "mcore")):  # checkpoint.format has changed
        checkpoint(Path("runs/other"), step, name)
    assert located("policy.load=runs/other")[0] == "runs/other/step_000020/mcore"
    (whole[1] / "meta.json").unlink()
    for given in (run, last):
        with pytest.raises(UserError, match=f"^{given}: of a run, but it has no complete export; let the run reach"):
            shapes(tmp_path, "sft", f"policy.load={given}")


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "https://huggingface.co/meta-llama/Llama-2-7b-hf"])
def test_a_name_on_the_hub_gets_its_command(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "hf download meta-llama/Llama-2-7b-hf --local-dir meta-llama/Llama-2-7b-hf$"
    others = [f"critic.load={root}/reward", f"reward.load={root}/reward"]
    for key in ("policy.load", "reference.load", "critic.load", "reward.load"):
        with pytest.raises(UserError, match=f"no such folder; if it is a model on the Hugging Face hub, .*: {command}"):
            shapes(root, "rlhf", *others, f"{key}={name}")
    with pytest.raises(UserError, match=command):
        Tokenizer.load(name)
    with pytest.raises(UserError, match=command):
        convert.main(["--from", name, "--to", "new", "--format", "hf"])
    with pytest.raises(UserError, match=r"hf download openai/gsm8k --repo-type dataset --local-dir openai/gsm8k$"):
        lines.files(Path("openai/gsm8k"))
    with pytest.raises(UserError, match="/a/b: no such folder; give the folder of a model in Hugging Face or Meg"):
        shapes(root, "sft", "policy.load=/a/b")


def test_a_file_is_no_name_on_the_hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/train.jsonl", "data/train.json.gz", "data/Train.JSON", "data/a.parquet", "data/a.csv"):
        with pytest.raises(UserError, match=f"^data set {name}: no such file or folder; give a jsonl, JSON or parquet"):
            lines.files(Path(name))
    with pytest.raises(UserError, match=r"^tokenizer m/tokenizer.model: no such file or folder; set policy.tokenizer"):
        Tokenizer.load("m/tokenizer.model")
    with pytest.raises(UserError, match=r"m/model.safetensors: no such folder; give the folder of a model"):
        shapes(root, "sft", "policy.load=m/model.safetensors")
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen2.5-0.5B --local-dir"):
        Tokenizer.load("Qwen/Qwen2.5-0.5B")


def test_a_folder_comes_before_a_name_on_the_hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "policy", "meta-llama/policy")
    assert shapes(root, "sft", "policy.load=meta-llama/policy") == {"policy": POLICY}


@pytest.mark.parametrize("changes", [{}, {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}])
@pytest.mark.parametrize("keys", [["parallel.cp=2"], ["parallel.tp=2", "rollout.engine=kvcache"], ["parallel.dp=2"]])
def test_texts_within_the_window_need_none(tmp_path: Path, changes: dict[str, object], keys: list[str]) -> None:
    """Llama itself has no windows, so transformers ignores sliding_window there."""
    config = {**demo_task.MODEL, "max_position_embeddings": 512, "sliding_window": 128} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = [f"policy.load={tmp_path}", "data.max_tokens=64", "rollout.max_tokens=16", "grpo.kl=0"]
    for mode in ("sft", "grpo"):
        arch, _ = read_shapes(configuration.load(mode, [*given, *keys]), 2)
        assert (arch.context, arch.window) == ((512, 128) if changes else (128, 0))


def test_all_models_read_the_same_tokens(root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**demo_task.MODEL, "vocab_size": 256}))
    for mode, key in (("dpo", "reference"), ("grpo", "reward"), ("rlhf", "critic")):
        more = [f"reward.load={root}/reward"] if mode == "rlhf" else []
        with pytest.raises(
            UserError, match=rf"{key}.load={tmp_path} has a vocabulary of 256, policy.load={root}/policy has "
        ):
            shapes(root, mode, *more, f"{key}.load={tmp_path}")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], ["math"]),
        (["reward.function=file.py:score"], ["file.py:score"]),
        (["reward.function=['math', 'file.py:score']"], ["math", "file.py:score"]),
        (["reward.load=folder"], []),
        (["reward.load=folder", "reward.function=math"], ["math"]),
        (["evaluate.function=file.py:score"], ["math"]),
        (["rollout.environment=file.py:Class"], []),
        (["rollout.environment=file.py:Class", "reward.function=math"], ["math"]),
    ],
)
def test_the_rule_that_rewards(overrides: list[str], wanted: list[str]) -> None:
    assert list(rewards.rule(configuration.load("grpo", overrides))) == wanted


@pytest.mark.parametrize(
    ("axes", "dp", "world", "fits"),
    [
        ((1, 1, 1), 0, 1, True),
        ((2, 1, 1), 0, 4, True),
        ((2, 2, 2), 0, 8, True),
        ((2, 2, 2), 0, 4, False),
        ((2, 1, 1), 0, 3, False),
    ]
    + [
        ((1, 1, 1), 2, 2, True),
        ((2, 1, 1), 2, 4, True),
        ((2, 1, 1), 1, 4, False),
        ((1, 1, 3), 2, 6, True),
        ((1, 3, 1), 1, 6, False),
    ],
)
def test_worlds(axes: tuple[int, int, int], dp: int, world: int, fits: bool) -> None:
    keys = [f"parallel.{axis}={size}" for axis, size in zip(("tp", "pp", "cp"), axes, strict=True)]
    parallel = configuration.load("sft", [*keys, f"parallel.dp={dp}"]).parallel
    if fits:
        check_world(parallel, world)
    else:
        with pytest.raises(UserError, match=f"does not fit {world} ranks"):
            check_world(parallel, world)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=str)
@pytest.mark.parametrize(
    ("mode", "keys", "wanted"),
    [
        ("grpo", ["evaluate.samples=4"], "evaluate.samples=4 at evaluate.temperature=0"),
        ("grpo", ["reward.load=x", "reward.weights.math=2"], "reward.weights is for the parts of reward functions"),
        ("evaluate", ["watchdog.timeout=5"], "watchdog.timeout=5 is not above reward.timeout=10"),
        ("grpo", ["reward.function=judge", "watchdog.timeout=1000"], "is not above 1200 s, which a judge may take"),
        ("sft", ['data.eval=["x/a.jsonl", "y/a.jsonl"]'], "data.eval: x/a.jsonl and y/a.jsonl both have the name a"),
    ],
)
def test_a_dry_run_refuses_the_same(fail, made: Path, mode: str, keys: list[str], wanted: str, more: list[str]) -> None:
    """These mistakes are found without models and data."""
    keys = [key.replace("reward.load=x", f"reward.load={made}/model") for key in keys]
    assert wanted in fail(mode, *keys, *more)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        (["data.train=BARE"], "no 'answer', which the reward needs; add it, or set reward.function or reward.load"),
        (["data.train=BARE", "reward.function=math"], "which the reward needs; add it, or set another reward.function"),
        (
            ["data.eval=BARE", "reward.function=OWN", "evaluate.function=math"],
            "add it, or set another evaluate.function",
        ),
        (['data.eval=["BARE", "missing.jsonl"]', "evaluate.function=OWN"], "missing.jsonl: no such file"),
        (
            ["data.train=BARE", "data.eval=missing.jsonl", "reward.function=OWN", "evaluate.function=math"],
            "missing.jsonl: no such file",
        ),
    ],
)
def test_lines_need_what_their_reward_needs(fail, tmp_path: Path, keys: list[str], wanted: str) -> None:
    """Held-out lines need what evaluate.function needs, if it is set, and others what reward.function needs."""
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1+1"}')
    names = {"BARE": f"{tmp_path}/bare.jsonl", "OWN": "tools/demo_task.py:noise"}
    for name, value in names.items():
        keys = [key.replace(name, value) for key in keys]
    assert wanted in fail("grpo", *keys)
