"""Attacks on a classifier: projected gradients, random search, and foolbox's, which look for the smallest norm.

Images, perturbations and their norms are on the [0, 1] pixel scale. A classifier is a function of such images; it may
draw noise of its own at each call, and its gradient is then that of a noisy copy (expectation over transformation,
Athalye et al., 2018). What an attack returns are candidates: `smallest.Smallest.offer` decides what counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jem.errors import JEMError

Classifier = Callable[[Tensor], Tensor]
"""Images [n, c, h, w] on [0, 1] to logits [n, C]."""

NORMS = {"linf": math.inf, "l2": 2.0}

START_SHARE = 0.8
"""Square attack: the share of the pixels that the first window covers; halved at `HALVED` (its paper's schedule)."""
HALVED = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def norm_of(change: Float[Tensor, "n ..."], norm: str) -> Float[Tensor, " n"]:
    """The norm of each image's perturbation."""
    length: Tensor = torch.linalg.vector_norm(change.flatten(1), NORMS[norm], dim=1)
    return length


def margin(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """How far the right class is ahead of the best other: below 0 the answer is wrong."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    other: Tensor = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    return right - other


def is_wrong(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether the right class is not ahead; logits that are not finite are no right answer."""
    return ~((margin(logits, labels) > 0) & logits.isfinite().all(dim=1))


def loss_of(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], kind: str) -> Float[Tensor, " n"]:
    """What an attack raises: the cross-entropy, or minus the margin, whose gradient does not fade for sure answers."""
    if kind == "margin":
        return -margin(logits, labels)
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def project(x: Tensor, images: Tensor, norm: str, eps: float) -> Tensor:
    """The point of the ball of radius `eps` around each image next to x, then moved into [0, 1]."""
    change = x - images
    if norm == "linf":
        change = change.clamp(-eps, eps)
    else:
        length = norm_of(change, norm).clamp_min(1e-12)
        change = change * (eps / length).clamp_max(1)[:, None, None, None]
    return (images + change).clamp(0, 1)


def pgd(
    classify: Classifier,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    norm: str,
    eps: float,
    steps: int,
    generator: torch.Generator,
    loss: str = "cross-entropy",
    start: Float[Tensor, "n c h w"] | None = None,
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
    """Projected gradient ascent (Madry et al., 2018), steps of 2.5 eps / steps, from `start` or a random point.

    Returned are, for each image, the iterate of the lowest margin, which is the luckiest where the classifier has
    noise, and the last one. `loss`: cross-entropy or margin.
    """
    if start is None:
        start = images + _random_within(images, norm, eps, generator)
    x = project(start, images, norm, eps)
    best, lowest = x, torch.full((len(images),), math.inf, device=images.device)
    for step in range(steps + 1):
        with torch.enable_grad():
            position = x.detach().requires_grad_(True)
            logits = classify(position)
            (gradient,) = torch.autograd.grad(loss_of(logits, labels, loss).sum(), position)
        wrong = is_wrong(logits.detach(), labels)
        found = margin(logits.detach(), labels).nan_to_num(nan=-math.inf)
        _check(gradient, wrong)
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)  # of images that are broken
        better = found < lowest
        lowest = torch.where(better, found, lowest)
        best = torch.where(better[:, None, None, None], x, best)
        if step < steps:
            x = project(x + 2.5 * eps / steps * _steepest(gradient, norm), images, norm, eps)
    return best, x


def _check(gradient: Tensor, wrong: Tensor) -> None:
    """An attack without a direction is a failed attack, and no image that withstands it."""
    bad = int((~gradient.isfinite().flatten(1).all(dim=1) & ~wrong).sum())
    if bad:
        raise JEMError(
            f"the gradient is not finite for {bad} of {len(wrong)} attacked images that are still right: robustness "
            "cannot be measured; leave the k that does it out of evaluate.attack.refine"
        )


def _random_within(images: Tensor, norm: str, eps: float, generator: torch.Generator) -> Tensor:
    """Uniform in the ball."""
    if norm == "linf":
        noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        return eps * (2 * noise - 1)
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    radius = torch.rand(len(images), generator=generator, device=images.device, dtype=images.dtype)
    length = eps * radius ** (1 / images[0].numel()) / norm_of(noise, norm)
    return noise * length[:, None, None, None]


def _steepest(gradient: Tensor, norm: str) -> Tensor:
    """The direction of length 1 in the norm that rises most."""
    if norm == "linf":
        return gradient.sign()
    return gradient / norm_of(gradient, norm).clamp_min(1e-12)[:, None, None, None]


@torch.no_grad()
def square(
    classify: Classifier,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    norm: str,
    eps: float,
    queries: int,
    generator: torch.Generator,
) -> Float[Tensor, "n c h w"]:
    """Random search with square windows, without a gradient (Square Attack, Andriushchenko et al., 2020).

    linf: the paper's, stripes first, then windows of +-eps a channel. l2: noise first, then windows added to the
    perturbation, which is then scaled back to length eps, in place of the paper's exchange of mass between two
    windows. A change is kept where the margin falls.
    """
    n, c, h, w = images.shape

    def signs(*shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=generator, device=images.device)
        return torch.where(drawn < 0.5, -1.0, 1.0).to(images.dtype)

    change = eps * (signs(n, c, 1, w).expand(-1, -1, h, -1) if norm == "linf" else signs(n, c, h, w))
    if norm == "l2":
        change = change / math.sqrt(c * h * w)
    best = project(images + change, images, norm, eps)
    lowest = margin(classify(best), labels)
    for query in range(1, queries):
        share = START_SHARE / 2 ** sum(query >= at * queries for at in HALVED)
        side = max(1, min(round(math.sqrt(share * h * w)), h, w))
        window = _windows(n, h, w, side, generator, images.device)
        if norm == "linf":
            tried = torch.where(window, images + eps * signs(n, c, 1, 1), best)
        else:
            change = best - images + window * signs(n, c, 1, 1) * (eps / math.sqrt(c * h * w))
            tried = images + change * (eps / norm_of(change, norm).clamp_min(1e-12))[:, None, None, None]
        tried = project(tried, images, norm, eps)
        found = margin(classify(tried), labels)
        better = found < lowest
        lowest = torch.where(better, found, lowest)
        best = torch.where(better[:, None, None, None], tried, best)
    return best


def _windows(n: int, h: int, w: int, side: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """A random square of the image, true inside, for each of n images: [n, 1, h, w]."""

    def inside(length: int) -> Tensor:
        begin = torch.randint(length - side + 1, (n, 1), generator=generator, device=device)
        place = torch.arange(length, device=device)
        return (place >= begin) & (place < begin + side)

    return (inside(h)[:, :, None] & inside(w)[:, None, :])[:, None]


def of_foolbox(
    name: str,
    classify: Classifier,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    steps: int,
    seed: int,
) -> Float[Tensor, "n c h w"]:
    """A minimum-norm attack by foolbox (Rauber et al., 2020): where it finds nothing, the image itself.

    fmn (linf, Pintor et al., 2021), ddn (l2, Rony et al., 2018), cw (l2, Carlini & Wagner, 2017; `steps` in each of
    5 searches for its constant). Its noise comes from torch's global generators, which are put back.
    """
    from foolbox.attacks.carlini_wagner import L2CarliniWagnerAttack
    from foolbox.attacks.ddn import DDNAttack
    from foolbox.attacks.fast_minimum_norm import LInfFMNAttack
    from foolbox.criteria import Misclassification
    from foolbox.models.pytorch import PyTorchModel

    made: dict[str, Callable[[], Any]] = {
        "fmn": lambda: LInfFMNAttack(steps=steps),
        "ddn": lambda: DDNAttack(steps=steps),
        "cw": lambda: L2CarliniWagnerAttack(steps=steps, stepsize=0.1, binary_search_steps=5, initial_const=1.0),
    }
    model = PyTorchModel(_AsModule(classify).eval(), bounds=(0, 1), device=images.device)
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        found, _, _ = made[name]()(model, images, Misclassification(labels), epsilons=None)
    nearest: Tensor = found.detach()
    return nearest


class _AsModule(nn.Module):
    """A function as the module that foolbox asks for."""

    def __init__(self, function: Classifier) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
