"""The workers that share one training: who am I, which part is mine, and the few things all must agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
        """What `function` returns here; a JEMError that it raises on any rank is raised on every one.

        Where a rank went its own way, the others would wait for it in their next collective.
        """
        value, error = None, None
        try:
            value = function()
        except JEMError as raised:
            error = raised
        error = next((one for one in self.gather(error) if one is not None), None)
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def barrier(self) -> None:
        """Return once every rank has called this."""
        if self.size > 1:
            dist.barrier()
