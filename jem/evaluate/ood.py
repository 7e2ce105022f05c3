"""Out-of-distribution detection: scores that rise with in-distribution, and how well they separate.

In-distribution is the positive class throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from sklearn.metrics import roc_auc_score
from torch import Tensor

from jem.energy import Logits, energy
from jem.errors import DivergedError


def log_px(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Log p(x) up to the model's own constant: logsumexp_y f(x)[y]."""
    return -energy(logits)


def max_py(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """max_y p(y|x), as its logarithm: float32 would round confident predictions to ties at 1."""
    return logits.double().log_softmax(dim=1).amax(dim=1)


def approx_mass(network: Logits, x: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """-||d log p(x) / dx||_2, the approximate mass score (Grathwohl et al., 2020, section 5.3)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(network(x)).sum(), x)
    norm: Tensor = gradient.flatten(1).norm(dim=1)
    return -norm


def auroc(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> float:
    """The chance that an in-distribution score exceeds an outside one, ties counting half.

    Raises DivergedError if a score is not finite.
    """
    scores = torch.cat([inside, outside]).double().cpu()
    if not scores.isfinite().all():
        raise DivergedError("AUROC: a score is not finite; the model diverged, use an earlier checkpoint")
    positive = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    return float(roc_auc_score(positive.numpy(), scores.numpy()))


def interpolations(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The midpoint of every image and the one before it, of the first and the last."""
    return (images + images.roll(1, dims=0)) / 2


def uniform_noise(shape: torch.Size, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Pixels drawn uniformly from [-1, 1]."""
    return torch.rand(shape, generator=generator) * 2 - 1


OutlierSet = Callable[[Tensor], Tensor]
"""From the in-distribution test images [n, c, h, w] on [-1, 1] to as many outliers."""
