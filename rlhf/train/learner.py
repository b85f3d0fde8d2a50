"""One role's model on this rank: what it says about samples (score), and how it learns from them (learn)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.config import Config
from rlhf.contracts import Batch, Loss, Output, Sample, Sums
from rlhf.data.packing import pack, unpack
from rlhf.errors import UserError
from rlhf.model import megatron_private, operations
from rlhf.model.architecture import Architecture
from rlhf.model.build import Decoder
from rlhf.model.logp import token_logp
from rlhf.parallel.mesh import Mesh
from rlhf.phases import Kind
from rlhf.train.optimizer import Optimizer

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func


class Learner:
    """A model and, unless it is frozen, its gradients and optimizer.

    Micro-batches are lists of samples; every data-parallel rank brings the same number of them, every rank of one replica the same ones.
    """

    def __init__(
        self,
        arch: Architecture,
        config: Config,
        mesh: Mesh,
        dtype: torch.dtype,
        *,
        fill: Callable[[dict[str, Tensor]], None],
        temperature: float,
        train: bool,
    ):
        """fill(parameters) puts the initial weights into this rank's shards, by megatron-core's names; log-probs are at temperature."""
        self.arch, self.mesh, self.temperature = arch, mesh, temperature
        self.sequence_parallel = config.parallel.sp and config.parallel.tp > 1
        self.decoder = Decoder(arch, config.parallel, mesh, dtype)
        fill(self.parameters())
        if not train:
            self.decoder.requires_grad_(False)
            self.model: Any = self.decoder
            return
        overlap = (
            mesh.layout.dp * mesh.layout.cp > 1
        )  # gradients are reduced while the last micro-batch's backward pass goes on
        zero = config.parallel.zero
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=zero, overlap_grad_reduce=overlap
        )
        self.model = DistributedDataParallel(self.decoder.config, ddp, self.decoder)
        if overlap:
            self.decoder.config.no_sync_func = self.model.no_sync
        self.optimizer = Optimizer(config.optim, self.model, dtype, config.parallel.zero)
        self.decoder.config.finalize_model_grads_func = finalize_model_grads
        self.decoder.config.grad_scale_func = self.optimizer.megatron.scale_loss

    def parameters(self) -> dict[str, Tensor]:
        """This rank's shards by megatron-core's names."""
        return {name: p.data for name, p in self.decoder.named_parameters()}

    def tenants(self) -> dict[Kind, list[Tensor]]:
        """All that this model keeps on the device between phases, by kind, for rlhf.residence."""
        weights = [p.data for p in self.decoder.parameters()]
        if self.model is self.decoder:
            return {Kind.WEIGHTS: weights}
        gradients = megatron_private.gradient_buffers(self.model)
        return {Kind.WEIGHTS: weights, Kind.GRADIENTS: gradients, Kind.OPTIMIZER: self.optimizer.tensors()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This rank's weights and optimizer state, as live tensors."""
        return self.parameters(), self.optimizer.state()

    def sound(self, optimizer: bool = False) -> bool:
        """Whether this rank's weights can be computed with; with optimizer, whether its state is finite, too."""
        return operations.sound(self.parameters().values()) and not (
            optimizer and not operations.finite(self.optimizer.tensors())
        )

    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Take over what state() gave on the same rank of the same layout. Raises UserError where that was another architecture's."""
        shapes = [{name: tuple(tensor.shape) for name, tensor in held.items()} for held in (self.parameters(), weights)]
        if shapes[0] != shapes[1]:
            odd = min(
                name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
            )
            raise UserError(
                f"the checkpoint in out is of another architecture (see {odd}): load a model of the same, or set another out"
            )
        for name, tensor in self.parameters().items():
            tensor.copy_(weights[name])
        self.optimizer.load(optimizer)

    @torch.no_grad()
    def score(self, microbatches: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
        """A stream [L] of every sample, in order, on every rank of the replica: values if the model has a scalar head, else log-probs."""

        def stream(batch: Batch, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
            out = self._read(batch, hidden)
            return out.value if self.arch.scalar else out.logp

        batches: list[Batch] = []

        def packed() -> Iterator[Batch]:
            for samples in microbatches:
                batches.append(self._pack(samples))
                yield batches[-1]

        outputs = self._schedule(packed(), len(microbatches), stream, train=False)
        lengths = [len(batch.places) for batch in batches]
        flat = torch.cat(outputs) if self.mesh.is_last_stage else torch.empty(sum(lengths), device=self.mesh.device)
        flat = self.mesh.cp_gather(self.mesh.from_last_stage(flat)).view(self.mesh.layout.cp, -1)
        places = self.mesh.cp_gather(torch.cat([batch.places for batch in batches])).view(self.mesh.layout.cp, -1)
        streams = []
        for samples, values, order in zip(
            microbatches, flat.split(lengths, dim=1), places.split(lengths, dim=1), strict=True
        ):
            row = torch.empty(values.numel(), device=self.mesh.device)
            row[order.flatten()] = values.flatten()
            streams += unpack(row.cpu().numpy(), samples)
        return streams

    def learn(self, microbatches: Sequence[Sequence[Sample]], loss: Callable[[Batch, Output], Loss], lr: float) -> Sums:
        """One optimizer update from the sum of losses over all micro-batches of all ranks, divided by the global count."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._schedule(map(self._pack, microbatches), len(microbatches), partial(self._loss, loss), train=True)
        norm = self.optimizer.step(lr)
        return self._total(sums) | {"grad_norm": (norm, 1.0), "lr": (lr, 1.0)}

    def evaluate(self, microbatches: Sequence[Sequence[Sample]], loss: Callable[[Batch, Output], Loss]) -> Sums:
        """The metrics of a loss, without learning."""

        def metrics(batch: Batch, hidden: Tensor, non_loss_data: bool = True) -> dict[str, tuple[Tensor, Tensor]]:
            return loss(batch, self._read(batch, hidden)).metrics

        with torch.no_grad():
            return self._total(self._schedule(map(self._pack, microbatches), len(microbatches), metrics, train=False))

    def _pack(self, samples: Sequence[Sample]) -> Batch:
        layout = self.mesh.layout
        return pack(
            samples,
            cp=(self.mesh.cp_rank, layout.cp),
            multiple=layout.tp if self.sequence_parallel else 1,
            device=self.mesh.device,
            cp_sum=self.mesh.cp_sum,
        )

    def _read(self, batch: Batch, hidden: Tensor) -> Output:
        """Hidden states [1, T (/tp), h] of the last stage -> what the algorithms see."""
        out = Output()
        if self.arch.scalar:
            out.value = self.decoder.score(hidden[0], self.mesh.tp_group)
        if self.arch.lm:
            out.logp, out.entropy = token_logp(
                hidden[0],
                self.decoder.head_weight(),
                batch.labels,
                vocab=self.arch.vocab,
                temperature=self.temperature,
                group=self.mesh.tp_group,
                sequence_parallel=self.sequence_parallel,
            )
        return out

    def _loss(self, loss: Callable[[Batch, Output], Loss], batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
        found = loss(batch, self._read(batch, hidden))
        return found.total, found.count.to(torch.int32), found.metrics

    def _schedule(self, batches: Iterable[Batch], count: int, read: Callable[..., Any], train: bool) -> list[Any]:
        """Run `count` micro-batches through megatron-core's pipeline schedule; what `read` returned on the last stage, elsewhere nothing.

        Each batch is asked for when its turn comes, while the device still works on those before it.
        """

        def forward(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            batch = next(iterator)
            return model(batch), partial(read, batch)

        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=count,
            seq_length=1,  # not read: micro-batches announce their true shapes to each other
            micro_batch_size=1,
            forward_only=not train,
            collect_non_loss_data=not train,
        )

    def _total(self, metrics: list[dict[str, tuple[Tensor, Tensor]]]) -> Sums:
        """Sums over micro-batches, with one device synchronisation; empty where another rank reports the same tokens."""
        if not metrics or self.mesh.tp_rank:
            return {}
        stacked = torch.stack(
            [torch.stack([torch.stack([s.float(), n.float()]) for s, n in m.values()]) for m in metrics]
        ).sum(0)
        return {name: (s, n) for name, (s, n) in zip(metrics[0], stacked.tolist(), strict=True)}
