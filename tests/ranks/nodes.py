"""Work that the first rank of a node does for the others. This is part of sampling.py."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.parallel.mesh import Mesh


def check_the_first_rank_goes_first(folder: Path, mesh: Mesh) -> None:
    """Check that other ranks are called only after the first one, and not at all if it raises a user's mistake."""
    mark = folder / f"made{mesh.world}"

    def make() -> bool:
        found = mark.exists()
        time.sleep(0.2)
        mark.touch()
        return found

    def fail() -> None:
        assert mesh.rank == 0, "not to be called here"
        raise UserError("a mistake")

    assert mesh.first_on_node(make) == (mesh.rank > 0)
    with pytest.raises(UserError, match="a mistake"):
        mesh.first_on_node(fail)

    def fail_last() -> None:
        if mesh.rank == mesh.world - 1:
            raise UserError("a later mistake")

    with pytest.raises(UserError, match="a later mistake"):  # on all ranks
        mesh.first_on_node(fail_last)
