"""The models of a run, from config.json alone: the folder, use and head of each role."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rlhf import configuration, prepare
from rlhf.errors import UserError

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
    arch, roles = prepare.shapes(
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
    assert list(prepare.rule(configuration.load("grpo", overrides))) == wanted


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
        prepare.check_world(parallel, world)
    else:
        with pytest.raises(UserError, match=f"does not fit {world} ranks"):
            prepare.check_world(parallel, world)
