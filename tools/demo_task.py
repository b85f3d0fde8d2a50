"""The demo's task: word problems. Most demonstrations forget to carry. A seed decides all data."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Ida", "Leo", "Mia")
THINGS = ("apples", "pens", "books", "cards", "coins", "eggs", "nuts", "stamps")
FORMS = (
    "{name} has {a} {things} and buys {b} more. How many {things} now?",
    "{name} has {a} {things} and finds {b} more. How many {things} now?",
    "{name} sold {a} {things} and then {b} more. How many {things} in all?",
)
CAREFUL = 0.2  # share of the demonstrations that carry
DIGITS = range(1, 10)


def question(a: int, b: int, draw: random.Random) -> str:
    return draw.choice(FORMS).format(name=draw.choice(NAMES), things=draw.choice(THINGS), a=a, b=b)


def working(a: int, b: int, carries: bool) -> str:
    """Return the addition digit by digit: 7+5=12 2+3+1=6 #### 62. Without carrying: 7+5=12 2+3+0=5 #### 52."""
    (a10, a1), (b10, b1) = divmod(a, 10), divmod(b, 10)
    ones = a1 + b1
    carry = int(carries and ones > 9)
    tens = a10 + b10 + carry
    return f"{a1}+{b1}={ones} {a10}+{b10}+{carry}={tens} #### {10 * tens + ones % 10}"


def write(folder: Path, seed: int = 0, num_sft: int = 8192, num_rl: int = 4096, num_heldout: int = 400) -> None:
    """Write three jsonl files. Pairs of numbers in the held-out file are not in the other files, in either order."""
    draw = random.Random(seed)
    numbers = [10 * tens + ones for tens in DIGITS for ones in DIGITS]
    pairs = [(a, b) for a in numbers for b in numbers if a <= b and a // 10 + b // 10 < 9]
    draw.shuffle(pairs)
    heldout, train = pairs[:num_heldout], pairs[num_heldout:]

    def pick(pool: list[tuple[int, int]]) -> tuple[int, int]:
        a, b = draw.choice(pool)
        return (a, b) if draw.random() < 0.5 else (b, a)

    def demonstration() -> dict[str, str]:
        a, b = pick(train)
        return {"prompt": question(a, b, draw), "response": working(a, b, draw.random() < CAREFUL)}

    def problem(a: int, b: int) -> dict[str, str]:
        return {"eval_func": "math_rule", "prompt": question(a, b, draw), "answer": str(a + b)}

    files = {
        "train_sft": [demonstration() for _ in range(num_sft)],
        "train_rl": [problem(*pick(train)) for _ in range(num_rl)],
        "heldout": [problem(*pick([pair])) for pair in heldout],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(
    folder: Path,
    data: Path,
    changes: Mapping[str, Any] = MappingProxyType({}),
    pieces: int = MODEL["vocab_size"],
    marks: Sequence[str] = (),
    template: str = "",
) -> None:
    """Write config.json (MODEL | changes), and a tokenizer trained on the demonstrations. Weights are not written.

    marks: texts of a template that are one token each. template: the tokenizer's chat template; empty: none.
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (data / "train_sft.jsonl").read_text().splitlines()]
    texts = [
        text
        for row in rows
        for text in ([said["content"] for said in row["messages"]] if "messages" in row else row.values())
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=pieces,
        split_digits=True,
        user_defined_symbols=["####", *marks],
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "config.json").write_text(json.dumps({**MODEL, **changes}, indent=2))
    if template:
        (folder / "chat_template.jinja").write_text(template)


def noise(prompt: str, response: str, record: dict) -> float:
    """Return a random reward. Learning from it must not help."""
    return float(random.random() < 0.5)


def digits(prompt: str, response: str, record: dict) -> float:
    """Return the share of digits in the response: a reward that is not always 0 for random weights."""
    return sum(map(str.isdigit, response)) / max(1, len(response))


def make_weights(folder: Path, seed: int = 0, dtype: str = "float32", device: str = "cpu") -> None:
    """Write model.safetensors with random weights for a folder's config.json, equal to those of policy.init=random."""
    import torch
    from safetensors.torch import save_file

    from rlhf.model import architecture
    from rlhf.weights import initial, names

    arch = architecture.read(folder)
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for name, shape in names.hf_shapes(arch).items()
    }
    initial.fill(arch, names.tiles(arch, "hf"), tensors, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
