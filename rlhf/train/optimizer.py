"""AdamW on megatron-core's buffers: the update, the learning-rate schedule and the state."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import rlhf.parallel.mesh  # noqa: F401  (must be first: megatron-core can then be imported without CUDA)

# isort: split
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from rlhf.config import Optim
from rlhf.model import megatron_private, operations
from rlhf.weights.shards import MAIN, MOMENTS


def learning_rate(optim: Optim, update: int, updates: int) -> float:
    """Return the learning rate of one of `updates` updates, counted from 0.

    It rises linearly from 0 to lr during the warm-up, and then follows the schedule from lr to min_lr.
    """
    if update < optim.warmup:
        return optim.lr * (update + 1) / optim.warmup
    done = (update - optim.warmup) / max(1, updates - optim.warmup)
    share = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[optim.schedule]
    return optim.min_lr + (optim.lr - optim.min_lr) * share


class Optimizer:
    """megatron-core's (distributed) optimizer with float32 main parameters, which adamw() updates."""

    def __init__(self, optim: Optim, model: DistributedDataParallel, dtype: torch.dtype, zero: bool):
        self.weight_decay, self.clip = optim.weight_decay, optim.clip
        self.megatron = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                adam_beta1=optim.beta1,
                adam_beta2=optim.beta2,
                adam_eps=optim.eps,
                weight_decay=optim.weight_decay,
                clip_grad=0.0,  # step() clips the gradients instead
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=zero,
            ),
            [model],
        )
        self.inner = megatron_private.torch_optimizers(self.megatron)
        self.updates = 0  # made so far

    def step(self, lr: float) -> float:
        """Make one update with the reduced gradients. Return their global norm before clipping.

        Raises FloatingPointError if the norm is not finite.
        """
        self.megatron.prepare_grads()
        norm = self.megatron.get_grad_norm()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}")
        shrink = self.clip / (norm + 1e-6) if self.clip else 1.0
        for inner in self.inner:
            for group in inner.param_groups:
                group["lr"] = lr
                # Megatron sets wd_mult to 0 for norms and biases. Its own scheduler, which is not used here, would
                # apply it.
                group["weight_decay"] = self.weight_decay * group["wd_mult"]
            megatron_private.replace_step(inner, adamw, min(1.0, shrink))
        self.megatron.step_with_ready_grads()
        self.updates += 1
        return float(norm)

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def shards(self) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
        """Yield (parameter, start, tensors): the state of the parameter's elements from `start` on.

        tensors: MAIN [n] and, after the first update, MOMENTS [n]. They are not copies.
        """
        states = {p: state for inner in self.inner for p, state in inner.state.items()}
        for p, start, main in megatron_private.main_parameters(self.megatron):
            held = {MAIN: main.detach(), **{name: states[main][name] for name in MOMENTS if self.updates}}
            yield p, start, {name: tensor.view(-1) for name, tensor in held.items()}

    def restart(self, updates: int) -> None:
        """Set the number of updates, and reset the moments to 0."""
        self.updates = updates
        for inner in self.inner:
            inner.state.clear()
            for p in (p for group in inner.param_groups for p in group["params"] if updates):
                inner.state[p] = _fresh(p, updates)

    def tensors(self) -> list[Tensor]:
        """Return main parameters and moments of this rank's shard. There are no moments before the first update."""
        main = [p.data for inner in self.inner for group in inner.param_groups for p in group["params"]]
        return main + [
            state[name] for inner in self.inner for state in inner.state.values() for name in MOMENTS if name in state
        ]


@torch.no_grad()
def adamw(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Make a step of torch.optim.AdamW, with the same state, from gradients * scale.

    The scale clips the gradients without another pass over them.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = optimizer.state[p]
            if not state:
                state.update(_fresh(p, 0))
            state["step"] += 1
            moments = [state[name] for name in MOMENTS]
            operations.adamw(
                p,
                p.grad,
                moments,
                int(state["step"]),
                group["lr"],
                group["betas"],
                group["eps"],
                group["weight_decay"],
                scale,
            )


def _fresh(p: Tensor, updates: int) -> dict[str, Tensor]:
    """Return the state of torch.optim.AdamW for a parameter, with moments of 0."""
    return {"step": torch.tensor(float(updates)), **{name: torch.zeros_like(p) for name in MOMENTS}}
