"""Compare the scores of reward models with transformers, for each kind of pad token (part of tests/ranks/laws.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.contracts import Sample
from rlhf.model import architecture
from rlhf.parallel.mesh import Mesh
from rlhf.phases import Phase
from rlhf.residence import Residence
from rlhf.roles import Roles
from rlhf.shapes import Role

EOS, OTHER = 2, 3
ENDS = ([], [EOS], [EOS, EOS, EOS], [OTHER], [EOS, OTHER], [OTHER, EOS])  # of the texts; they are in their middle too
PADS = {"absent": None, "distinct": OTHER, "eos": EOS}


def check(source: Path, mesh: Mesh, root: Path) -> None:
    """Check scores before and after an update, and those of the export after it.

    source: the causal model of a family. root: where to write the reward models.
    """
    rng = np.random.default_rng(5)
    bodies = [rng.permutation([*rng.integers(4, 509, 4 + 3 * i), EOS, OTHER, 5]) for i in range(len(ENDS))]
    texts = [np.array([*body, 7, *end], np.int32) for body, end in zip(bodies, ENDS, strict=True)]
    samples = [Sample(text, np.arange(len(text) - 1) > 1, i // 2, reward=float(i)) for i, text in enumerate(texts)]
    for kind, pad in PADS.items():
        folder = classifier(source, root / kind, pad)
        config = configuration.load("reward", [f"policy.load={folder}", "optim.lr=1e-3"])
        role = Role("train", str(folder), architecture.read(folder))
        roles = Roles(config, mesh, {"reward": role}, torch.float32, 1.0, Residence((), mesh.device))
        loss = partial(ALGORITHMS["reward"](config).loss, "reward")
        before = scores(folder, texts, pad)
        assert found(roles, samples) == pytest.approx(before, abs=1e-5), f"{source.name}, pad {kind}"
        total, count = roles.evaluate("reward", samples, loss, whole_groups=True)["score"]
        assert total / count == pytest.approx(np.mean(before), abs=1e-5), f"{source.name}, pad {kind}: in the loss"
        for _ in roles.visit(Phase.LEARN):
            roles.learn("reward", samples, loss, True, 1e-3)
        roles.export("reward", root / f"{kind}-out" / "hf", "hf")
        after = scores(root / f"{kind}-out" / "hf", texts, pad)
        assert found(roles, samples) == pytest.approx(after, abs=1e-5), f"{source.name}, pad {kind}: exported"
        assert np.abs(np.subtract(before, after)).max() > 1e-3, "nothing was learned"


def classifier(source: Path, folder: Path, pad: int | None) -> Path:
    """Write the causal model as a reward model with this pad token."""
    tensors = load_file(source / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    tensors["score.weight"] = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)) * 0.1
    config = json.loads((source / "config.json").read_text())
    names = [name.replace("ForCausalLM", "ForSequenceClassification") for name in config["architectures"]]
    config |= {"architectures": names, "id2label": {"0": "LABEL_0"}, "eos_token_id": EOS, "pad_token_id": pad}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def found(roles: Roles, samples: Sequence[Sample]) -> list[float]:
    return [float(stream[-1]) for stream in roles.read("reward", samples)]


def scores(folder: Path, texts: Sequence[np.ndarray], pad: int | None) -> list[float]:
    """Return the scores of transformers. They are the same in a batch with padding on either side."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert model.config.pad_token_id == pad
    with torch.no_grad():
        alone = [model(torch.from_numpy(text[None].astype(np.int64))).logits.item() for text in texts]
        width = max(map(len, texts))
        for left in (False, True) if pad is not None else ():
            rows = [([pad] * (width - len(text)), text.tolist()) for text in texts]
            ids = torch.tensor([padding + row if left else row + padding for padding, row in rows])
            real = [([0] * len(padding), [1] * len(row)) for padding, row in rows]
            mask = torch.tensor([none + ones if left else ones + none for none, ones in real])
            batch = model(ids, attention_mask=mask).logits[:, 0].tolist()
            assert batch == pytest.approx(alone, abs=1e-5), f"{folder}: padded on the {'left' if left else 'right'}"
    return alone
