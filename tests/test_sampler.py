"""The sampler over real engines: seeds, groups, stops, rewards, and samples that do not depend on the number of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task
from vocabularies import write_byte_level

from rlhf import configuration
from rlhf.contracts import Completion
from rlhf.data.tokenizer import Tokenizer
from rlhf.rollout.source import EngineSource

ROOT = Path(__file__).parents[1]


def launch(folder: Path, ranks: int) -> str:
    """What was drawn."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "tests/ranks/sampling.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("drawn"))
    return line


def test_sampler_on_one_and_two_ranks(tmp_path: Path) -> None:
    """See tests/ranks/sampling.py; one engine and two draw the same."""
    demo_task.write(tmp_path, num_sft=300, num_rl=20, num_heldout=20)
    demo_task.make_model(tmp_path / "model", tmp_path)
    assert launch(tmp_path, 1) == launch(tmp_path, 2)


def test_a_special_token_may_be_a_stop_string(tmp_path: Path) -> None:
    """<|im_end|> of a tokenizer whose eos is another: alone it stops the engine, as a part of a longer string it is seen in the tokens."""
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, eos="<|endoftext|>"))
    config = configuration.load("grpo", ['rollout.stop=["<|im_end|>", "<|im_end|>\\n", "e l"]'])
    sampler = EngineSource(config, None, None, tokenizer, None, None)
    (end,) = tokenizer.encode("<|im_end|>", control=True)
    assert sampler.sampling().stop_ids == (tokenizer.eos, end)
    for said, kept in (("hello<|im_end|>\nhello", "hello<|im_end|>"), ("the letter", "the l"), ("hello", "hello")):
        tokens = tokenizer.encode(said, control=True)
        cut = sampler._cut(Completion(tokens, [-1.0] * len(tokens), "length"))
        assert tokenizer.decode(cut.tokens, skip_special=False).startswith(kept)
        assert len(cut.logp) == len(cut.tokens)
        assert cut.finish == ("length" if said == kept else "stop")
