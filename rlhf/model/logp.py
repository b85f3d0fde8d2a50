"""Computes log-probs and entropies from hidden states. Tensor-parallel ranks split the vocabulary.

The tokens are split into chunks. Forward and backward compute the logits of one chunk at a time, so the memory of the
logits does not grow with the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import rlhf.parallel.mesh  # noqa: F401  (must be first: megatron-core can then be imported without CUDA)

# isort: split
from megatron.core import tensor_parallel

from rlhf.model.operations import accumulate, fused, logp_slope, softmax_sums

CHUNK_ELEMENTS = 2**25  # number of logits of one chunk on one rank: 128 MiB in float32


def token_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab: int,
    temperature: float,
    group: dist.ProcessGroup,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of labels under softmax(hidden @ weight.T / temperature), and entropies, both [T] float32.

    hidden [T (/tp with sequence_parallel), h] is the output of the final norm. weight [padded vocab / tp, h] has this
    rank's rows of the output layer. labels is [T]. Columns from `vocab` on are padding and have probability 0. Only
    the log-probs have gradients, for hidden and weight. temperature=0 (greedy) is computed as temperature=1.
    """
    if sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=group
        )
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
    return _VocabParallelLogp.apply(hidden, weight, labels, vocab, 1.0 / (temperature or 1.0), group)


class _VocabParallelLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, scale: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        real = max(0, min(len(weight), vocab - group.rank() * len(weight)))
        columns = labels - group.rank() * len(weight)
        parts = _parts(len(labels), weight)
        found = [softmax_sums(F.linear(hidden[part], weight), columns[part], real, scale) for part in parts]
        own, total, weighted, label = (torch.cat(x) for x in zip(*found, strict=True))
        top = own.clone()
        if group.size() > 1:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            lower = torch.where(total > 0, own - top, 0.0)  # the sums are relative to this rank's own maximum
            weighted, total = (weighted + lower * total) * lower.exp(), total * lower.exp()
            sums = torch.stack((total, weighted, label))  # label is 0 on all ranks except the one with the label's row
            dist.all_reduce(sums, group=group)
            total, weighted, label = sums
        log_total = total.log()
        ctx.save_for_backward(hidden, weight, columns, top + log_total)
        ctx.real, ctx.scale = real, scale
        entropy = log_total - weighted / total
        ctx.mark_non_differentiable(entropy)
        return label - top - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, lse = ctx.saved_tensors
        grad_hidden, learns = torch.empty_like(hidden), ctx.needs_input_grad[1]
        # With megatron-core's fused accumulation, a weight has a buffer main_grad to which its gradient is added.
        direct = learns and fused(weight) and hasattr(weight, "main_grad")
        total: Tensor | None = None
        if learns:
            total = weight.main_grad if direct else torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for part in _parts(len(columns), weight):
            logits = F.linear(hidden[part], weight)
            slope = logp_slope(logits, columns[part], lse[part], grad[part].contiguous(), ctx.real, ctx.scale)
            grad_hidden[part] = slope @ weight
            if total is not None:
                accumulate(total, slope, hidden[part])
        if direct:
            weight.grad_added_to_main_grad = True  # megatron-core's own linear layers set this too
            # A tied weight also gets the embedding's gradient, which autograd adds to the result. So that must be 0.
            shared = getattr(weight, "zero_out_wgrad", False)
            total = (torch.zeros_like if shared else torch.empty_like)(weight)
        return grad_hidden, None if total is None else total.to(weight.dtype), None, None, None, None


def _parts(tokens: int, weight: Tensor) -> list[slice]:
    # The kernels work in place and in the weight's dtype. In the memory that plain torch needs for its float32 copies,
    # they can compute four times as many tokens.
    size = max(1, CHUNK_ELEMENTS * (4 if fused(weight) else 1) // len(weight))
    return [slice(start, start + size) for start in range(0, tokens, size)]
