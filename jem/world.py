"""The workers that share one training: who am I, which part is mine, and the few things all must agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from jem.errors import JEMError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size` workers. One worker needs no process group."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The world of torch's default process group, or a world of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, n: int) -> slice:
        """This rank's rows of `n`; the ranks' shares are disjoint, cover all, and differ by at most one row."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; `values` is left as it was."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor([float(flag)], device=device)).item() > 0)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, any object, on every rank. For what happens once in a while."""
        told = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(told, value)
        return told

    def together(self, function: Callable[[], T]) -> T:
        """What `function` returns here; where it raises an error on any rank, every rank raises one.

        A JEMError is the same on all of them, any other is a RuntimeError elsewhere. A rank that went its own way would
        leave the others waiting in their next collective.
        """
        value, error, told = None, None, None
        try:
            value = function()
        except Exception as raised:
            error = raised
            told = raised if isinstance(raised, JEMError) else f"{type(raised).__name__}: {raised}"
        gathered = [one for one in self.gather(told) if one is not None]
        ours = next((one for one in gathered if isinstance(one, JEMError)), None)
        try:
            if error is not None and (ours is None or not isinstance(error, JEMError)):
                raise error
            if ours is not None:
                raise ours
            if gathered:
                raise RuntimeError(f"on another rank: {gathered[0]}")
        finally:
            del error, ours, told, gathered  # an error holds the frames it came through, and this one would hold it
        return value  # type: ignore[return-value]

    def be_patient(self) -> None:
        """From here on this rank waits for the others as long as it takes, not for the group's half an hour or less."""
        if self.size > 1:
            # what older torch calls it
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            set_timeout(timedelta(days=30))

    def barrier(self) -> None:
        """Return once every rank has called this."""
        if self.size > 1:
            dist.barrier()
