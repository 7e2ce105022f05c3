"""The replay buffer: persistent chains, each worker holding a shard of them on its own device.

Chain i of the whole buffer is row i, of class i mod C; rank r of W holds rows [n r // W, n (r + 1) // W).
Shards therefore differ by at most one chain, every shard has its share of every class, and another
number of workers only slices the same rows elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jem.config import ReplayConfig
from jem.world import World


class Drawn(NamedTuple):
    """Chains taken out for a step: where they live, where they stand, their class, which are new."""

    slots: Int[Tensor, " n"]
    x: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    restarted: Bool[Tensor, " n"]


def sample_prior(config: ReplayConfig, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Where chains start."""
    return PRIORS[config.prior](shape, generator)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Each pixel uniform on [-1, 1]."""
    return torch.rand(shape, generator=generator, device=generator.device) * 2 - 1


PRIORS = {"uniform": uniform}


@dataclass
class ReplayBuffer:
    """One worker's shard of the chains."""

    config: ReplayConfig
    chains: Float[Tensor, "shard c h w"]
    first: int  # row of the whole buffer that slot 0 is
    n_classes: int

    @classmethod
    def start(
        cls,
        config: ReplayConfig,
        image_shape: tuple[int, int, int],
        n_classes: int,
        world: World,
        generator: torch.Generator,
    ) -> ReplayBuffer:
        """A shard whose chains all stand at the prior."""
        rows = world.share(config.capacity)
        chains = sample_prior(config, (rows.stop - rows.start, *image_shape), generator)
        return cls(config, chains, rows.start, n_classes)

    def labels(self, slots: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The class each chain keeps."""
        return (slots + self.first) % self.n_classes

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
        fresh = sample_prior(self.config, (n, *self.chains.shape[1:]), generator)
        x = torch.where(restarted[:, None, None, None], fresh, self.chains[slots])
        return Drawn(slots, x, self.labels(slots), restarted)

    def write(self, slots: Int[Tensor, " n"], x: Float[Tensor, "n c h w"]) -> Int[Tensor, ""]:
        """Put chains back, all but those with a non-finite position, whose slots stay; their number.

        Decided on the device: nothing waits for the host.
        """
        finite = x.isfinite().flatten(1).all(dim=1)
        self.chains[slots] = torch.where(finite[:, None, None, None], x, self.chains[slots])
        return (~finite).sum()
