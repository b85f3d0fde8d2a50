"""The sampler with real engines: seeds, groups, stop strings, rewards, and the same samples for any number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task
from vocabularies import write_byte_level, write_sentencepiece

from rlhf import configuration
from rlhf.data.tokenizer import Tokenizer
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.stops import Stops

ROOT = Path(__file__).parents[1]


def launch(folder: Path, ranks: int) -> str:
    """Return the samples that the program printed."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "tests/ranks/sampling.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("drawn"))
    return line


def test_sampler_on_one_and_two_ranks(tmp_path: Path) -> None:
    """See tests/ranks/sampling.py. One engine and two engines draw the same samples."""
    demo_task.write(tmp_path, num_sft=300, num_rl=20, num_heldout=20)
    demo_task.make_model(tmp_path / "model", tmp_path)
    assert launch(tmp_path, 1) == launch(tmp_path, 2)


def test_a_special_token_may_be_a_stop_string(tmp_path: Path) -> None:
    """<|im_end|> of a tokenizer with another eos: alone it stops the engine.

    As part of a longer string it is found in the tokens.
    """
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, eos="<|endoftext|>"))
    config = configuration.load("grpo", ['rollout.stop=["<|im_end|>", "<|im_end|>\\n", "e l"]'])
    sampler = Sampler(config, None, None, tokenizer)
    (end,) = tokenizer.encode("<|im_end|>", control=True)
    assert sampler.sampling().stop_ids == (tokenizer.eos, end)
    assert not Stops(tokenizer, ["<|im_end|>"]).watched, "the engine ends there by itself"
    assert Stops(tokenizer, ["e"]).watched, "it may be a part of a longer token"
    for said, kept in (("hello<|im_end|>\nhello", "hello<|im_end|>"), ("the letter", "the l"), ("hello", "hello")):
        tokens = tokenizer.encode(said, control=True)
        end = sampler.stops.end(tokens)
        assert tokenizer.decode(tokens[:end], skip_special=False).startswith(kept)
        assert (end is None) == (said == kept)


def write_byte_fallback(folder: Path) -> Path:
    """Write a tokenizer.json with bytes as in Llama 2:

    if several bytes together are not valid, all of them are broken.
    """
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"\u2581{c}" for c in "ab"), *"ab\u2581"]
    backend = Backend(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["<unk>", "</s>"])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def every_prefix(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> int | None:
    """The first version of the search for the end: the text of every prefix is decoded."""

    def stopped(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens, skip_special=False)
        return any(stop in text for stop in stops)

    return next(n for n in range(1, len(tokens) + 1) if stopped(tokens[:n])) if stopped(tokens) else None


def kinds(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Return tokens to draw from: all (and two beyond the vocabulary), and those of characters with several bytes."""
    spelled = [i for text in ("a b\n a\tb", "\n\u6f22\u5b57 \u00e9\n", "\U0001f642\n") for i in tokenizer.encode(text)]
    return {"all": [*range(tokenizer.vocab + 2)], "spelled": spelled, "ascii": tokenizer.encode("a b\n a\tb")}


@pytest.mark.parametrize("write", [write_byte_level, write_sentencepiece, write_byte_fallback])
def test_the_end_is_the_first_prefix_with_a_stop_string(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """The tokens are random, with valid and broken characters. Some stop strings have a broken character."""
    tokenizer = Tokenizer.load(write(tmp_path / "tokenizer"))
    rng = np.random.default_rng(1)
    found = dict.fromkeys(("none", "late", "hidden"), 0)
    for among in kinds(tokenizer).values():
        for turn in range(240):
            tokens = rng.choice(among, rng.integers(1, 32)).tolist()
            text = tokenizer.decode(tokens, skip_special=False)
            start = int(rng.integers(0, max(1, len(text) - 2)))
            said = text[start : start + int(rng.integers(1, 4))] or "x"  # a substring of the text, or else "x"
            stops = [[said], [said, "a"], ["\n"], ["b\n", " a"], ["\ufffd"], ["\n", "\ufffd\n"]][turn % 6]
            end = every_prefix(tokenizer, tokens, stops)
            assert Stops(tokenizer, stops).end(tokens) == end, (tokens, stops)
            found["none"] += end is None
            found["late"] += end is not None and end > 8
            later = [tokenizer.decode(tokens[:n], skip_special=False) for n in range(end or len(tokens), len(tokens))]
            found["hidden"] += any(not any(stop in text for stop in stops) for text in later)
    assert all(found.values()), "each of these was met"


def test_a_long_response_is_decoded_a_few_times(llama3: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response without its stop string is decoded once, and one with it about log2 of its tokens times.

    Without stop strings there is no decoding.
    """
    decoded: list[int] = []
    decode = Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, **keys: decoded.append(len(ids)) or decode(self, ids, **keys)
    )
    words = llama3.encode("the answer is four ") * 600
    end = llama3.encode("STOP now")
    for stops, tokens, most in (([], words, 0), (["STOP"], words, 1), (["STOP"], [*words, *end, *words], 16)):
        decoded.clear()
        Stops(llama3, stops).end(tokens)
        assert len(decoded) <= most
