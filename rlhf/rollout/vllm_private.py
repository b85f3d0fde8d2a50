"""The private names of vLLM that are replaced or read, all in this file. Checked with vLLM 0.25 (GPU) and 0.32 (CPU).

Only rlhf/rollout/vllm.py imports it, which sets vLLM's environment first.
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
    """Make vLLM's CPU backend behave as the GPU's does. Raises UserError if a name is not where it was."""
    # vLLM would pack each weight into a private copy and leave an empty parameter, which no publish could reach.
    replace(vllm_layers, "dispatch_cpu_unquantized_gemm", _plain_linear)
    # Its shared-memory all-reduce takes the same name in every run and leaves the memory behind, so the next run on the
    # machine would fail. Where ranks outnumber cores it also spins ten times longer than gloo takes.
    replace(CpuCommunicator, "_all_group_ranks_share_shm_group_name", lambda self: False)


def _plain_linear(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def drop_broadcaster() -> None:
    """Release the shared memory of a scheduler that serves all ranks, which would be reported as a leak in the end.

    Here every rank has a scheduler of its own.
    """
    replace(get_tp_group(), "mq_broadcaster", None)


def parameters(llm: LLM) -> dict[str, torch.Tensor]:
    """This rank's live parameters by vLLM's names; a tied lm_head is not listed."""
    return llm.apply_model(lambda model: dict(model.named_parameters()))[0]


def check(llm: LLM) -> None:
    """Raise UserError unless drawn() will find what it reads, apart from the state of a request."""
    require(llm.llm_engine, "output_processor")
    require(llm.llm_engine.output_processor, "external_req_ids", "request_states")


def drawn(llm: LLM, request: str) -> tuple[list[int], list[float]]:
    """The tokens that a request has drawn so far and their log-probs; vLLM returns nothing of an aborted request."""
    processor = llm.llm_engine.output_processor
    (name,) = processor.external_req_ids[request]
    state = processor.request_states[name]
    return list(state.detokenizer.output_token_ids), list(state.logprobs_processor.logprobs.logprobs)
