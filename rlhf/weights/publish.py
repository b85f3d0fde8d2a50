"""Executes a plan on live tensors. Boxes that stay on a rank are copied. Others are sent point-to-point in rounds."""

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
    """A move, or a piece of one, as locations in the source's and in the target's local tensor."""

    source: str
    out_of: Geometry
    target: str
    into: Geometry
    numel: int

    @classmethod
    def of(cls, move: Move, limit: int) -> list[Part]:
        """Split a move into parts of at most `limit` elements."""
        a, b = move.source_tile, move.target_tile
        return [cls(a.local, geometry(a, box), b.local, geometry(b, box), numel(box)) for box in split(move.box, limit)]


@dataclass(frozen=True, slots=True)
class Message:
    """The data that one rank sends to another rank in one round: boxes, packed one after another."""

    source: int
    target: int
    parts: list[Part]

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)


@dataclass(slots=True)
class Transfer:
    """The messages of a round whose transfers have started."""

    messages: list[Message]
    packed: Sequence[Tensor]  # the data of each message
    works: list[dist.Work]


class Transform(Protocol):
    """Changes weights before the sender sends or copies them."""

    def __call__(self, local: str, tensor: Tensor) -> Tensor:
        """Return the tensor to send instead of a local tensor. It is contiguous, with the same shape and device.

        Its dtype may differ. The call must not change `tensor`, but may return it. Ranks call it at different times, so
        it must not communicate. A tensor may be sent in several rounds. Then the call is repeated and must return the
        same values.
        """


class Publisher:
    """This rank's share of a plan. It is grouped into rounds once, so each publish() only copies and sends.

    plan       the same on all ranks of the default group; its ranks are global ranks
    rank       this rank
    dtype      of the data that is sent, the same on all ranks. The sender converts to it, and the receiver's copy
               converts to the dtype of the target.
    bucket     largest number of bytes of packed messages on a rank, sent and received together
    transform  applied on the sender to a whole local tensor before it is cut into boxes. At most two results are held
               at a time: one for sending, and one for copies on this rank.
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
        # One half of a bucket is packed or unpacked while the other half is being transferred.
        rounds = _rounds(self.coming + self.leaving, plan.world, bucket // 2 // dtype.itemsize)
        self.rounds = rounds or [[]]  # at least one, because local copies are made during the rounds
        self.shares = _shares(self.local, len(self.rounds))
        self.bound: list[tuple[int, int]] = []  # the storages of the views below
        self.out_of: dict[int, Tensor] = {}  # id of a part -> view of its box in the source
        self.into: dict[int, Tensor] = {}  # id of a part -> view of its box in the target
        if plan.world > 1:
            # NCCL creates its communicator in the first call. All ranks must join it, even if they send nothing later.
            dist.barrier()

    def volume(self) -> tuple[int, int]:
        """Return (bytes that stay on this rank, bytes that it receives from other ranks)."""
        stay, cross = (sum(m.numel for m in self.coming if (m.source == self.rank) == own) for own in (True, False))
        return stay * self.dtype.itemsize, cross * self.dtype.itemsize

    @torch.no_grad()
    def publish(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """Write every box of this rank's target tiles.

        source and target map local names to tensors. Calls are faster if they pass the same storages as the call
        before. On a GPU, the work is queued on the current stream, and the call does not wait for it.
        """
        self._bind(source, target)
        turns = len(self.rounds)
        size = max(sum(message.numel for message in messages) for messages in self.rounds)
        rooms = torch.empty(2, size, dtype=self.dtype, device=next(iter(source.values())).device)
        sent, kept = (Transformed(self.transform, source) if self.transform else None for _ in range(2))
        started = [self._send(self.rounds[0], rooms[0], sent)]
        for turn in range(turns):
            if turn + 1 < turns:
                started.append(self._send(self.rounds[turn + 1], rooms[(turn + 1) % 2], sent))
            share = self.shares[turn]  # local copies run while rounds are being transferred
            self._copy_out(share, [self.into[id(part)] for part in share], kept)
            self._receive(started.pop(0))

    def _bind(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """Make views of all boxes, unless the storages are those of the last call.

        Making the views again would take longer than the copies.
        """
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
        """After publish(), compare the checksums of every box at its source and at its target.

        Every rank must call this. Raises RuntimeError on a rank whose parameter differs.
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
                local, name = move.target_tile.local, move.target_tile.name
                raise RuntimeError(
                    f"after publishing, the engine's {local} on rank {self.rank} differs from {name}"
                    f" {move.box} on rank {rank}: the engine does not hold the weights that were trained"
                )

    def _sums(
        self, moves: list[Move], tensors: Mapping[str, Tensor] | Transformed, end: Literal["source", "target"]
    ) -> Tensor:
        """Return the checksum of each move's box, at its source or at its target."""
        tiles = [move.source_tile if end == "source" else move.target_tile for move in moves]
        ends = zip(tiles, moves, strict=True)  # one at a time: a view would keep the result of a transform in memory
        return torch.stack([checksum(view(tensors[tile.local], tile, m.box).to(self.dtype)) for tile, m in ends])

    def _exchanged(self, ours: dict[int, Tensor], theirs: dict[int, int], device: torch.device) -> dict[int, Tensor]:
        """Send integers to other ranks and return those received.

        ours: rank -> the integers for it. theirs: rank -> the number of integers to receive from it.
        """
        found = {rank: torch.empty(count, dtype=torch.int64, device=device) for rank, count in theirs.items()}
        for shift in range(1, self.world):
            to, by = (self.rank + shift) % self.world, (self.rank - shift) % self.world
            calls = [dist.P2POp(dist.isend, ours[to], to)] if to in ours else []
            calls += [dist.P2POp(dist.irecv, found[by], by)] if by in found else []
            for work in dist.batch_isend_irecv(calls) if calls else ():
                work.wait()
        return found

    def _copy_out(self, parts: list[Part], targets: list[Tensor], transformed: Transformed | None) -> None:
        """Copy the source box of each part into its target."""
        if transformed is None:
            copy(targets, [self.out_of[id(part)] for part in parts])
            return
        for local, pairs in groupby(zip(parts, targets, strict=True), key=lambda pair: pair[0].source):
            whole, held = transformed[local], list(pairs)
            copy([target for _, target in held], [shaped(whole, part.out_of) for part, _ in held])

    def _send(self, messages: list[Message], room: Tensor, transformed: Transformed | None) -> Transfer:
        """Pack the messages that this rank sends, and start all transfers of a round."""
        sizes = [message.numel for message in messages]
        packed = room[: sum(sizes)].split(sizes)
        calls = []
        for message, flat in zip(messages, packed, strict=True):
            if message.source == self.rank:
                self._copy_out(message.parts, _pieces(message, flat), transformed)
                calls.append(dist.P2POp(dist.isend, flat, message.target))
            else:
                calls.append(dist.P2POp(dist.irecv, flat, message.source))
        return Transfer(messages, packed, dist.batch_isend_irecv(calls) if calls else [])

    def _receive(self, transfer: Transfer) -> None:
        """Wait for the transfers of a round, and unpack the received messages."""
        for work in transfer.works:
            work.wait()
        for message, flat in zip(transfer.messages, transfer.packed, strict=True):
            if message.target == self.rank:
                copy([self.into[id(part)] for part in message.parts], _pieces(message, flat))


def checksum(x: Tensor) -> Tensor:
    """Return a 64-bit integer that depends on every bit of x and on its position."""
    total, start = torch.zeros((), dtype=torch.int64, device=x.device), 1
    for piece in x.contiguous().flatten().split(1 << 22):
        bits = piece.view({2: torch.int16, 4: torch.int32}[x.itemsize]).long()
        weights = torch.arange(start, start + len(bits), device=x.device) * 0x1E3779B97F4A7C15
        # Weights must not be linear in the position. Otherwise a swap of two rows with equal sums would not show.
        weights ^= weights >> 32
        total += (bits * (weights | 1)).sum()
        start += len(bits)
    return total


def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source to its target, in one call.

    A publish has about a thousand copies. If Python started each of them, this would take longer than the copies.
    """
    if targets:
        torch._foreach_copy_(targets, sources)


def mismatch(parameters: Mapping[str, Tensor], tiling: Sequence[Tile], dtype: torch.dtype) -> str:
    """Return the first difference between an engine's parameters and the local tensors of its tiles; "" if none.

    tiling must cover the engine's whole shard, including rows that pad the vocabulary (names.tiles with pad).
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
    """Source tensors by local name, transformed on access. The last result is kept for its other boxes."""

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
    """Return views of the boxes in a packed message."""
    pieces = flat.split([part.numel for part in message.parts])
    return [piece.view(part.into[0]) for piece, part in zip(pieces, message.parts, strict=True)]


def _shares(parts: list[Part], count: int) -> list[list[Part]]:
    """Split the parts, in order, into `count` shares of about the same number of elements."""
    total, done = sum(part.numel for part in parts), 0
    shares: list[list[Part]] = [[] for _ in range(count)]
    for part in parts:
        shares[done * count // total].append(part)
        done += part.numel
    return shares


def _by(moves: list[Move], end: Literal["source", "target"]) -> dict[int, list[Move]]:
    """Return the moves by their source rank or by their target rank."""
    found: dict[int, list[Move]] = defaultdict(list)
    for move in moves:
        found[getattr(move, end)].append(move)
    return found


def _rounds(moves: list[Move], world: int, limit: int) -> list[list[Message]]:
    """Return the rounds of one rank. `moves` are all moves to and from it.

    In a round, the rank sends at most one message and receives at most one, each of at most limit / 2 elements. Links
    work in both directions at once, and a round uses both.

    Rounds are sorted by ((target - source) modulo world, index of the message between the two ranks). Each rank
    computes them without communication. There is no deadlock: the first unfinished message in this order is the next
    message of both its source and its target.
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
    """Yield lists of consecutive parts. The parts of a list have at most `limit` elements together."""
    cut: list[Part] = []
    size = 0
    for part in parts:
        if size + part.numel > limit:
            yield cut
            cut, size = [], 0
        cut.append(part)
        size += part.numel
    yield cut
