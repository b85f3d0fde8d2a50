"""All uses of private names of megatron-core, which are replaced or read here. Checked with versions 0.16 and 0.19.

Importing this module runs install(), so it must be imported before a model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import rlhf.parallel.mesh  # noqa: F401  (must be first: megatron-core can then be imported without CUDA)

# isort: split
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import mlp

from rlhf.errors import UserError
from rlhf.model import operations
from rlhf.patches import REMEDY, define, replace, require


def install() -> None:
    """Replace operations of megatron-core. Raises UserError if the installed version does not have one of them."""
    # Its linear layers use an extension of Apex to add weight gradients in float32. This one uses torch.
    define(layers, "fused_weight_gradient_mlp_cuda", SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate))
    replace(layers, "_grad_accum_fusion_available", True)
    # The original is compiled again for every new number of tokens.
    replace(mlp, "bias_swiglu_impl", lambda x, bias, *_: operations.swiglu(x))
    # Without Transformer Engine or Apex, the original copies the norm of each tensor to the host. This one copies once.
    replace(clip_grads, "l2_norm_impl", _norm)


def _accumulate(inputs: Tensor, gradients: Tensor, total: Tensor) -> None:
    operations.accumulate(total, gradients, inputs)


def _norm(_: Any, __: Any, lists: list[list[Tensor]], ___: Any) -> tuple[Tensor, None]:
    return torch.nn.utils.get_total_norm(lists[0], foreach=True), None


def become(module: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    """Change the class of a module that megatron-core has built to `kind`, a direct subclass that only adds methods.

    Raises UserError if the module has another class.
    """
    if type(module) is not kind.__base__:
        found = type(module).__name__
        raise UserError(f"megatron-core builds a {found}, which cannot become a {kind.__name__}: {REMEDY}")
    module.__class__ = kind


def gradient_buffers(model: DistributedDataParallel) -> list[Tensor]:
    """Return the buffers that contain all gradients."""
    for buffer in model.buffers:
        require(buffer, "grad_data")
    return [buffer.grad_data for buffer in model.buffers]


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Return the torch optimizers that it consists of; an empty list on a rank without parameters to update."""
    return [part.optimizer for part in _parts(optimizer)]


def main_parameters(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield (parameter, start, main): this rank updates the elements of the parameter from `start` on, in main."""
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            require(part, "model_float16_groups", "model_fp32_groups", "_get_model_param_range_map")
            for parameter, main in (
                *_pairs(part.model_float16_groups, part.shard_fp32_from_float16_groups),
                *_pairs(part.model_fp32_groups, part.shard_fp32_groups),
            ):
                yield parameter, part._get_model_param_range_map(parameter)["param"].start, main
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            require(part, "float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups")
            for parameter, main in (
                *_pairs(part.float16_groups, part.fp32_from_float16_groups),
                *_pairs(part.fp32_from_fp32_groups, part.fp32_from_fp32_groups),
            ):
                yield parameter, 0, main
        else:
            yield from ((p, 0, p) for group in part.optimizer.param_groups for p in group["params"])


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers that it consists of, without those of a rank without parameters to update."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if part.optimizer is not None]


def _pairs(parameters: list[list[Tensor]], mains: list[list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(chain(*parameters), chain(*mains), strict=True)


def replace_step(inner: torch.optim.Optimizer, step: Callable[..., Any], *arguments: Any) -> None:
    """Make megatron-core's optimizer call step(inner, *arguments) to update parameters."""
    replace(inner, "step", partial(step, inner, *arguments))


install()
