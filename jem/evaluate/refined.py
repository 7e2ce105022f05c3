"""JEM-k: a classifier that first moves the image down its own energy (Grathwohl et al., 2020, section 5.4)."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from jem.config import SGLDConfig
from jem.energy import EnergyFn, Logits, energy_fn
from jem.evaluate.attacks import Classifier
from jem.sgld import along, sgld_step


def differentiable(through: bool, energy: EnergyFn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies [n] and their gradients, which can be differentiated themselves if `through`."""
    with torch.enable_grad():
        position = x if through else x.detach().requires_grad_(True)
        value = energy(position)
        (gradient,) = torch.autograd.grad(value.sum(), position, create_graph=through)
    return value, gradient


def refined(
    logits: Logits,
    k: int,
    config: SGLDConfig,
    copies: int,
    copy_noise: float,
    generator: torch.Generator,
    straight: bool = False,
) -> Classifier:
    """Logits of images on [0, 1] after k SGLD steps, averaged over noisy copies; k = 0: as the network gives them.

    The gradient goes through all steps, second derivatives of the energy included; or, `straight`, past them, as if
    the refinement were the identity (BPDA, Athalye et al., 2018; the released code does so). The noise of `copy_noise`
    (on the [-1, 1] scale) and of the steps is drawn anew at each call, from `generator`.
    """

    def classify(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        position = 2 * x - 1
        if k == 0:
            return logits(position)
        position = position.repeat(copies, 1, 1, 1)
        noise = torch.randn(position.shape, generator=generator, device=x.device, dtype=x.dtype)
        begin = position + copy_noise * noise
        through = x.requires_grad and not straight
        position = begin if through else begin.detach()
        for step in range(k):
            now = along(config, step // config.inner_steps)  # as in a chain of the training
            position, _ = sgld_step(energy_fn(logits), position, now, generator, partial(differentiable, through))
        found = logits(position if through else begin + (position - begin).detach())
        return found.view(copies, len(x), found.shape[1]).mean(dim=0)

    return classify
