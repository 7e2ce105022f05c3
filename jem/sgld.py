"""Stochastic gradient Langevin dynamics on images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jem.config import SGLDConfig
from jem.energy import EnergyFn

Differentiate = Callable[[EnergyFn, Tensor], tuple[Tensor, Tensor]]
"""An energy and positions [n, *d] to their energies [n] and the gradient of each at its position [n, *d]."""


class Transition(NamedTuple):
    """What a step of n chains saw. `energy` [n] and `grad_norm` [n] belong to `before`, where it started from."""

    energy: Tensor
    grad_norm: Tensor
    before: Tensor  # [n, *d]


def differentiate(energy_fn: EnergyFn, x: Float[Tensor, "n ..."]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n ..."]]:
    """Energies and their gradients, by autograd. The weights' gradients are neither computed nor touched."""
    with torch.enable_grad():
        position = x.detach().requires_grad_(True)
        energy = energy_fn(position)
        (gradient,) = torch.autograd.grad(energy.sum(), position)
    return energy.detach(), gradient


def sgld_step(
    energy_fn: EnergyFn,
    x: Float[Tensor, "n ..."],
    config: SGLDConfig,
    generator: torch.Generator,
    differentiate: Differentiate = differentiate,
) -> tuple[Float[Tensor, "n ..."], Transition]:
    """Advance n independent chains by one step; `x` is left as it was.

    x' = x - step_size * grad E(x) + noise_scale * eps,  eps ~ N(0, I)   (Welling & Teh, 2011)

    Langevin dynamics at temperature 1 needs noise_scale = sqrt(2 * step_size); JEM sets the two
    apart, so its defaults sample at temperature noise_scale**2 / (2 * step_size) = 5e-5.

    With `config.gradient_clamp` = g each component of the gradient is first moved into [-g, g], and with
    `config.clamp` = c the new positions are moved back into [-c, c]: together, proximal SGLD (Yang & Ji,
    JEM++, 2021, who set both to 1 and noise_scale to 0). `grad_norm` is of the gradient before.
    """
    energy, gradient = differentiate(energy_fn, x)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    downhill = gradient
    if config.gradient_clamp is not None:
        downhill = gradient.clamp(-config.gradient_clamp, config.gradient_clamp)
    moved = x - config.step_size * downhill + config.noise_scale * noise
    if config.clamp is not None:
        moved = moved.clamp(-config.clamp, config.clamp)
    return moved, Transition(energy, gradient.flatten(1).norm(dim=1), x)


def sgld_chain(
    energy_fn: EnergyFn,
    x: Float[Tensor, "n ..."],
    config: SGLDConfig,
    generator: torch.Generator,
    differentiate: Differentiate = differentiate,
) -> tuple[Float[Tensor, "n ..."], Transition]:
    """Advance n chains by `config.steps` steps; also what the last of them saw."""
    for _ in range(config.steps):
        x, transition = sgld_step(energy_fn, x, config, generator, differentiate)
    return x, transition
