"""What all ranks must agree on, where it happens once in a while and may be any object."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from jem.errors import DataError, JEMError
from jem.files import Location
from jem.world import World
from orchestrator.shared import Word, apart, sees

T = TypeVar("T")


def together(world: World, function: Callable[[], T]) -> T:
    """Call `function`; if it raises a JEMError on any rank, raise that on every rank."""
    value, error = None, None
    try:
        value = function()
    except JEMError as raised:
        error = raised
    if world.size > 1:
        errors: list[JEMError | None] = [None] * world.size
        dist.all_gather_object(errors, error)
        error = next((e for e in errors if e is not None), None)
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def on_rank_0(world: World, function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, or the JEMError it raises there; the same on every rank."""
    return from_rank_0(world, together(world, lambda: function() if world.rank == 0 else None))  # type: ignore[return-value]


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
    told = [(socket.gethostname(), mine)] * world.size
    if world.size > 1:
        dist.all_gather_object(told, told[0])
    return told
