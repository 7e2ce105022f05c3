"""What all ranks must agree on, where it happens once in a while and may be any object."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from jem.errors import DataError
from jem.files import Location
from jem.world import World
from orchestrator.shared import Word, apart, sees

T = TypeVar("T")


def on_rank_0(world: World, function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, or the JEMError it raises there; the same on every rank."""
    return from_rank_0(world, world.together(lambda: function() if world.rank == 0 else None))  # type: ignore[return-value]


def from_rank_0(world: World, value: T) -> T:
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def same_folder(world: World, root: Location, word: Word | None) -> None:
    """DataError on every rank unless all see what the driver has left in the run's folder (shared.py)."""
    lost = sorted({host for host, there in _of_all(world, sees(root, word)) if not there})
    if lost and word is not None:
        raise apart(root, lost, word)


def same_data(world: World, digest: str) -> None:
    """DataError on every rank unless all hold the same data."""
    told = _of_all(world, digest)
    others = sorted({host for host, theirs in told if theirs != told[0][1]})
    if others:
        raise DataError(f"the data on {', '.join(others)} are not those on {told[0][0]}: put the same under data.root")


def _of_all(world: World, mine: T) -> list[tuple[str, T]]:
    """Each rank's host and what it says, on every rank."""
    return world.gather((socket.gethostname(), mine))
