"""Carries out a plan between live tensors: local copies, and point-to-point in buckets for what crosses ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, groupby
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.weights.entries import some
from rlhf.weights.names import shapes
from rlhf.weights.plan import Move, Plan
from rlhf.weights.tiles import Geometry, Tile, geometry, numel, shaped, split, view


@dataclass(frozen=True, slots=True)
class Part:
    """A move as the executor needs it: from which place of which local tensor to which place of which other."""

    source: str
    out_of: Geometry
    target: str
    into: Geometry
    numel: int

    @classmethod
    def of(cls, move: Move, limit: int) -> list[Part]:
        """In parts of at most `limit` elements."""
        a, b = move.source_tile, move.target_tile
        return [cls(a.local, geometry(a, box), b.local, geometry(b, box), numel(box)) for box in split(move.box, limit)]


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
        self.rank, self.world, self.dtype, self.transform = rank, plan.world, dtype, transform
        self.coming, self.leaving = plan.received(rank), plan.sent(rank)
        self.local = [part for move in self.coming if move.source == rank for part in Part.of(move, move.numel)]
        # Half of a bucket is packed, or received and unpacked, while the other half is on its way.
        rounds = _rounds(self.coming + self.leaving, plan.world, bucket // 2 // dtype.itemsize)
        self.rounds = rounds or [[]]  # one at least, in which local copies are made
        self.shares = _shares(self.local, len(self.rounds))
        self.bound: list[tuple[int, int]] = []  # the storages that the views below are of
        self.out_of: dict[int, Tensor] = {}  # id of a part -> its box in the source
        self.into: dict[int, Tensor] = {}  # and in the target
        if plan.world > 1:
            dist.barrier()  # NCCL makes its communicator in the first call, which all ranks must join; some may send nothing

    def volume(self) -> tuple[int, int]:
        """Bytes that stay on this rank, and that it receives from others."""
        stay, cross = (sum(m.numel for m in self.coming if (m.source == self.rank) == own) for own in (True, False))
        return stay * self.dtype.itemsize, cross * self.dtype.itemsize

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
            share = self.shares[
                turn
            ]  # between rounds: while links work the device has time, and links never wait for it
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
        sent = Transformed(self.transform, source) if self.transform else source
        coming, leaving = _by(self.coming, "source"), _by(self.leaving, "target")
        wanted = self._exchanged(
            {rank: self._sums(moves, sent, "source") for rank, moves in leaving.items()},
            {rank: len(moves) for rank, moves in coming.items() if rank != self.rank},
            next(iter(source.values())).device,
        )
        if self.rank in coming:
            wanted[self.rank] = self._sums(coming[self.rank], sent, "source")
        for rank, moves in coming.items():
            found = self._sums(moves, target, "target")
            for move in compress(moves, (found != wanted[rank]).tolist()):
                raise RuntimeError(
                    f"after publishing, the engine's {move.target_tile.local} on rank {self.rank} differs from {move.target_tile.name}"
                    f" {move.box} on rank {rank}: the engine does not hold the weights that were trained"
                )

    def _sums(
        self, moves: list[Move], tensors: Mapping[str, Tensor] | Transformed, end: Literal["source", "target"]
    ) -> Tensor:
        """The checksum of each move's box, where it comes from or where it goes."""
        tiles = [move.source_tile if end == "source" else move.target_tile for move in moves]
        boxes = [view(tensors[tile.local], tile, move.box) for tile, move in zip(tiles, moves, strict=True)]
        return torch.stack([checksum(box.to(self.dtype)) for box in boxes])

    def _exchanged(self, ours: dict[int, Tensor], theirs: dict[int, int], device: torch.device) -> dict[int, Tensor]:
        """Give other ranks (keys) their integers, and get so many from others, as in the rounds of a publish."""
        found = {rank: torch.empty(count, dtype=torch.int64, device=device) for rank, count in theirs.items()}
        for shift in range(1, self.world):
            to, by = (self.rank + shift) % self.world, (self.rank - shift) % self.world
            calls = [dist.P2POp(dist.isend, ours[to], to)] if to in ours else []
            calls += [dist.P2POp(dist.irecv, found[by], by)] if by in found else []
            for work in dist.batch_isend_irecv(calls) if calls else ():
                work.wait()
        return found

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
        weights ^= (
            weights >> 32
        )  # no linear function of the place: two rows that changed places would weigh the same if their sums did
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


def _by(moves: list[Move], end: Literal["source", "target"]) -> dict[int, list[Move]]:
    """Moves by the rank at one end of them."""
    found: dict[int, list[Move]] = defaultdict(list)
    for move in moves:
        found[getattr(move, end)].append(move)
    return found


def _rounds(moves: list[Move], world: int, limit: int) -> list[list[Message]]:
    """The messages of one rank, from all moves to and from it: in a round at most one that it sends and one that it receives, each of
    at most half of limit elements.

    Rounds are in the order of ((target - source) modulo the world, the message's place in its pair). Each rank works that out alone.
    Of all messages that are still to be carried out, the first one in this order is the next one of both of its ranks, so no rank can
    wait for ever. Links carry both directions at once, and a round fills both.
    """
    half = max(1, limit // 2)
    pairs: dict[tuple[int, int], list[Part]] = defaultdict(list)
    for move in moves:
        if move.source != move.target:
            pairs[move.source, move.target] += Part.of(move, max(1, half // 4))
    rounds: dict[tuple[int, int], list[Message]] = defaultdict(list)
    for (source, target), parts in pairs.items():
        for place, cut in enumerate(_cut(parts, half)):
            rounds[(target - source) % world, place].append(Message(source, target, cut))
    return [rounds[key] for key in sorted(rounds)]


def _cut(parts: list[Part], limit: int) -> Iterator[list[Part]]:
    """Consecutive parts of at most limit elements together."""
    cut: list[Part] = []
    size = 0
    for part in parts:
        if size + part.numel > limit:
            yield cut
            cut, size = [], 0
        cut.append(part)
        size += part.numel
    yield cut
