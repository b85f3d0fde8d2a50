"""All uses of private names of vLLM, which are replaced or read here. Checked with vLLM 0.25 (GPU) and 0.32 (CPU).

Only rlhf/rollout/vllm.py imports this file, after it has set vLLM's environment variables.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.utils as vllm_layers
from vllm import LLM
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.parallel_state import get_tp_group

from rlhf.patches import replace, require


def adapt_to_cpu() -> None:
    """Make vLLM's CPU backend work like the GPU's. Raises UserError if the installed version does not have a name."""
    # The original moves each weight into a packed private copy and leaves an empty parameter. A publish could not
    # write to the copy.
    replace(vllm_layers, "dispatch_cpu_unquantized_gemm", _plain_linear)
    # The shared-memory all-reduce uses the same name in every run and does not free the memory, so the next run on the
    # machine would fail. With more ranks than cores, it also takes ten times longer than gloo.
    replace(CpuCommunicator, "_all_group_ranks_share_shm_group_name", lambda self: False)


def _plain_linear(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def drop_broadcaster() -> None:
    """Free the shared memory that a common scheduler of all ranks would use. Here every rank has its own scheduler.

    Otherwise Python would report this memory as a leak at the end.
    """
    replace(get_tp_group(), "mq_broadcaster", None)


def parameters(llm: LLM) -> dict[str, torch.Tensor]:
    """Return this rank's parameters by vLLM's names, without a tied lm_head. The tensors are not copies."""
    return llm.apply_model(lambda model: dict(model.named_parameters()))[0]


def check(llm: LLM) -> None:
    """Raise UserError unless vLLM has the names that drawn() reads. The names in a request's state are not checked."""
    require(llm.llm_engine, "output_processor")
    require(llm.llm_engine.output_processor, "external_req_ids", "request_states")


def drawn(llm: LLM, request: str) -> tuple[list[int], list[float]]:
    """Return the tokens of a request so far and their log-probs. vLLM returns nothing for an aborted request."""
    processor = llm.llm_engine.output_processor
    (name,) = processor.external_req_ids[request]
    state = processor.request_states[name]
    return list(state.detokenizer.output_token_ids), list(state.logprobs_processor.logprobs.logprobs)
