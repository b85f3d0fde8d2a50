import os
import sys
from pathlib import Path

import pytest
from vocabularies import write_byte_level, write_sentencepiece

from rlhf.__main__ import main
from rlhf.data.tokenizer import Tokenizer
from rlhf.variables import VARIABLES

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import demo_task

# A rank imports torch and megatron-core in 5 s of processor time, and in 16 s if there is no cached bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

SHARED = Path(__file__).parents[2] / "shared" / "data"
GPU_TESTS = Path(__file__).parent / "gpu"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of public data sets (GSM8K and others) beside the checkout. Skip the test if there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"no public data sets in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="session")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer that has a bos token, and an eos token that does not end a turn of ChatML."""
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("llama3"), bos="<|begin|>", eos="<|endoftext|>"))


@pytest.fixture(scope="session")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_sentencepiece(tmp_path_factory.mktemp("llama2")))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    demo_task.write(root / "data", num_sft=300, num_rl=20, num_heldout=20)
    demo_task.make_model(root / "model", root / "data")
    return root


@pytest.fixture
def fail(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Return fail(mode, *overrides), which runs the command line with good inputs, changed by the overrides.

    It returns the one line on stderr.
    """
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "GPUS_PER_NODE", "SLURM_JOB_ID", "SLURM_STEP_ID", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("rlhf.launcher.run", lambda *_: pytest.fail("ranks were started in spite of the mistake"))

    def run(mode: str, *overrides: str) -> str:
        data = {"sft": "train_sft", "grpo": "train_rl", "rlhf": "train_rl", "evaluate": "train_rl"}[mode]
        good = [
            f"policy.load={made}/model",
            "policy.init=random",
            f"data.train={made}/data/{data}.jsonl",
            "data.max_tokens=128",
        ]
        assert main([mode, *good, "rollout.max_tokens=32", *overrides]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests in tests/gpu as gpu, and skip them if there is no GPU.

    Tests that measure the memory of a device run before other tests use it.
    """
    on_gpu = [item for item in items if GPU_TESTS in item.path.parents]
    if not on_gpu:
        return
    items.sort(key=lambda item: item.path.name != "test_memory.py")
    import torch  # only here: importing torch takes seconds, and tests without torch do not need it

    for item in on_gpu:
        item.add_marker("gpu")
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
