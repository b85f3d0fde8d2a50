"""Weights that are copied from a device."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from test_tiles import LLAMA, mcore_rank, random_hf

from rlhf.weights import export
from rlhf.weights.names import tilings


def test_an_export_waits_for_the_stream_that_trained(tmp_path: Path) -> None:
    """This is not the default stream: vLLM sets a stream of its own as the process's current one."""
    hf = random_hf(LLAMA)
    trained = {name: tensor.cuda() for name, tensor in mcore_rank(LLAMA, hf, (0, 1), (0, 1)).items()}
    parameters = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(1 << 31)  # about a second
        for name, tensor in trained.items():
            parameters[name].copy_(tensor)
        sources = tilings(LLAMA, "megatron", 1, 1)
        export.write(
            tmp_path / "hf", LLAMA, {}, sources, parameters, rank=0, nodes=[0], dtype=torch.float32, bucket=1 << 16
        )
    written = load_file(tmp_path / "hf/model.safetensors")
    assert all(torch.equal(written[name], hf[name]) for name in hf)
