"""Stochastic gradient Langevin dynamics on images, and what came after: proximal steps, PYLD, schedules, DAT's."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jem.config import SGLDConfig
from jem.energy import EnergyFn, SplitEnergy

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
    JEM++, 2021, who set both to 1 and noise_scale to 0). With `config.normalize_gradient` it is divided by its norm
    over the image, so that every step is step_size long (the chains of DAT, 2026, a PGD attack on the energy, with
    noise_scale 0). `grad_norm` is of the gradient before.
    """
    energy, gradient = differentiate(energy_fn, x)
    return _moved(x, gradient, config, generator), Transition(energy, gradient.flatten(1).norm(dim=1), x)


def pyld_step(
    energy_fn: SplitEnergy, x: Float[Tensor, "n ..."], config: SGLDConfig, generator: torch.Generator
) -> tuple[Float[Tensor, "n ..."], Transition]:
    """An outer step of PYLD (Yang & Ji, JEM++, 2021, after YOPO): `config.inner_steps` moves, one pass through the net.

    With h = first(x), the gradient p = dE/dh is taken once, and held while x moves by

        x' = x - step_size * J_first(x)^T p + noise_scale * eps,

    each move costing a pass through the first layer alone. The first move is SGLD's own. Where the first layer is
    linear (that of wide_resnet), so are the others: moves without noise then add up to one of inner_steps * step_size.
    """
    with torch.enable_grad():
        position = x.detach().requires_grad_(True)
        hidden = energy_fn.first(position)
        energy = energy_fn.rest(hidden)
        held, gradient = torch.autograd.grad(energy.sum(), [hidden, position])
    transition = Transition(energy.detach(), gradient.flatten(1).norm(dim=1), x)
    moved = _moved(x, gradient, config, generator)
    for _ in range(config.inner_steps - 1):
        with torch.enable_grad():
            position = moved.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(energy_fn.first(position), position, held)
        moved = _moved(moved, gradient, config, generator)
    return moved, transition


def sgld_chain(
    energy_fn: EnergyFn,
    x: Float[Tensor, "n ..."],
    config: SGLDConfig,
    generator: torch.Generator,
    differentiate: Differentiate = differentiate,
    steps: int | None = None,
) -> tuple[Float[Tensor, "n ..."], Transition]:
    """Advance n chains by `steps` steps, 1 or more (none: `config.steps`); also what the last of them saw."""
    for i in range(config.steps if steps is None else steps):
        now = along(config, i, steps)
        if config.inner_steps > 1:
            assert isinstance(energy_fn, SplitEnergy), "jem.train.start refuses a network without halves"
            x, transition = pyld_step(energy_fn, x, now, generator)
        else:
            x, transition = sgld_step(energy_fn, x, now, generator, differentiate)
    return x, transition


@functools.lru_cache(maxsize=4096)
def along(config: SGLDConfig, i: int, steps: int | None = None) -> SGLDConfig:
    """The settings of step i, from 0, of a chain of `steps` (none: `config.steps`) a visit.

    From the first step to the last the step size goes in equal ratios to `final_step_size`, and the noise in equal
    differences, as it may end at 0, to `final_noise_scale`. A chain that is longer begins again: it is made of visits.
    """
    if config.final_step_size is None and config.final_noise_scale is None:
        return config
    steps = config.steps if steps is None else steps
    t = (i % steps) / max(steps - 1, 1)
    size, noise = config.step_size, config.noise_scale
    if config.final_step_size is not None:
        size = math.exp((1 - t) * math.log(size) + t * math.log(config.final_step_size))
    if config.final_noise_scale is not None:
        noise = (1 - t) * noise + t * config.final_noise_scale
    return dataclasses.replace(config, step_size=size, noise_scale=noise, final_step_size=None, final_noise_scale=None)


GROWTH, FULL_GAP = 0.05, 0.1
"""Of a chain's length: how much a step may change it, and the energy gap (nats) from which it does nearly so."""


def adapted_length(length: Float[Tensor, ""], gap: Float[Tensor, ""], config: SGLDConfig) -> Float[Tensor, ""]:
    """How long chains are after a step that saw this energy gap, mean E(data) - mean E(samples), over all ranks.

    length' = length * exp(-0.05 tanh(gap / 0.1)), within [config.steps, config.max_steps]

    A gap below 0 says that the model has outrun its chains: it finds data likelier than what it samples, and pushes
    the samples' energy up without end. Chains then get longer; where they find energies as low as data's, shorter.
    (A rule of ours.) A gap that is not finite changes nothing.
    """
    assert config.max_steps is not None
    factor = (-GROWTH * torch.tanh(gap / FULL_GAP)).exp()
    return (length * torch.where(gap.isfinite(), factor, 1.0)).clamp(config.steps, config.max_steps)


def bounded(gradient: Float[Tensor, "n ..."], config: SGLDConfig) -> Float[Tensor, "n ..."]:
    """The gradient that a step goes down: of norm 1 over each image where that is asked for, then within the clamp.

    One of 0 stays 0, and one that is not finite stays so: a chain at rest rests, a lost one is found.
    """
    if config.normalize_gradient:
        shape = (-1, *[1] * (gradient.dim() - 1))
        largest = gradient.flatten(1).abs().amax(dim=1)  # first, as squares of what is small or large have no float
        gradient = gradient / torch.where(largest == 0, 1.0, largest).view(shape)
        norms = gradient.flatten(1).norm(dim=1)
        gradient = gradient / torch.where(norms == 0, 1.0, norms).view(shape)
    if config.gradient_clamp is not None:
        gradient = gradient.clamp(-config.gradient_clamp, config.gradient_clamp)
    return gradient


def _moved(x: Tensor, gradient: Tensor, config: SGLDConfig, generator: torch.Generator) -> Tensor:
    return down(x, gradient, config, torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype))


def down(
    x: Float[Tensor, "n ..."], gradient: Float[Tensor, "n ..."], config: SGLDConfig, noise: Float[Tensor, "n ..."]
) -> Float[Tensor, "n ..."]:
    """Where a step from x leads: down the gradient, with noise, within the clamps."""
    moved = x - config.step_size * bounded(gradient, config) + config.noise_scale * noise
    return moved if config.clamp is None else moved.clamp(-config.clamp, config.clamp)
