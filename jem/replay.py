"""The replay buffer: persistent chains, each worker holding a shard of them on its own device.

Chain i of the whole buffer is row i, of class i mod C; rank r of W holds rows [n r // W, n (r + 1) // W).
Shards therefore differ by at most one chain, every shard has its share of every class, and another
number of workers only slices the same rows elsewhere.

How a chain is stored (`replay.dtype`) is apart from how it moves, in float32 or float64:

    float32  as it moves: 4 bytes a number (8 with precision=float64)
    float16  to the nearest, 2 bytes: on [-1, 1] that is off by 2^-12 at most, a fortieth of a step's noise (0.01)
    uint8    one of 256 levels evenly spaced over [-c, c], c = sgld.clamp, 1 byte: for c = 1 they are 0.0078 apart,
             as much as a step's noise. Rounded at random, so that the stored position's expectation is the position:
             to the nearest, a chain with little noise or none (proximal SGLD) that moves less than half a level
             between visits would stand still
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from jem.config import ReplayConfig
from jem.prior import Prior
from jem.world import World


class Drawn(NamedTuple):
    """Chains taken out for a step: where they live, where they stand, their class, which are new."""

    slots: Int[Tensor, " n"]
    x: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    restarted: Bool[Tensor, " n"]


LEVELS = 255
"""Of uint8, above the lowest."""


def class_counts(capacity: int, n_classes: int, device: torch.device | str = "cpu") -> Int[Tensor, " classes"]:
    """How many chains of the whole buffer keep each class: they differ by at most one."""
    classes = torch.arange(n_classes, device=device)
    return (capacity - classes + n_classes - 1).div(n_classes, rounding_mode="floor").clamp(min=0)


def quantise(x: Float[Tensor, "*d"], bound: float, generator: torch.Generator) -> UInt8[Tensor, "*d"]:
    """The level below or above x, with chances that make x the expectation; +-bound and beyond are the ends.

    A place t = k + f between levels k and k + 1 becomes k + 1 with probability f: variance f (1 - f) level^2.
    """
    place = ((x / bound).clamp(-1, 1) + 1) * (LEVELS / 2)
    below = place.floor()
    up = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) < place - below
    return (below + up).to(torch.uint8)


def dequantise(levels: UInt8[Tensor, "*d"], bound: float, dtype: torch.dtype) -> Float[Tensor, "*d"]:
    """The positions of levels; those of the ends are exactly +-bound."""
    return (levels.to(dtype) * 2 - LEVELS) * (1 / LEVELS) * bound


class Stored(NamedTuple):
    """Chains as they lie in memory or a file; `bound`: of levels, else none."""

    chains: Tensor
    bound: float | None

    def positions(self, dtype: torch.dtype) -> Float[Tensor, "n c h w"]:
        if self.bound is None:
            return self.chains.to(dtype)
        return dequantise(self.chains, self.bound, dtype)


@dataclass
class ReplayBuffer:
    """One worker's shard of the chains."""

    config: ReplayConfig
    chains: Tensor  # [shard, c, h, w], as they are stored
    first: int  # row of the whole buffer that slot 0 is
    n_classes: int
    prior: Prior
    dtype: torch.dtype = torch.float32  # that chains move in
    bound: float | None = None  # of the levels of uint8

    @classmethod
    def start(
        cls,
        prior: Prior,
        n_classes: int,
        world: World,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        clamp: float | None = None,
    ) -> ReplayBuffer:
        """A shard whose chains all stand at the prior. They move in `dtype`, within +-`clamp`, which uint8 needs."""
        rows = world.share(prior.config.capacity)
        labels = torch.arange(rows.start, rows.stop, device=generator.device) % n_classes
        chains = prior.sample(labels, generator)
        bound = clamp if prior.config.dtype == "uint8" else None
        made = cls(prior.config, chains, rows.start, n_classes, prior, dtype, bound)
        made.chains = made.encoded(chains, generator)
        return made

    def encoded(self, x: Float[Tensor, "n c h w"], generator: torch.Generator) -> Tensor:
        """Positions as they are stored; only levels draw from the generator."""
        if self.config.dtype == "uint8":
            assert self.bound is not None, "JEMConfig asks for sgld.clamp"
            return quantise(x, self.bound, generator)
        return x.to(torch.float16 if self.config.dtype == "float16" else self.dtype)

    def positions(self, slots: Int[Tensor, " n"] | slice = slice(None)) -> Float[Tensor, "n c h w"]:
        """Where chains stand, in the precision they move in."""
        return Stored(self.chains[slots], self.bound).positions(self.dtype)

    def take_over(self, stored: Stored, generator: torch.Generator) -> None:
        """Stand where these chains stand: bit for bit if they are stored in the same way, else stored anew."""
        chains = stored.chains.to(self.chains.device)
        if (chains.dtype, stored.bound) != (self.chains.dtype, self.bound):
            chains = self.encoded(Stored(chains, stored.bound).positions(self.dtype), generator)
        self.chains = chains

    def labels(self, slots: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The class each chain keeps."""
        return (slots + self.first) % self.n_classes

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the shard: levels mean positions only with their bound."""
        bound = {} if self.bound is None else {"bound": torch.tensor(self.bound, dtype=torch.float64)}
        return {"chains": self.chains, **bound}

    def draw(self, n: int, generator: torch.Generator) -> Drawn:
        """Take `n` distinct chains at random; each restarts from the prior with `reinit_prob`.

        Distinct, so that no two chains are written to one slot and one of them lost.
        Raises ValueError if the shard holds fewer than `n` chains.
        """
        if n > len(self.chains):
            raise ValueError(f"cannot draw {n} distinct chains from a shard of {len(self.chains)}")
        device = self.chains.device
        slots = torch.randperm(len(self.chains), generator=generator, device=device)[:n]
        restarted = torch.rand(n, generator=generator, device=device) < self.config.reinit_prob
        labels = self.labels(slots)
        fresh = self.prior.sample(labels, generator)
        x = torch.where(restarted[:, None, None, None], fresh, self.positions(slots))
        return Drawn(slots, x, labels, restarted)

    def write(
        self, slots: Int[Tensor, " n"], x: Float[Tensor, "n c h w"], generator: torch.Generator
    ) -> Int[Tensor, ""]:
        """Put chains back, all but those with a non-finite position, whose slots stay; their number.

        What is too far out for float16 (65504) is not finite there. Decided on the device: nothing waits for the host.
        """
        stored = self.encoded(x, generator)
        finite = (stored if stored.is_floating_point() else x).isfinite().flatten(1).all(dim=1)
        self.chains[slots] = torch.where(finite[:, None, None, None], stored, self.chains[slots])
        return (~finite).sum()
