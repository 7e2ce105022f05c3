"""What a joint energy model says of an image it may not have seen: scores that rise with in-distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from jem.config import SGLDConfig
from jem.energy import Logits, energy, energy_fn
from jem.sgld import sgld_chain


def log_px(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Log p(x) up to the model's own constant: logsumexp_y f(x)[y]."""
    return -energy(logits)


def max_py(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """max_y p(y|x), as its logarithm, from the sum of the others: confident ones tie at 1 from gaps of 700 nats on."""
    ordered = logits.double().sort(dim=1, descending=True).values
    return -F.softplus(ordered[:, 1:].logsumexp(dim=1) - ordered[:, 0], threshold=40)


def approx_mass(network: Logits, x: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """-||d log p(x) / dx||_2, the approximate mass score (Grathwohl et al., 2020, section 5.3)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(network(x)).sum(), x)
    norm: Tensor = gradient.flatten(1).norm(dim=1)
    return -norm


RELEASED = SGLDConfig(steps=20, step_size=1.0, noise_scale=0.01)
"""The chain of `refinement` in the released code, which leaves the number of steps to its caller."""

REFINEMENT = ("refine", "refine_l2")
"""The columns of `refinement`."""


def refinement(
    network: Logits, x: Float[Tensor, "n c h w"], generator: torch.Generator, sgld: SGLDConfig = RELEASED
) -> Float[Tensor, "n 2"]:
    """Two scores of where SGLD takes an image in K steps, x = x_0 to x_K: an image of the model's has little to gain.

    refine    = log p(x) - log p(x_K) = logsumexp_y f(x)[y] - logsumexp_y f(x_K)[y]
    refine_l2 = -||x - x_K||_2, over all pixels and channels

    In the paper's code (github.com/wgrathwohl/JEM, eval_wrn_ebm.py, `logp_hist`: "refine" and "refinel2"), where
    x_{k+1} = x_k + d log p(x_k)/dx + 0.01 eps, eps ~ N(0, I), with nothing clamped. A third one there, "refinegrad",
    is the gain of `approx_mass`.

    The noise of the images depends on who shares their batch: with a generator for each batch and batches that are
    fixed (`evaluate.over_random_batches`) an image's scores depend on neither the workers nor the order of the work.
    """
    energy_of = energy_fn(network)
    end, _ = sgld_chain(energy_of, x, sgld, generator)
    with torch.no_grad():
        gain = energy_of(x) - energy_of(end)  # of log p: E(x) - E(x_K)
    return torch.stack([-gain, -(x - end).flatten(1).norm(dim=1)], dim=1)
