"""Builds this rank's part of a megatron-core GPTModel from an Architecture, without Transformer Engine or Apex."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rlhf.config import Parallel
from rlhf.parallel.mesh import Mesh

# isort: split
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from rlhf.contracts import Batch
from rlhf.model import megatron_private, operations
from rlhf.model.architecture import Architecture
from rlhf.model.attention import Attention, PackedRow
from rlhf.model.linear import ColumnLinear, RowLinear
from rlhf.model.rope import Rope
from rlhf.parallel.exchange import pays

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm with this project's kernel. Every tensor-parallel rank has the whole weight.

    With sequence parallelism, megatron-core sums its gradient over these ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, **_: Any):
        super().__init__(hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)
        self.epsilon = config.layernorm_epsilon
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return operations.rms_norm(x, self.weight, self.epsilon)


class DeferredHead(ColumnParallelLinear):
    """An output layer that returns the hidden states unchanged.

    rlhf.model.logp multiplies them by its weight chunk by chunk, so logits of all tokens never exist at once.
    """

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return input_, None


class NoHead(torch.nn.Module):
    """The output layer of a model without logits. It returns the hidden states unchanged."""

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return input_, None


class ScalarHead(torch.nn.Module):
    """Computes one float32 value per token. Every tensor-parallel rank has the whole weight [1, hidden]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        # With sequence parallelism, a rank has only its part of the tokens. Then megatron-core sums the gradient over
        # the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the values [T] of hidden [T (/tp with sequence parallelism), h]."""
        values = F.linear(hidden.float(), self.weight.float())[:, 0]
        if not self.sequence_parallel:
            return values
        # The loss is the same on every rank of the group, so its gradient is split over the ranks and not summed.
        return tensor_parallel.gather_from_sequence_parallel_region(
            values, tensor_parallel_output_grad=False, group=group
        )


def transformer_config(arch: Architecture, parallel: Parallel, dtype: torch.dtype) -> TransformerConfig:
    """Return megatron-core's configuration of a dense decoder with this architecture."""
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.eps,
        gated_linear_unit=True,
        activation_func=getattr(F, arch.row.activation),
        add_bias_linear=False,
        add_qkv_bias=arch.row.qkv_bias,
        qk_layernorm=arch.row.qk_norm,
        window_size=arch.window_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sp and parallel.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths requires it, although there are no experts
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=operations.fusing,
        bias_activation_fusion=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=True,  # it marks the weights that TP splits; the gradient norm needs these marks
        **RECOMPUTE[parallel.recompute],
    )


def layer_spec(arch: Architecture, exchanges: bool) -> ModuleSpec:
    """Return the spec of one decoder layer. exchanges: use the linear layers of rlhf.model.linear."""
    norm = RMSNorm if arch.row.qk_norm else IdentityOp
    columns, rows = (ColumnLinear, RowLinear) if exchanges else (ColumnParallelLinear, RowParallelLinear)
    attention = SelfAttentionSubmodules(
        linear_qkv=columns, core_attention=Attention, linear_proj=rows, q_layernorm=norm, k_layernorm=norm
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=columns, linear_fc2=rows)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class Decoder(GPTModel):
    """This rank's pipeline stage of the model: a GPTModel from a packed Batch to hidden states."""

    def __init__(self, arch: Architecture, parallel: Parallel, mesh: Mesh, dtype: torch.dtype):
        layer = layer_spec(arch, parallel.exchanges and pays(mesh.tp_group))
        super().__init__(
            transformer_config(arch, parallel, dtype),
            TransformerBlockSubmodules(layer_specs=[layer] * (arch.layers // parallel.pp), layer_norm=RMSNorm),
            vocab_size=arch.padded_vocab(parallel.tp),
            max_sequence_length=arch.context,
            pre_process=mesh.is_first_stage,
            post_process=mesh.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied and arch.lm,
            position_embedding_type="none",  # Attention applies the rotary embeddings
        )
        if mesh.is_last_stage:
            if arch.lm:
                megatron_private.become(self.output_layer, DeferredHead)
            else:
                self.add_module("output_layer", NoHead())
            if arch.scalar:
                self.score = ScalarHead(self.config)
        self.to(mesh.device)
        self.rope = Rope.of(arch, mesh.device)
        self.cp = parallel.cp

    def forward(self, batch: Batch) -> Tensor:
        """Return hidden states [T, 1, hidden], or [1, T, hidden] on the last stage.

        With sequence parallelism, T / tp replaces T.
        """
        row = PackedRow.of(batch, self.rope, self.config.params_dtype, self.cp)
        return super().forward(batch.inputs[None], None, None, packed_seq_params=row)

    def head_weight(self) -> Tensor:
        """Return the weight of the output layer [padded vocab / tp, hidden]. Only the last stage has one.

        If the embedding is tied, it is the embedding's weight.
        """
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
