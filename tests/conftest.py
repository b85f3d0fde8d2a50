from pathlib import Path

import pytest
from vocabularies import write_byte_level, write_sentencepiece

from rlhf.data.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
GPU_TESTS = Path(__file__).parent / "gpu"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets (GSM8K and others) that may lie beside a checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no public data sets in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="session")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Has a bos, and an eos that ends no turn of ChatML."""
    return Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("llama3"), bos="<|begin|>", eos="<|endoftext|>"))


@pytest.fixture(scope="session")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_sentencepiece(tmp_path_factory.mktemp("llama2")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/gpu is marked gpu, and skipped where there is none; what measures a device's memory comes before what uses it."""
    on_gpu = [item for item in items if GPU_TESTS in item.path.parents]
    if not on_gpu:
        return
    items.sort(key=lambda item: item.path.name != "test_memory.py")
    import torch  # only here, so that tests without torch start at once

    for item in on_gpu:
        item.add_marker("gpu")
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
