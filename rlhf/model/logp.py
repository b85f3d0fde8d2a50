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

CHUNK_ELEMENTS = 2**25  # logits of one chunk on one rank: 128 MiB in float32


def token_logp(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab: int, temperature: float, group: dist.ProcessGroup, sequence_parallel: bool
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[labels] and the entropy of that distribution, both [T] float32.

    hidden [T (/tp with sequence_parallel), h] after the final norm; weight [padded vocab / tp, h], this rank's rows; labels [T]; columns
    from `vocab` on are padding and have probability 0. Gradients flow to hidden and weight from the log-probs only. temperature 0 (greedy)
    gives the log-probs of the untempered distribution.
    """
    if sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
    return _VocabParallelLogp.apply(hidden, weight, labels, vocab, 1.0 / (temperature or 1.0), group)


class _VocabParallelLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, scale: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        first = group.rank() * len(weight)
        real = max(0, min(len(weight), vocab - first))
        logp, entropy, lse = (torch.empty(len(labels), dtype=torch.float32, device=hidden.device) for _ in range(3))
        for part in _parts(len(labels), len(weight)):
            logits = _logits(hidden[part], weight, real, scale)
            top = logits.amax(-1) if real else logits.new_full((len(logits),), float("-inf"))
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            mine, column = _owned(labels[part], first, len(weight))
            label = torch.where(mine, logits.gather(1, column[:, None])[:, 0] - top, 0.0)
            shifted = logits.sub_(top[:, None])
            expected = shifted.exp()
            total = expected.sum(-1)
            expected.mul_(shifted.clamp_(min=-1e30))  # e^x x, without 0 times -inf in the padding
            sums = torch.stack((total, label, expected.sum(-1)))
            dist.all_reduce(sums, group=group)
            lse[part] = top + sums[0].log()
            logp[part] = sums[1] - sums[0].log()
            entropy[part] = sums[0].log() - sums[2] / sums[0]
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.first, ctx.real, ctx.scale = first, real, scale
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if ctx.needs_input_grad[1] else None
        for part in _parts(len(labels), len(weight)):
            # d logp / d logits = onehot(label) - softmax
            slope = _logits(hidden[part], weight, ctx.real, ctx.scale).sub_(lse[part][:, None]).exp_().neg_()
            mine, column = _owned(labels[part], ctx.first, len(weight))
            slope.scatter_add_(1, column[:, None], mine.float()[:, None])
            slope = slope.mul_((grad[part] * ctx.scale)[:, None]).to(hidden.dtype)
            grad_hidden[part] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _parts(tokens: int, rows: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // rows)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, real: int, scale: float) -> Tensor:
    logits = F.linear(hidden, weight).float().mul_(scale)
    logits[:, real:] = float("-inf")
    return logits


def _owned(labels: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Whether this rank holds each label's row, and which row (0 where it does not)."""
    column = labels - first
    mine = (column >= 0) & (column < rows)
    return mine, column * mine
