"""Carries out a plan between live tensors: local copies, and point-to-point in buckets for what crosses ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.weights.tiles import Move, Plan, split, view


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank sends another in one round: the boxes of its moves, packed one after another."""

    source: int
    target: int
    moves: list[Move]

    @property
    def numel(self) -> int:
        return sum(move.numel for move in self.moves)


class Publisher:
    """This rank's part of a plan, grouped once; every publish() is then only copies and sends.

    plan    the same on all ranks of the default group; its ranks are global ranks
    rank    this rank
    dtype   what crosses ranks, the same on all: the sender converts before the transfer, the receiver's copy does the rest
    bucket  bytes that packed messages, in and out together, may take on a rank at any time
    """

    def __init__(self, plan: Plan, rank: int, dtype: torch.dtype, bucket: int = 512 << 20):
        self.rank, self.dtype = rank, dtype
        self.local = [move for move in plan.moves if move.source == move.target == rank]
        remote = [move for move in plan.moves if move.source != move.target]
        self.rounds = [_messages(moves, rank) for moves in _rounds(remote, bucket // dtype.itemsize)]
        if remote:
            dist.barrier()  # NCCL makes its communicator in the first call, which all ranks must join; some may send nothing

    @torch.no_grad()
    def publish(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """Write every box this rank's target tiles need. Local names -> tensors, whose content alone may change between calls."""
        for move in self.local:
            _target(move, target).copy_(_source(move, source))
        for messages in self.rounds:
            if messages:
                self._exchange(messages, source, target)

    def _exchange(self, messages: list[Message], source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        sizes = [message.numel for message in messages]
        device = next(iter(source.values())).device
        packed = torch.empty(sum(sizes), dtype=self.dtype, device=device).split(sizes)
        calls = []
        for message, flat in zip(messages, packed, strict=True):
            if message.source == self.rank:
                for move, piece in _pieces(message, flat):
                    box = _source(move, source)
                    piece.view(box.shape).copy_(box)
                calls.append(dist.P2POp(dist.isend, flat, message.target))
            else:
                calls.append(dist.P2POp(dist.irecv, flat, message.source))
        for work in dist.batch_isend_irecv(calls):
            work.wait()
        for message, flat in zip(messages, packed, strict=True):
            if message.target == self.rank:
                for move, piece in _pieces(message, flat):
                    box = _target(move, target)
                    box.copy_(piece.view(box.shape))


def _source(move: Move, tensors: Mapping[str, Tensor]) -> Tensor:
    return view(tensors[move.source_tile.local], move.source_tile, move.box)


def _target(move: Move, tensors: Mapping[str, Tensor]) -> Tensor:
    return view(tensors[move.target_tile.local], move.target_tile, move.box)


def _pieces(message: Message, flat: Tensor) -> Iterable[tuple[Move, Tensor]]:
    return zip(message.moves, flat.split([move.numel for move in message.moves]), strict=True)


def _rounds(moves: list[Move], limit: int) -> list[list[Move]]:
    """Moves in rounds, first fit: in a round no rank sends and receives more than limit elements.

    All ranks walk the same rounds, and within one every send meets its receive, so none can wait for ever.
    """
    largest = max(1, limit // 8)  # of the pieces; a rank whose load leaves no room for one is done with a round
    rounds: list[list[Move]] = []
    load: list[dict[int, int]] = []  # per round: rank -> elements
    first: dict[int, int] = defaultdict(int)  # rank -> the first round it is not done with
    for move in [replace(whole, box=box) for whole in moves for box in split(whole.box, largest)]:
        source, target, size = move.source, move.target, move.numel
        k = max(first[source], first[target])
        while k < len(rounds) and max(load[k][source], load[k][target]) + size > limit:
            k += 1
        if k == len(rounds):
            rounds.append([])
            load.append(defaultdict(int))
        rounds[k].append(move)
        for rank in (source, target):
            load[k][rank] += size
            while first[rank] < len(rounds) and load[first[rank]][rank] + largest > limit:
                first[rank] += 1
    return rounds


def _messages(moves: list[Move], rank: int) -> list[Message]:
    """The messages of one round that this rank sends or receives, one per pair and direction."""
    pairs: dict[tuple[int, int], list[Move]] = defaultdict(list)
    for move in moves:
        if rank in (move.source, move.target):
            pairs[move.source, move.target].append(move)
    return [Message(source, target, pairs[source, target]) for source, target in sorted(pairs)]
