"""Carries out a plan between live tensors: local copies, and point-to-point in buckets for what crosses ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.weights.entries import some
from rlhf.weights.names import shapes
from rlhf.weights.tiles import Geometry, Move, Plan, Tile, geometry, shaped, split, view


@dataclass(frozen=True, slots=True)
class Part:
    """A move as the executor needs it: from which place of which local tensor to which place of which other."""

    source: str
    out_of: Geometry
    target: str
    into: Geometry
    numel: int

    @classmethod
    def of(cls, move: Move) -> Part:
        a, b = move.source_tile, move.target_tile
        return cls(a.local, geometry(a, move.box), b.local, geometry(b, move.box), move.numel)


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank sends another in one round: boxes packed one after another."""

    source: int
    target: int
    parts: list[Part]

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)


@dataclass(slots=True)
class Flight:
    """A round on its way."""

    messages: list[Message]
    packed: Sequence[Tensor]  # one for each message
    works: list[dist.Work]


class Transform(Protocol):
    """Changes weights on their way from the sender's tensors to wherever they go."""

    def __call__(self, local: str, tensor: Tensor) -> Tensor:
        """Return what is sent in place of a local tensor: contiguous, of the same shape and device, of any dtype.

        It must not change `tensor`, but may return it as it is. Ranks call it at different times, so it must not
        communicate. It may be called several times for one tensor, which is sent in several rounds, and must then return
        the same values.
        """


class Publisher:
    """This rank's part of a plan, grouped once; every publish() is then only copies and sends.

    plan    the same on all ranks of the default group; its ranks are global ranks
    rank    this rank
    dtype   what crosses ranks, the same on all: the sender converts before the transfer, the receiver's copy does the rest
    bucket  bytes that packed messages, in and out together, may take on a rank at any time
    transform  applied on the sender to a whole local tensor, before it is cut into boxes. Two results at most are held at
               a time: one that is being sent, and one that is being copied within this rank
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        dtype: torch.dtype,
        bucket: int = 512 << 20,
        transform: Transform | None = None,
    ):
        self.plan, self.rank, self.dtype, self.transform = plan, rank, dtype, transform
        self.local = [Part.of(move) for move in plan.moves if move.source == move.target == rank]
        remote = [move for move in plan.moves if move.source != move.target]
        # Half of a bucket is packed, or received and unpacked, while the other half is on its way.
        rounds = (_messages(moves, rank) for moves in _rounds(remote, bucket // 2 // dtype.itemsize))
        self.rounds = [messages for messages in rounds if messages] or [[]]  # one at least, in which local copies are made
        self.shares = _shares(self.local, len(self.rounds))
        self.bound: list[tuple[int, int]] = []  # the storages that the views below are of
        self.out_of: dict[int, Tensor] = {}  # id of a part -> its box in the source
        self.into: dict[int, Tensor] = {}  # and in the target
        if remote:
            dist.barrier()  # NCCL makes its communicator in the first call, which all ranks must join; some may send nothing

    @torch.no_grad()
    def publish(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """Write every box this rank's target tiles need. Local names -> tensors, whose content alone may change between calls.

        On a GPU all of it is in the order of the current stream, which nobody waits for.
        """
        self._bind(source, target)
        turns = len(self.rounds)
        size = max(sum(message.numel for message in messages) for messages in self.rounds)
        rooms = torch.empty(2, size, dtype=self.dtype, device=next(iter(source.values())).device)
        sent, kept = (Transformed(self.transform, source) if self.transform else None for _ in range(2))
        flying = [self._send(self.rounds[0], rooms[0], sent)]
        for turn in range(turns):
            if turn + 1 < turns:
                flying.append(self._send(self.rounds[turn + 1], rooms[(turn + 1) % 2], sent))
            share = self.shares[turn]  # between rounds: while links work the device has time, and links never wait for it
            self._copy_out(share, [self.into[id(part)] for part in share], kept)
            self._receive(flying.pop(0))

    def _bind(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """Make the views of all boxes, unless they were made of the same storages: making them anew would take longer than to copy them."""
        held = [(t.untyped_storage()._cdata, int(t.storage_offset())) for t in (*source.values(), *target.values())]
        if held == self.bound:
            return
        messages = [message for messages in self.rounds for message in messages]
        leaving = [part for message in messages if message.source == self.rank for part in message.parts]
        coming = [part for message in messages if message.target == self.rank for part in message.parts]
        self.out_of = {id(part): shaped(source[part.source], part.out_of) for part in self.local + leaving}
        self.into = {id(part): shaped(target[part.target], part.into) for part in self.local + coming}
        self.bound = held

    @torch.no_grad()
    def verify(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """After publish(): every box has the same checksum where it came from and where it went. Every rank calls it.

        Raises RuntimeError on the rank whose parameter holds something else.
        """
        device = next(iter(source.values())).device
        moves = self.plan.moves
        sent = Transformed(self.transform, source) if self.transform else source
        sums = torch.zeros(len(moves), dtype=torch.int64, device=device)
        for i, move in enumerate(moves):
            if move.source == self.rank:
                sums[i] = checksum(view(sent[move.source_tile.local], move.source_tile, move.box).to(self.dtype))
        if dist.is_initialized():
            dist.all_reduce(sums)
        wanted = sums.tolist()
        for move, right in zip(moves, wanted, strict=True):
            if move.target == self.rank:
                held = view(target[move.target_tile.local], move.target_tile, move.box).to(self.dtype)
                if checksum(held).item() != right:
                    raise RuntimeError(
                        f"after publishing, the engine's {move.target_tile.local} on rank {self.rank} differs from {move.target_tile.name}"
                        f" {move.box} on rank {move.source}: the engine does not hold the weights that were trained"
                    )

    def _copy_out(self, parts: list[Part], targets: list[Tensor], transformed: Transformed | None) -> None:
        """Copy the boxes that parts take out of the source into targets."""
        if transformed is None:
            copy(targets, [self.out_of[id(part)] for part in parts])
            return
        for local, pairs in groupby(zip(parts, targets, strict=True), key=lambda pair: pair[0].source):
            whole, held = transformed[local], list(pairs)
            copy([target for _, target in held], [shaped(whole, part.out_of) for part, _ in held])

    def _send(self, messages: list[Message], room: Tensor, transformed: Transformed | None) -> Flight:
        """Pack what leaves and start all transfers of a round."""
        sizes = [message.numel for message in messages]
        packed = room[: sum(sizes)].split(sizes)
        calls = []
        for message, flat in zip(messages, packed, strict=True):
            if message.source == self.rank:
                self._copy_out(message.parts, _pieces(message, flat), transformed)
                calls.append(dist.P2POp(dist.isend, flat, message.target))
            else:
                calls.append(dist.P2POp(dist.irecv, flat, message.source))
        return Flight(messages, packed, dist.batch_isend_irecv(calls) if calls else [])

    def _receive(self, flight: Flight) -> None:
        """Wait for a round, and unpack what arrived."""
        for work in flight.works:
            work.wait()
        for message, flat in zip(flight.messages, flight.packed, strict=True):
            if message.target == self.rank:
                copy([self.into[id(part)] for part in message.parts], _pieces(message, flat))


def checksum(x: Tensor) -> Tensor:
    """A 64-bit integer that depends on every bit of x and on its place."""
    total, start = torch.zeros((), dtype=torch.int64, device=x.device), 1
    for piece in x.contiguous().flatten().split(1 << 22):
        bits = piece.view({2: torch.int16, 4: torch.int32}[x.itemsize]).long()
        weights = torch.arange(start, start + len(bits), device=x.device) * 0x1E3779B97F4A7C15
        weights ^= weights >> 32  # no linear function of the place: two rows that changed places would weigh the same if their sums did
        total += (bits * (weights | 1)).sum()
        start += len(bits)
    return total


def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensor by tensor, in one call: a publish is a thousand copies, which Python starts more slowly than the device runs them."""
    if targets:
        torch._foreach_copy_(targets, sources)


def mismatch(parameters: Mapping[str, Tensor], tiling: Sequence[Tile], dtype: torch.dtype) -> str:
    """The first difference between an engine's parameters and the local tensors of its tiles; empty: there is none.

    tiling covers the engine's shard as a whole, rows that pad the vocabulary included (names.tiles with pad).
    """
    wanted = shapes(tiling)
    if missing := wanted.keys() - parameters.keys():
        return f"it has no {some(sorted(missing))}"
    if extra := parameters.keys() - wanted.keys():
        return f"it also has {some(sorted(extra))}"
    for local, shape in wanted.items():
        found = parameters[local]
        if tuple(found.shape) != shape or found.dtype != dtype:
            return f"its {local} is {list(found.shape)} {found.dtype}, and {list(shape)} {dtype} is written"
    return ""


class Transformed:
    """Source tensors by local name, transformed on access. The last result is kept: its boxes follow one another."""

    def __init__(self, transform: Transform, source: Mapping[str, Tensor]):
        self.transform, self.source = transform, source
        self.local, self.result = "", torch.empty(0)

    def __getitem__(self, local: str) -> Tensor:
        if local != self.local:
            tensor = self.source[local]
            self.local, self.result = local, self.transform(local, tensor)
            assert self.result.shape == tensor.shape, f"a transform gave {local} the shape {tuple(self.result.shape)}"
        return self.result


def _pieces(message: Message, flat: Tensor) -> list[Tensor]:
    """A packed message as the boxes in it."""
    pieces = flat.split([part.numel for part in message.parts])
    return [piece.view(part.into[0]) for piece, part in zip(pieces, message.parts, strict=True)]


def _shares(parts: list[Part], count: int) -> list[list[Part]]:
    """Parts in order, in shares of about the same number of elements."""
    total, done = sum(part.numel for part in parts), 0
    shares: list[list[Part]] = [[] for _ in range(count)]
    for part in parts:
        shares[done * count // total].append(part)
        done += part.numel
    return shares


def _rounds(moves: list[Move], limit: int) -> list[list[Move]]:
    """Moves in rounds, first fit: in a round no rank sends more than half of limit elements, nor receives more than the other half.

    Links carry both directions at once, so a round fills both. All ranks walk the same rounds, and within one every send meets its
    receive, so none can wait for ever.
    """
    half = max(1, limit // 2)
    largest = max(1, half // 4)  # of the pieces; a direction whose load leaves no room for one is done with a round
    rounds: list[list[Move]] = []
    load: list[dict[tuple[str, int], int]] = []  # per round: ("out" or "in", rank) -> elements
    first: dict[tuple[str, int], int] = defaultdict(int)  # the first round that a direction of a rank is not done with
    for move in [replace(whole, box=box) for whole in moves for box in split(whole.box, largest)]:
        ends, size = (("out", move.source), ("in", move.target)), move.numel
        k = max(first[end] for end in ends)
        while k < len(rounds) and max(load[k][end] for end in ends) + size > half:
            k += 1
        if k == len(rounds):
            rounds.append([])
            load.append(defaultdict(int))
        rounds[k].append(move)
        for end in ends:
            load[k][end] += size
            while first[end] < len(rounds) and load[first[end]][end] + largest > half:
                first[end] += 1
    return rounds


def _messages(moves: list[Move], rank: int) -> list[Message]:
    """The messages of one round that this rank sends or receives, one per pair and direction."""
    pairs: dict[tuple[int, int], list[Part]] = defaultdict(list)
    for move in moves:
        if rank in (move.source, move.target):
            pairs[move.source, move.target].append(Part.of(move))
    return [Message(source, target, pairs[source, target]) for source, target in sorted(pairs)]
