from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"
GPU_TESTS = Path(__file__).parent / "gpu"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets (GSM8K and others) that may lie beside a checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no public data sets in {SHARED}")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/gpu is marked gpu, and skipped where there is none."""
    on_gpu = [item for item in items if GPU_TESTS in item.path.parents]
    if not on_gpu:
        return
    import torch  # only here, so that tests without torch start at once

    for item in on_gpu:
        item.add_marker("gpu")
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
