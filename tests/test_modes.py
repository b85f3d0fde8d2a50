"""Every mode in the training loop: step zero, equal metrics at every layout, and a bitwise resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import run_ranks

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import demo_task  # noqa: E402
import tutorial_task  # noqa: E402

RULES = """
import os
import zlib


def even(prompt, response, record):
    return float(len(response) % 2 == 0)


def quarter(prompt, response, record):
    return 0.25


def fail_on_rank_1(prompt, response, record):
    if os.environ["RANK"] == "1":
        raise ValueError("this is rank 1")
    return 1.0


def length(prompt, response, record):
    if zlib.crc32(response.encode()) % 5 == 0:
        raise ValueError("about every fifth response has no reward")
    return len(response) / 100
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write data for every mode, two sets of random weights, and a reward model whose head is not 0."""
    import torch
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("modes")
    tutorial_task.write(root / "data", num=256, num_heldout=8)
    demo_task.make_model(
        root / "model",
        root / "data",
        {"vocab_size": 320, "hidden_size": 64, "max_position_embeddings": 512},
        pieces=320,
        template=tutorial_task.TEMPLATE,
    )
    demo_task.make_weights(root / "model")
    config = json.loads((root / "model/config.json").read_text())
    for name, seed in (("sft", 1), ("reward", 2)):
        (root / name).mkdir()
        for file in ("tokenizer.model", "config.json", "chat_template.jinja"):
            (root / name / file).write_bytes((root / "model" / file).read_bytes())
        demo_task.make_weights(root / name, seed)
    tensors = load_file(root / "reward/model.safetensors")
    tensors["score.weight"] = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)) * 0.1
    del tensors["lm_head.weight"]
    save_file(tensors, root / "reward/model.safetensors", metadata={"format": "pt"})
    classifier = {**config, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (root / "reward/config.json").write_text(json.dumps(classifier))
    (root / "rules.py").write_text(RULES)
    for kind in ("sft", "prompts"):
        rows = [json.loads(line) for line in (root / f"data/dev_{kind}.jsonl").read_text().splitlines()]
        rows = [{**row, "category": ("even", "odd")[n % 2]} for n, row in enumerate(rows)]
        (root / f"data/kinds_{kind}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [(1, ["tp1:sft,reward,dpo"]), (1, ["tp1:online-dpo,grpo,rlhf"]), (2, ["tp2", "pp2", "cp2", "dp2"])],
    ids=["data", "engine", "two"],
)
def test_modes(folder: Path, ranks: int, layouts: list[str]) -> None:
    """See tests/ranks/modes.py. The last case compares its metrics with those of the others."""
    assert "modes agree" in run_ranks(ranks, "tests/ranks/modes.py", str(folder), *layouts)


@pytest.mark.parametrize(("ranks", "layout"), [(1, "tp1"), (2, "dp2")])
def test_programs(folder: Path, ranks: int, layout: str) -> None:
    """See tests/ranks/programs.py."""
    output = run_ranks(ranks, "tests/ranks/programs.py", str(folder), layout)
    assert "programs end well" in output
    remark = "model.safetensors.index.json: the first is read, as in transformers"
    assert (remark in output) == (layout == "tp1"), "only this layout evaluates"


def test_reward_model_is_a_classifier_in_transformers(folder: Path) -> None:
    """The exported folder gives every text, at its last token, the score that the run used for its held-out loss."""
    import torch
    import transformers

    from rlhf.config import Data
    from rlhf.data.records import Records
    from rlhf.data.tokenizer import Tokenizer

    out = folder / "tp2" / "reward"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out / "hf", dtype=torch.float32)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    samples = Records.load(folder / "data/dev_reward.jsonl", "scored", Tokenizer.load(out / "hf"), Data()).head(0)
    with torch.no_grad():
        scores = [model(torch.from_numpy(s.tokens[None].astype("int64"))).logits.item() for s in samples]
    pairs = [
        (i, j)
        for i, a in enumerate(samples)
        for j, b in enumerate(samples)
        if a.group == b.group and a.reward > b.reward
    ]
    loss = torch.tensor([scores[j] - scores[i] for i, j in pairs]).exp().log1p().mean().item()
    said = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(said["eval_loss"] - 0.6931) > 1e-3, "the model has learned nothing that could be compared"
    assert loss == pytest.approx(said["eval_loss"], abs=1e-5)


def test_judged_texts_have_the_scores_of_transformers(folder: Path) -> None:
    """The scores are those of a run with a reward model."""
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
    for mode in ("online-dpo", "grpo", "rlhf"):
        graded = json.loads((folder / "tp1" / mode / "graded.json").read_text())
        assert len(graded) == 5
        with torch.no_grad():
            assert all(
                model(torch.tensor([tokens])).logits.item() == pytest.approx(score, abs=1e-5)
                for tokens, score in graded
            )


# file of the public data -> the task that prepares it -> the modes for each kind of its lines
PUBLIC = {
    "hh_harmless_test.jsonl.gz": (
        "hh",
        {"sft": ["sft"], "reward": ["reward"], "dpo": ["dpo"], "alignment": ["rlhf", "online-dpo"]},
    ),
    "gsm8k_test.jsonl.gz": ("gsm8k", {"math": ["grpo"]}),
    "gsm8k_train_2000.jsonl.gz": ("gsm8k", {"sft": ["sft"], "math": ["grpo"]}),
    "mt_bench_question.jsonl": ("mtbench", {"alignment": ["online-dpo"]}),
}


def test_a_step_on_every_public_file(folder: Path, shared_data: Path, tmp_path: Path) -> None:
    """tools/prepare_data.py converts each file, and each mode of its lines makes one update."""
    import prepare_data

    assert PUBLIC.keys() <= {path.name for path in shared_data.iterdir()}
    jobs = []
    for name, (task, kinds) in PUBLIC.items():
        assert prepare_data.main([task, "--from", str(shared_data / name), "--to", str(tmp_path / name)]) == 0
        for kind, modes in kinds.items():
            (file,) = (
                path for path in (tmp_path / name / kind).iterdir() if path.stat().st_size
            )  # train or dev, by its name
            jobs += [f"{mode}={file}" for mode in modes]
    printed = run_ranks(1, "tests/ranks/steps.py", str(folder), *jobs, threads=2)
    assert printed.count("stepped") == len(jobs) == 9
