"""What a classifier's logits f(x) in R^C say besides the class (Grathwohl et al., ICLR 2020, section 3).

Energies are in nats, up to a constant of the model's own: never compare those of two models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

EnergyFn = Callable[[Tensor], Tensor]
"""Images [n, *d] to energies [n]."""

Logits = Callable[[Tensor], Tensor]
"""Images [n, *d] to logits [n, C]: a network."""


@dataclass(frozen=True)
class SplitEnergy:
    """An energy E(x) = rest(first(x)) of a network in two parts, `first` being its first layer (for PYLD)."""

    first: Callable[[Tensor], Tensor]
    rest: EnergyFn

    def __call__(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


def split_energy_fn(network: torch.nn.Module, labels: Int[Tensor, " n"] | None = None) -> SplitEnergy:
    """As `energy_fn`, of a network that has `halves`: its first layer and the rest."""
    first, rest = network.halves()  # type: ignore[operator]
    return SplitEnergy(first, energy_fn(rest, labels))


def energy(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """E(x) = -logsumexp_y f(x)[y], so that p(x) is proportional to exp(-E(x)) (eq. 5, 6)."""
    return -logits.logsumexp(dim=1)


def joint_energy(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """E(x, y) = -f(x)[y], so that p(x, y) is proportional to exp(-E(x, y)) (eq. 4)."""
    return -logits.gather(1, labels[:, None]).squeeze(1)


def energy_fn(network: Logits, labels: Int[Tensor, " n"] | None = None) -> EnergyFn:
    """The energy as a function of the images: E(x), or E(x, y) for chains that keep a class.

    It is computed in float32 or better, whatever precision the network's logits come in.
    """

    def marginal(x: Tensor) -> Tensor:
        return energy(at_least_float32(network(x)))

    def joint(x: Tensor) -> Tensor:
        assert labels is not None
        return joint_energy(at_least_float32(network(x)), labels)

    return marginal if labels is None else joint


def at_least_float32(logits: Tensor) -> Tensor:
    """bf16 keeps 8 bits: differences of energies would drown in its rounding."""
    return logits if logits.dtype == torch.float64 else logits.float()
