"""Causal attention over packed rows, with rotary embeddings and context parallelism, in plain torch.

megatron-core's own core attention needs Transformer Engine for packed rows. This one gets the spans of a row from
`packed_seq_params`, which megatron-core passes to every layer. It rotates queries and keys itself, so the model is
built without position embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import rlhf.parallel.mesh  # noqa: F401  (must be first: megatron-core can then be imported without CUDA)

# isort: split
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams

from rlhf.contracts import ABSENT, Batch, Spans
from rlhf.model.operations import rotate
from rlhf.model.rope import Rope


@dataclass
class PackedRow(PackedSeqParams):
    """The spans and rotary tables of a row, computed once per micro-batch and shared by all layers."""

    spans: Spans = ABSENT
    cos: Tensor = ABSENT  # [T, 1, head_dim / 2]
    sin: Tensor = ABSENT  # [T, 1, head_dim / 2]
    # [row] int64: for each position of the row, the index of its key among the gathered keys; None without CP
    order: Tensor | None = None
    plan: Any = None  # values that _flash or _padded compute from the spans, kept for the next layers

    @property
    def even(self) -> bool:
        """Return whether the row consists of several spans of the same length.

        False for a single span, because cuDNN needs much time for each new shape.
        """
        lengths = self.spans.q_lengths
        return self.order is None and len(lengths) > 1 and len(set(lengths)) == 1

    @classmethod
    def of(cls, batch: Batch, rope: Rope, dtype: torch.dtype, cp: int) -> PackedRow:
        """Return the row of a micro-batch. cp: number of context-parallel ranks."""
        cos, sin = rope.tables(batch.positions, dtype)
        order = _gathered_order(len(batch.places) * cp, cp, batch.places.device) if cp > 1 else None
        return cls(qkv_format="thd", spans=batch.spans, cos=cos, sin=sin, order=order)


def _gathered_order(total: int, cp: int, device: torch.device) -> Tensor:
    """Return [total] int64: for each position of the row, its index in the concatenated slices of all CP ranks.

    The row has 2 cp chunks. Rank r has chunks r and 2 cp - 1 - r.
    """
    chunks = torch.arange(total, device=device).view(cp, 2, -1)
    return torch.cat([chunks[r, 0] for r in range(cp)] + [chunks[r, 1] for r in reversed(range(cp))])


class Attention(torch.nn.Module):
    """The core_attention of megatron-core's SelfAttention.

    q [T, heads, d], k and v [T, kv heads, d] -> [T, heads * d].
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        pg_collection: Any = None,
        **_: Any,
    ):
        super().__init__()
        self.cp_group = pg_collection.cp
        # Number of keys that a query attends to, including the key at its own position; 0: no limit.
        self.window = config.window_size[0] + 1 if config.window_size else 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, *, packed_seq_params: PackedRow, **_: Any
    ) -> Tensor:
        row = packed_seq_params
        q, k = rotate(q, row.cos, row.sin), rotate(k, row.cos, row.sin)
        if row.order is not None:  # all-gather in forward, reduce-scatter in backward
            k, v = (
                tensor_parallel.gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)[row.order]
                for x in (k, v)
            )
        window = self.window if self.window < max(row.spans.k_lengths) else 0  # a longer window has no effect
        if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
            return _padded(q, k, v, row, window).flatten(1)
        if row.even and not window:  # _even supports no window
            return _even(q, k, v, row).flatten(1)
        return _flash(q, k, v, row, window).flatten(1)


def _even(q: Tensor, k: Tensor, v: Tensor, row: PackedRow) -> Tensor:
    """Return attention over spans of the same length, computed as a batch.

    cuDNN's kernel takes a batch instead of spans. On an H200 it is 1.7 times as fast as flash attention.
    """
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    q, k, v = (x.view(len(row.spans.q_lengths), -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(order, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _flash(q: Tensor, k: Tensor, v: Tensor, row: PackedRow, window: int = 0) -> Tensor:
    """Return variable-length flash attention over all spans."""
    from torch.nn.attention.varlen import varlen_attn

    spans = row.spans
    if row.plan is None:
        cu_q, cu_k = (
            F.pad(torch.tensor(x, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
            for x in (spans.q_lengths, spans.k_lengths)
        )
        keys = None  # with CP, spans of one sequence share keys, but flash attention needs the keys span after span
        if row.order is not None:
            keys = torch.cat([torch.arange(s, s + n) for s, n in zip(spans.k_starts, spans.k_lengths, strict=True)]).to(
                q.device
            )
        # From pinned memory the copies are asynchronous: the host does not wait for the device.
        cu_q, cu_k = (x.pin_memory().to(q.device, non_blocking=True) for x in (cu_q, cu_k))
        row.plan = cu_q, cu_k, max(spans.q_lengths), max(spans.k_lengths), keys
    cu_q, cu_k, max_q, max_k, keys = row.plan
    native = "enable_gqa" not in signature(varlen_attn).parameters  # torch 2.11 supports grouped queries by default
    gqa: dict[str, Any] = {} if native else {"enable_gqa": True}
    if keys is not None:
        k, v = k[keys], v[keys]
    # window_size counts the keys before the query's own position; -1: no limit.
    out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(window - 1, 0), **gqa)
    assert isinstance(out, Tensor)  # it returns a tuple only if more outputs are requested
    return out


def _padded(q: Tensor, k: Tensor, v: Tensor, row: PackedRow, window: int = 0) -> Tensor:
    """Return the same as _flash, with scaled_dot_product_attention: spans of similar length are padded into a batch.

    Each query has the same index in its padded span as its own key, so one square mask fits every span.
    """
    if row.plan is None:
        row.plan = [tuple(x.to(q.device) for x in part) for part in _by_length(row.spans)]
    outputs, sources = [], []
    for rows_q, cells_q, rows_k, cells_k, shape in row.plan:
        count, width = shape.tolist()

        def spread(x: Tensor, rows: Tensor, cells: Tensor, count: int = count, width: int = width) -> Tensor:
            padded = x.new_zeros(count * width, *x.shape[1:]).index_copy(0, cells, x[rows])
            return padded.view(count, width, *x.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            spread(q, rows_q, cells_q),
            spread(k, rows_k, cells_k),
            spread(v, rows_k, cells_k),
            attn_mask=_band(width, window, q.device) if window else None,
            is_causal=not window,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1)[cells_q])
        sources.append(rows_q)
    return torch.empty_like(q).index_copy(0, torch.cat(sources), torch.cat(outputs))


def _band(width: int, window: int, device: torch.device) -> Tensor:
    """Return the mask [width, width]: True where a query (row) attends to a key (column).

    These are the last `window` keys up to the query's own position.
    """
    return torch.ones(width, width, dtype=torch.bool, device=device).tril_().triu_(1 - window)


def _by_length(spans: Spans) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return batches of spans whose key lengths have the same next power of two.

    A batch is (rows of q, their cells, rows of k, their cells, [count, width]). `count` is the number of spans and
    `width` the longest key length. A cell is an index into the flattened batch [count * width].
    """
    classes: dict[int, list[int]] = {}
    for i, n in enumerate(spans.k_lengths):
        classes.setdefault((n - 1).bit_length(), []).append(i)
    parts = []
    for members in classes.values():
        width = max(spans.k_lengths[i] for i in members)
        columns: tuple[list[Tensor], ...] = ([], [], [], [])
        for slot, i in enumerate(members):
            nq, nk = spans.q_lengths[i], spans.k_lengths[i]
            columns[0].append(torch.arange(spans.q_starts[i], spans.q_starts[i] + nq))
            columns[1].append(torch.arange(slot * width + nk - nq, slot * width + nk))
            columns[2].append(torch.arange(spans.k_starts[i], spans.k_starts[i] + nk))
            columns[3].append(torch.arange(slot * width, slot * width + nk))
        a, b, c, d = (torch.cat(column) for column in columns)
        parts.append((a, b, c, d, torch.tensor([len(members), width])))
    return parts
