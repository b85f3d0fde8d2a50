"""Where this process stands in a run, in shared memory that its watchdog reads. A call takes about a microsecond.

Code calls move() whenever it has done a piece of work: a micro-batch, a step of the engine, a part of a file.
"""

from __future__ import annotations

import mmap
from struct import Struct
from typing import NamedTuple

SIZE = 512  # bytes of the shared memory
HEAD = Struct("=QQ?H")  # moves, phases, whether training has begun, length of the text
MOVES = Struct("=Q")
MEETING = "connecting to the other ranks"


class Position(NamedTuple):
    """Where a rank stands."""

    moves: int  # pieces of work since the start
    phases: int  # phases entered since the start; equal on all ranks that stand at the same place
    begun: bool  # the start-up is over
    text: str  # step and phase


class Board:
    """The position of this process. A forked child process writes it, and its parent process reads it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SIZE)  # shared with forked processes
        self._moves = self._phases = 0
        self._begun, self._step = False, ""
        self.enter("importing packages")

    def begin(self, step: str) -> None:
        """End the start-up, or the step before. `step` is shown before the phases that follow."""
        self._begun, self._step = True, f"{step}: "
        self.enter("begins")

    def enter(self, phase: str) -> None:
        """Begin a phase. All ranks must enter the same phases."""
        self._moves, self._phases = self._moves + 1, self._phases + 1
        text = f"{self._step}{phase}".encode()[: SIZE - HEAD.size]
        self._memory[HEAD.size : HEAD.size + len(text)] = text
        HEAD.pack_into(self._memory, 0, self._moves, self._phases, self._begun, len(text))

    def move(self) -> None:
        """Count a piece of work."""
        self._moves += 1
        MOVES.pack_into(self._memory, 0, self._moves)

    def read(self) -> Position:
        moves, phases, begun, length = HEAD.unpack_from(self._memory)
        return Position(moves, phases, begun, self._memory[HEAD.size : HEAD.size + length].decode(errors="replace"))


_board = Board()
begin, enter, move, read = _board.begin, _board.enter, _board.move, _board.read
