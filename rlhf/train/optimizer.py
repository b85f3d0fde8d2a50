"""AdamW on megatron-core's buffers: the update, the learning-rate schedule and the state."""

from __future__ import annotations

import math
from typing import Any

import torch

import rlhf.parallel.mesh  # noqa: F401  (must be first: megatron-core can then be imported without CUDA)

# isort: split
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from rlhf.config import Optim
from rlhf.model import megatron_private, operations

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        return float(norm)

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def state(self) -> dict[str, Any]:
        """Return moments, step counts and main parameters of this rank's shard. The tensors are not copies."""
        return {
            "adam": [inner.state_dict() for inner in self.inner],
            "main": [[p.detach() for group in inner.param_groups for p in group["params"]] for inner in self.inner],
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Load a state() that the same rank of the same layout has saved. Keep betas and eps of the configuration."""
        for inner, adam, main in zip(self.inner, state["adam"], state["main"], strict=True):
            configured = [{name: group[name] for name in ("betas", "eps")} for group in inner.param_groups]
            inner.load_state_dict(adam)
            for group, own in zip(inner.param_groups, configured, strict=True):
                group.update(own)
            # Copies are needed, because the loaded tensors may be mapped files, whose memory cannot be freed and
            # allocated again.
            for moments in inner.state.values():
                moments.update({name: moments[name].clone() for name in MOMENTS if name in moments})
                moments["step"] = moments["step"].cpu().clone()
            for p, saved in zip((p for group in inner.param_groups for p in group["params"]), main, strict=True):
                p.copy_(saved)

    def tensors(self) -> list[torch.Tensor]:
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
                state.update({"step": torch.zeros(()), **{name: torch.zeros_like(p) for name in MOMENTS}})
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
