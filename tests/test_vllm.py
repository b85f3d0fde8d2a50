"""vLLM against transformers, with weights that are written in place."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from test_engines import (
    MAX_LEN,
    build,
    check_greedy,
    check_limits,
    check_many,
    check_mixed,
    check_sampled,
    check_stream,
    check_withdraw,
    folder,
    publish,
)

from rlhf.contracts import Engine
from rlhf.errors import UserError
from rlhf.model import architecture
from rlhf.weights import names
from rlhf.weights.publish import mismatch
from rlhf.weights.tiles import Tile


def check_parameters(engine: Engine, tiling: list[Tile]) -> None:
    """Check that the tiles cover exactly the engine's parameters.

    A parameter that is fused differently is reported.
    """
    held = dict(engine.parameters())
    assert mismatch(held, tiling, torch.float32) == ""
    assert mismatch(held, tiling, torch.bfloat16).endswith("torch.bfloat16 is written")
    held["model.layers.1.mlp.gate_proj.weight"] = held.pop("model.layers.1.mlp.gate_up_proj.weight")
    assert mismatch(held, tiling, torch.float32) == "it has no model.layers.1.mlp.gate_up_proj.weight"


@pytest.fixture(scope="module")
def vllm_engine():
    """Return a function that makes vLLM engines of one rank in this process's world.

    They live until the end, because the first one to end would destroy the world.
    """
    vllm = pytest.importorskip("rlhf.rollout.vllm", exc_type=ImportError)
    os.environ.update(RANK="0", LOCAL_RANK="0")
    engines = []

    def make(folder: str, load: bool):
        sizes = {"max_len": MAX_LEN, "memory": 0.1, "cache": 1 / 64}
        arch = architecture.read(folder)
        windowless = 0 if arch.window else arch.layers
        engines.append(vllm.VLLM(folder, tp=1, dtype="float32", seed=0, **sizes, windowless=windowless, load=load))
        check_parameters(engines[-1], names.tiles(arch, "vllm", pad=True))
        return engines[-1]

    with tempfile.TemporaryDirectory() as path:
        if dist.is_initialized():  # an engine of another test file made one
            dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.FileStore(f"{path}/store", 1), rank=0, world_size=1)
        yield make
    for name in ("RANK", "LOCAL_RANK"):  # so that commands of later tests do not count as ranks
        del os.environ[name]


def test_vllm_loads_a_folder_and_follows_new_weights(vllm_engine, tmp_path):
    old, new = build("qwen2-yarn", 0), build("qwen2-yarn", 1)
    engine = vllm_engine(folder(old, tmp_path), load=True)
    check_greedy(old, engine, 2e-5)
    check_limits(engine)
    check_stream(engine)
    check_mixed(engine)
    engine.sleep()
    engine.wake_weights()
    publish(new, architecture.read(tmp_path), engine)
    check_greedy(new, engine, 2e-5)
    before = torch.random.get_rng_state()
    check_sampled(new, engine, 2e-5)
    check_many(engine)
    check_withdraw(engine, old, new, architecture.read(tmp_path), 2e-5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_vllm_with_tied_embeddings_and_no_weights_in_the_folder(vllm_engine, tmp_path):
    old, new = build("mistral-tied-llama3", 0), build("mistral-tied-llama3", 1)
    old.config.architectures = ["MistralForCausalLM"]
    old.config.save_pretrained(tmp_path)
    engine = vllm_engine(str(tmp_path), load=False)
    for model in (old, new):
        publish(model, architecture.read(tmp_path), engine)
        check_greedy(model, engine, 2e-5)
    check_sampled(new, engine, 2e-5)


def test_ranks_of_an_engine_leave_nothing_in_shared_memory(vllm_engine):
    """Segments that vLLM's CPU backend leaves there would end the machine's next run of several ranks.

    The engine is told that ranks cannot share memory.
    """
    from rlhf.rollout.vllm_private import CpuCommunicator

    assert CpuCommunicator._all_group_ranks_share_shm_group_name(None) is False


def test_a_vllm_without_a_private_name_is_refused(vllm_engine, monkeypatch):
    from rlhf.rollout import vllm_private

    monkeypatch.delattr(vllm_private.vllm_layers, "dispatch_cpu_unquantized_gemm")
    with pytest.raises(
        UserError, match=r"^vllm\S* \S+: vllm\.model_executor\.layers\.utils has no dispatch_cpu_unquantized_gemm"
    ):
        vllm_private.adapt_to_cpu()
