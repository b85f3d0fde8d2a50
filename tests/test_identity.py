"""A run continues with the settings with which it started.

Keys and inputs that decide its result must be equal, and all others may change.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from rlhf import configuration, folders
from rlhf.algorithms import ALGORITHMS
from rlhf.errors import UserError
from rlhf.prepare import Inputs, inputs

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task

DATA = {
    "sft": "train_sft",
    "dpo": "train_sft",
    "reward": "train_sft",
    "grpo": "train_rl",
    "online-dpo": "train_rl",
    "rlhf": "train_rl",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two models of one shape, one of another shape, and data."""
    root = tmp_path_factory.mktemp("identity")
    demo_task.write(root / "data", num_sft=300, num_rl=20, num_heldout=20)
    demo_task.make_model(root / "model", root / "data")
    demo_task.make_weights(root / "model")
    shutil.copytree(root / "model", root / "copy")
    shutil.copytree(root / "model", root / "other")
    demo_task.make_weights(root / "other", 9)
    shutil.copytree(root / "model", root / "shape")
    config = json.loads((root / "model/config.json").read_text())
    (root / "shape/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    for name in ("train_sft", "train_rl"):
        shutil.copy(root / f"data/{name}.jsonl", root / f"data/{name}_copy.jsonl")
        (root / f"data/{name}_less.jsonl").write_text(
            "".join((root / f"data/{name}.jsonl").read_text().splitlines(keepends=True)[1:])
        )
    return root


def start(made: Path, out: Path, mode: str, *overrides: str) -> Inputs:
    keys = [
        f"policy.load={made}/model",
        f"data.train={made}/data/{DATA[mode]}.jsonl",
        "data.max_tokens=128",
        "rollout.max_tokens=32",
    ]
    config = configuration.load(
        mode, [*keys, f"out={out}", *(key.format(made=made, data=DATA[mode]) for key in overrides)]
    )
    return inputs(config, 1)


def save(out: Path, given: Inputs, mode: str, steps: int = 100) -> None:
    """Write the checkpoint of step 7."""
    (out / "step_000007").mkdir(parents=True)
    meta = {
        **dict.fromkeys(folders.KEYS, 1),
        "step": 7,
        "state": {},
        "mode": mode,
        "seed": 1,
        "run": given.identity,
        "steps": steps,
    }
    (out / "step_000007/meta.json").write_text(folders.describe(meta))
    (out / "latest").write_text("step_000007")


@pytest.mark.parametrize(
    ("mode", "key", "said"),
    [
        ("sft", "policy.load={made}/other", r"policy.load={made}/model, this run has {made}/other"),
        ("sft", "policy.load={made}/shape", r"policy.load={made}/model, this run has {made}/shape"),
        (
            "sft",
            "data.train={made}/data/{data}_less.jsonl",
            r"data.train={made}/data/train_sft.jsonl, this run has .*_less.jsonl",
        ),
        ("sft", "data.template=human", "data.template=auto, this run has human"),
        ("sft", "batch.prompts=32", "batch.prompts=64, this run has 32"),
        ("sft", "data.max_tokens=64", "data.max_tokens=128, this run has 64"),
        ("sft", "seed=2", "seed=1, this run has 2"),
        ("grpo", "grpo.kl=0.5", "grpo.kl=.*, this run has 0.5"),
        ("grpo", "reference.load={made}/other", r"reference.load={made}/model, this run has {made}/other"),
        ("grpo", "rollout.group=4", "rollout.group=8, this run has 4"),
        ("grpo", "rollout.stop=END", r"rollout.stop=\[\], this run has \['END'\]"),
        (
            "grpo",
            "reward.function=tools/demo_task.py:noise",
            r"reward.function=\[\], this run has \['tools/.*:noise'\]",
        ),
        ("grpo", "reward.weights.math=2", "reward.weights=.*, this run has .*'math': 2.0.*"),
    ],
)
def test_another_run_is_refused(made: Path, tmp_path: Path, mode: str, key: str, said: str) -> None:
    save(tmp_path, start(made, tmp_path, mode), mode)
    with pytest.raises(
        UserError,
        match=f"step_000007 was saved with {said.format(made=made)}: "
        "start with the same settings and files, or set another out$",
    ):
        start(made, tmp_path, mode, key)


def test_other_data_sets_are_refused(made: Path, tmp_path: Path) -> None:
    """Their contents, their order and the ratios of their weights decide the result. Their names and paths do not."""
    data, other = f"{made}/data/train_sft.jsonl", f"{made}/data/train_sft_less.jsonl"
    given = start(made, tmp_path, "sft", f'data.train=["{data}", "b={other}"]', "data.weights.b=3", "epochs=1")
    assert given.steps == math.ceil(300 * 4 / 64), "a pass over 300 lines, which are a quarter of the draws"
    save(tmp_path, given, "sft")
    same = [f'data.train=["a={data}", "b={made}/data/../data/train_sft_less.jsonl"]', "data.weights.b=3"]
    assert start(made, tmp_path, "sft", *same).remarks == []
    renamed = [f'data.train=["a={data}", "c={other}"]', "data.weights.a=0.5", "data.weights.c=1.5"]
    assert start(made, tmp_path, "sft", *renamed).remarks == []
    for keys, said in (
        ([same[0]], "data.weights=train_sft 1, b 3, this run has a 1, b 1: "),
        ([same[0], "data.weights.b=2"], "data.weights=train_sft 1, b 3, this run has a 1, b 2: "),
        ([f'data.train=["b={other}", "{data}"]', "data.weights.b=3"], f"data.train={data}, b={other}, this run has b="),
        ([f"data.train=b={other}", "data.weights.b=3"], f"data.train={data}, b={other}, this run has b="),
    ):
        with pytest.raises(UserError, match=re.escape(f"step_000007 was saved with {said}")):
            start(made, tmp_path, "sft", *keys)


def test_another_mode_is_refused(made: Path, tmp_path: Path) -> None:
    save(tmp_path, start(made, tmp_path, "sft"), "sft")
    with pytest.raises(
        UserError,
        match=r"step_000007 was saved with mode=sft, this run has grpo: "
        "start with the same settings and files, or set another out$",
    ):
        start(made, tmp_path, "grpo")


def test_files_that_have_changed_are_refused(made: Path, tmp_path: Path) -> None:
    """The error has the name that the files had."""
    data = tmp_path / "mine.jsonl"
    shutil.copy(made / "data/train_sft.jsonl", data)
    out = tmp_path / "run"
    save(out, start(made, out, "sft", f"data.train={data}"), "sft")
    assert start(made, out, "sft", f"data.train={data}").remarks == []
    shutil.copy(made / "data/train_sft_less.jsonl", data)
    with pytest.raises(
        UserError,
        match=f"step_000007 was saved with another content of data.train={data}: "
        "start with the same settings and files",
    ):
        start(made, out, "sft", f"data.train={data}")


def test_other_stop_tokens_are_refused(made: Path, tmp_path: Path) -> None:
    """Those of config.json count, too. A checkpoint of an earlier version, which has not saved them, may resume."""
    shutil.copytree(made / "model", tmp_path / "model")
    file, keys = tmp_path / "model/config.json", [f"policy.load={tmp_path}/model", f"reference.load={made}/model"]
    first = start(made, tmp_path / "run", "grpo", *keys)
    save(tmp_path / "run", first, "grpo")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [first.tokenizer.eos, 0]}))
    with pytest.raises(UserError, match=f"another content of policy.tokenizer/config.json={tmp_path}/model: start"):
        start(made, tmp_path / "run", "grpo", *keys)
    del first.identity["read"]["policy.tokenizer/config.json"]
    save(tmp_path / "old", first, "grpo")
    assert start(made, tmp_path / "old", "grpo", *keys).remarks == []


@pytest.mark.parametrize(
    "keys",
    [
        ["steps=9", "log.every=3", "evaluate.every=3", "checkpoint.every=3", "memory.offload=all", "batch.tokens=512"],
        ["epochs=3", "data.invalid=skip"],
        ["policy.load={made}/copy", "data.train={made}/data/{data}_copy.jsonl", "policy.tokenizer={made}/other"],
        [
            "rollout.memory=0.3",
            "rollout.cache=1",
            "rollout.check=true",
            "reward.timeout=3",
            "reward.concurrency=3",
            "reward.max_failed=1",
            "data.eval={made}/data/{data}.jsonl",
        ],
    ],
)
@pytest.mark.parametrize("mode", ["sft", "grpo"])
def test_what_changes_no_result_may_differ(made: Path, tmp_path: Path, mode: str, keys: list[str]) -> None:
    save(tmp_path, start(made, tmp_path, mode), mode)
    assert start(made, tmp_path, mode, *keys).remarks == []


def test_what_may_differ_from_some_step_on_is_said(made: Path, tmp_path: Path) -> None:
    save(tmp_path, start(made, tmp_path, "sft", "optim.lr=1e-3", "optim.schedule=linear"), "sft")
    remarks = start(made, tmp_path, "sft", "optim.lr=1e-4", "optim.schedule=linear", "steps=200").remarks
    assert remarks == [
        "optim.lr=0.0001 from here on; step_000007 was saved with 0.001",
        "steps=200 changes optim.schedule=linear from here on; it was steps=100",
    ]


@pytest.mark.parametrize("mode", ["sft", "grpo", "reward"])
def test_a_pad_token_is_part_of_a_reward_model_alone(made: Path, tmp_path: Path, mode: str) -> None:
    """The score is read at the last token that is not pad. A run says so if texts end with this token."""
    text = json.dumps({"prompt": "1+1", "chosen": "2", "rejected": "3"})
    (tmp_path / "pairs.jsonl").write_text(text)
    shutil.copytree(made / "model", tmp_path / "model")
    config = json.loads((made / "model/config.json").read_text())
    data = [f"data.train={tmp_path}/pairs.jsonl"] * (mode == "reward")
    keys = [f"policy.load={tmp_path}/model", f"reference.load={made}/model", *data]
    first = start(made, tmp_path / "run", mode, *keys)
    assert first.remarks == []
    eos = first.tokenizer.eos
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"pad_token_id": eos}))
    second = start(made, tmp_path / "run", mode, *keys)
    assert (second.identity == first.identity) == (mode != "reward")
    said = f"{tmp_path}/model/config.json has the end-of-text token as pad_token_id={eos}"
    wanted = [f"{said}: the score is read at the token before it, as in transformers"]
    assert second.remarks == (wanted if mode == "reward" else [])


def test_epochs_decide_the_number_of_steps(made: Path, tmp_path: Path) -> None:
    """All that depends on the number of steps uses theirs. A step may span the end of the last epoch."""
    records = len(start(made, tmp_path, "sft").records)
    for key, steps in (
        ("steps=7", 7),
        ("epochs=1", math.ceil(records / 64)),
        ("epochs=2.5", math.ceil(2.5 * records / 64)),
        ("epochs=1e-5", 1),
    ):
        assert start(made, tmp_path, "sft", key).steps == steps
    # the product of the floating-point numbers is 2.1000000000000003 x 10
    assert start(made, tmp_path, "sft", "epochs=2.1", "batch.prompts=30").steps == -(-records * 21 // 300)
    save(tmp_path, start(made, tmp_path, "sft", "optim.schedule=linear", "epochs=1"), "sft", math.ceil(records / 64))
    assert start(made, tmp_path, "sft", "optim.schedule=linear", "epochs=1").remarks == []
    [remark] = start(made, tmp_path, "sft", "optim.schedule=linear", "epochs=2").remarks
    assert remark.startswith(f"steps={math.ceil(2 * records / 64)} changes optim.schedule=linear from here on")
    rlhf = ["policy.init=random", "reward.load={made}/model", "epochs=20", "batch.prompts=2"]
    assert start(made, tmp_path / "rlhf", "rlhf", *rlhf, "ppo.critic_warmup=150").steps == 200
    with pytest.raises(UserError, match=r"ppo.critic_warmup=200 leaves no step of steps=200 for the policy"):
        start(made, tmp_path / "rlhf", "rlhf", *rlhf, "ppo.critic_warmup=200")


def test_code_that_has_changed_is_said(made: Path, tmp_path: Path) -> None:
    """A reward function in a file may change, because the user may have corrected it. The run prints that."""
    code, out = tmp_path / "mine.py", tmp_path / "run"
    code.write_text("def worth(*_):\n    return 1\n")
    key = f"reward.function={code}:worth"
    save(out, start(made, out, "grpo", key), "grpo")
    assert start(made, out, "grpo", key).remarks == []
    code.write_text("def worth(*_):\n    return 2\n")
    assert start(made, out, "grpo", key).remarks == [f"another content of reward.function={code} from here on"]


def test_checkpoints_of_before_are_continued_from(made: Path, tmp_path: Path) -> None:
    """Older checkpoints contain only mode and seed. Later ones have one reward function as a text."""
    given = start(made, tmp_path, "sft")
    given.identity.clear()
    save(tmp_path, given, "sft")
    assert start(made, tmp_path, "sft", "batch.prompts=3").remarks == []
    for text, keys in (("", []), ("math", ["reward.function=math"])):
        out = tmp_path / f"grpo{text}"
        given = start(made, out, "grpo", *keys)
        given.identity["keys"]["reward.function"] = text
        del given.identity["keys"]["reward.weights"]
        save(out, given, "grpo")
        assert start(made, out, "grpo", *keys).remarks == []


@pytest.mark.parametrize("mode", ALGORITHMS)
def test_every_mode_has_a_folder_of_its_own(mode: str) -> None:
    """This is the default, and `out` overrides it."""
    assert configuration.load(mode, []).out == configuration.load(mode, ["out="]).out == f"runs/{mode}"
    assert configuration.load(mode, ["out=mine"]).out == "mine"
