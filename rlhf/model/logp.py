"""Log-probs and entropies from hidden states, with the vocabulary split over tensor-parallel ranks and the tokens cut into chunks.

Logits exist for one chunk at a time, forward and backward, so their memory does not grow with the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import rlhf.parallel.mesh  # noqa: F401  (first: it lets megatron-core be imported where there is no CUDA)

# isort: split
from megatron.core import tensor_parallel

from rlhf.model.operations import accumulate, fused, logp_slope, softmax_sums

CHUNK_ELEMENTS = 2**25  # logits of one chunk on one rank: 128 MiB in float32


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
    """log softmax(hidden @ weight.T / temperature)[labels] and the entropy of that distribution, both [T] float32.

    hidden [T (/tp with sequence_parallel), h] after the final norm; weight [padded vocab / tp, h], this rank's rows; labels [T]; columns
    from `vocab` on are padding and have probability 0. Gradients flow to hidden and weight from the log-probs only. temperature 0 (greedy)
    gives the log-probs of the untempered distribution.
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
            lower = torch.where(total > 0, own - top, 0.0)  # sums were taken relative to this rank's own maximum
            weighted, total = (weighted + lower * total) * lower.exp(), total * lower.exp()
            sums = torch.stack((total, weighted, label))  # each label is on one rank
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
        # With megatron-core's fused accumulation a weight owns the buffer that its gradient is summed into.
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
            weight.grad_added_to_main_grad = True  # as megatron-core's own linear layers mark it
            shared = getattr(
                weight, "zero_out_wgrad", False
            )  # with the embedding, whose gradient is still added to ours
            total = (torch.zeros_like if shared else torch.empty_like)(weight)
        return grad_hidden, None if total is None else total.to(weight.dtype), None, None, None, None


def _parts(tokens: int, weight: Tensor) -> list[slice]:
    # The kernels work in place and in the weight's dtype: four times the tokens take the memory of plain torch's float32 copies.
    size = max(1, CHUNK_ELEMENTS * (4 if fused(weight) else 1) // len(weight))
    return [slice(start, start + size) for start in range(0, tokens, size)]
