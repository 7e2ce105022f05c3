"""What contrastive divergence leaves out of its gradient: the samples move with the weights (Du et al., 2021)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jem.config import SGLDConfig
from jem.energy import EnergyFn, energy_fn
from jem.sgld import bounded


def kl_energies(
    live: EnergyFn,
    held: EnergyFn,
    before: Float[Tensor, "n ..."],
    after: Float[Tensor, "n ..."],
    config: SGLDConfig,
) -> Float[Tensor, " n"]:
    """E_sg(theta)(x') of chains that a last step took from `before` to `after`, differentiable through that step.

        x' = x - step_size * grad E_theta(x) + noise

    Its mean is the first term of L_KL of "Improved contrastive divergence training of energy-based models" (Du et
    al., ICML 2021): weights under which the step leads to where the energy is low. Its second term, the samples'
    entropy by their nearest neighbours, is left out.

    `live` is E_theta, whose weights get the gradient, `held` is E_sg(theta), the same energy of weights that get none.
    x' is `after`, to the bit, with the noise and the clamps of the step as it was taken; what depends on theta is its
    derivative, -step_size * d grad E_theta(x) / d theta, and 0 where a clamp holds.
    """
    position = before.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(live(position).sum(), position, create_graph=True)
    step = config.step_size * bounded(gradient, config)
    if config.clamp is not None:
        step = step * (after.abs() < config.clamp)
    return held(after - (step - step.detach()))


def live_and_held(
    network: nn.Module, buffers: dict[str, Tensor], labels: Int[Tensor, " n"] | None
) -> tuple[EnergyFn, EnergyFn]:
    """The two energies of the bare network, with `buffers` in place of its own: a later pass may change these."""
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def live(x: Tensor) -> Tensor:
        return torch.func.functional_call(network, buffers, (x,))  # type: ignore[no-any-return]

    def held(x: Tensor) -> Tensor:
        return torch.func.functional_call(network, weights | buffers, (x,))  # type: ignore[no-any-return]

    return energy_fn(live, labels), energy_fn(held, labels)
