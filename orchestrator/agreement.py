"""What all ranks must agree on, where it happens once in a while and may be any object."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from jem.errors import DataError, JEMError
from jem.files import Location
from jem.world import World

T = TypeVar("T")

REMEDY = "make room or make it writable, then give the same command again"


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


def same_everywhere(world: World, root: Location, digest: str) -> None:
    """DataError on every rank unless all ranks see the same folder for the run and hold the same data."""
    if world.size == 1:
        return
    path = root / "same-folder"

    def leave_token() -> str:
        token = uuid.uuid4().hex
        try:
            path.write(token.encode())
        except OSError as error:
            raise JEMError(f"{root.uri}: cannot be written ({error}); {REMEDY}") from error
        return token

    token = on_rank_0(world, leave_token)
    seen = path.exists() and path.read().decode() == token
    told: list[tuple[str, bool, str]] = [("", False, "")] * world.size
    dist.all_gather_object(told, (socket.gethostname(), seen, digest))
    if world.rank == 0:
        path.remove()
    apart = sorted({host for host, sees, _ in told if not sees})
    if apart:
        remedy = "storage_path must be a folder that all nodes share, or an object store"
        raise DataError(f"{root.uri} on {', '.join(apart)} is not the folder that rank 0 on {told[0][0]} has: {remedy}")
    others = sorted({host for host, _, theirs in told if theirs != told[0][2]})
    if others:
        raise DataError(f"the data on {', '.join(others)} are not those on {told[0][0]}: put the same under data.root")
