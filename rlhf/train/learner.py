"""The model of one role on this rank. It computes streams of samples (score), and is trained on them (learn)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf import progress
from rlhf.config import Config
from rlhf.contracts import Batch, Loss, Output, Sample, Sums
from rlhf.data.packing import pack, unpack
from rlhf.model import megatron_private, operations
from rlhf.model.architecture import Architecture
from rlhf.model.build import Decoder
from rlhf.model.logp import token_logp
from rlhf.parallel.layout import Place
from rlhf.parallel.mesh import Mesh
from rlhf.phases import Kind
from rlhf.train.optimizer import Optimizer
from rlhf.weights.shards import MAIN, MOMENTS, LiveShard, StoredShard, fill, tiling

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func


class Learner:
    """A model and, unless it is frozen, its gradients and optimizer.

    A micro-batch is a list of samples. All ranks must pass the same number of micro-batches, and all ranks of a replica
    the same micro-batches.
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
        """fill(parameters) writes the initial weights into this rank's shards, which it gets by megatron-core's names.

        temperature: log-probs are computed at this temperature. train: False for a frozen model.
        """
        self.arch, self.mesh, self.temperature = arch, mesh, temperature
        self.sequence_parallel = config.parallel.sp and config.parallel.tp > 1
        self.decoder = Decoder(arch, config.parallel, mesh, dtype)
        fill(self.parameters())
        if not train:
            self.decoder.requires_grad_(False)
            self.model: Any = self.decoder
            return
        # With overlap, gradients are reduced during the backward pass of the last micro-batch.
        overlap = mesh.layout.dp * mesh.layout.cp > 1
        self.zero = config.parallel.zero
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=self.zero, overlap_grad_reduce=overlap
        )
        self.model = DistributedDataParallel(self.decoder.config, ddp, self.decoder)
        if overlap:
            self.decoder.config.no_sync_func = self.model.no_sync
        self.optimizer = Optimizer(config.optim, self.model, dtype, self.zero)
        self.decoder.config.finalize_model_grads_func = finalize_model_grads
        self.decoder.config.grad_scale_func = self.optimizer.megatron.scale_loss

    def parameters(self) -> dict[str, Tensor]:
        """Return this rank's shards by megatron-core's names."""
        return {name: p.data for name, p in self.decoder.named_parameters()}

    def tenants(self) -> dict[Kind, list[Tensor]]:
        """Return all tensors that this model has on the device between phases, by kind, for rlhf.residence."""
        weights = [p.data for p in self.decoder.parameters()]
        if self.model is self.decoder:
            return {Kind.WEIGHTS: weights}
        gradients = megatron_private.gradient_buffers(self.model)
        return {Kind.WEIGHTS: weights, Kind.GRADIENTS: gradients, Kind.OPTIMIZER: self.optimizer.tensors()}

    def state(self) -> LiveShard:
        """Return this rank's part of the training state. The tensors are not copies."""
        names = {id(p): name for name, p in self.decoder.named_parameters()}
        held = [(names[id(p)], start, tensors) for p, start, tensors in self.optimizer.shards()]
        kinds = (MAIN, *MOMENTS) if self.optimizer.updates else (MAIN,)
        return LiveShard(
            self.optimizer.updates,
            tiling(self.arch, self.mesh.place),
            {name: start for name, start, _ in held},
            {kind: {name: tensors[kind] for name, _, tensors in held} for kind in kinds},
        )

    def sound(self, optimizer: bool = False) -> bool:
        """Return whether this rank's weights are finite and not too large to compute with (operations.sound).

        With optimizer, its state must also be finite.
        """
        return operations.sound(self.parameters().values()) and not (
            optimizer and not operations.finite(self.optimizer.tensors())
        )

    @torch.no_grad()
    def load(self, files: Sequence[tuple[Path, Place]]) -> None:
        """Load the training state that the ranks of any layout have saved. Every rank calls it.

        files: the path and place of each rank; of several files with the same elements, the first is read.
        """
        stored = [StoredShard(path, tiling(self.arch, place)) for path, place in files]
        self.optimizer.restart(stored[0].updates)
        fill(self.state(), stored, self.arch)
        for p, start, tensors in self.optimizer.shards():
            p.data.view(-1)[start : start + len(tensors[MAIN])].copy_(tensors[MAIN])
        if self.zero:
            self.model.start_param_sync()  # gathers the weights, as after an update

    @torch.no_grad()
    def score(self, microbatches: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
        """Return a stream [L] of every sample, in order, on every rank of the replica.

        The stream has values if the model has a scalar head, else log-probs.
        """

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
        """Make one optimizer update, and return metrics.

        The loss is the sum over all micro-batches of all ranks, divided by the global count.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._schedule(map(self._pack, microbatches), len(microbatches), partial(self._loss, loss), train=True)
        norm = self.optimizer.step(lr)
        return self._total(sums) | {"grad_norm": (norm, 1.0), "lr": (lr, 1.0)}

    def evaluate(self, microbatches: Sequence[Sequence[Sample]], loss: Callable[[Batch, Output], Loss]) -> Sums:
        """Return the metrics of a loss, without an update."""

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
        """Return the outputs that algorithms get, from hidden states [1, T (/tp), h] of the last stage."""
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
        """Run `count` micro-batches through megatron-core's pipeline schedule.

        Return the results of `read` on the last stage, and an empty list on other stages. Each batch is made when the
        schedule needs it, while the device still computes earlier batches.
        """

        def forward(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            progress.move()
            batch = next(iterator)
            return model(batch), partial(read, batch)

        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=count,
            seq_length=1,  # not used, because the pipeline stages send each other the shapes of their tensors
            micro_batch_size=1,
            forward_only=not train,
            collect_non_loss_data=not train,
        )

    def _total(self, metrics: list[dict[str, tuple[Tensor, Tensor]]]) -> Sums:
        """Return the sums over micro-batches. Synchronizes with the device once.

        The result is empty on ranks that must not count the metrics again: all but the first tensor-parallel rank, and
        all but the last stage.
        """
        if not metrics or self.mesh.tp_rank:
            return {}
        stacked = torch.stack(
            [torch.stack([torch.stack([s.float(), n.float()]) for s, n in m.values()]) for m in metrics]
        ).sum(0)
        return {name: (s, n) for name, (s, n) in zip(metrics[0], stacked.tolist(), strict=True)}
