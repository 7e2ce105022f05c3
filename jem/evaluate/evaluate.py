"""One trained network, all its figures. Batches are fixed, so the figures do not depend on who computes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jem.config import EvaluateConfig
from jem.data.augment import to_float
from jem.data.sources import DataSet, Split
from jem.energy import Logits
from jem.evaluate import calibration, classification, ood, scores, sets
from jem.randomness import generator
from jem.world import World

BATCH = 250
"""Images evaluated at once. Fixed: float32 logits of an image change in the last bits with its batch."""


def validate(network: Logits, split: Split, config: EvaluateConfig, world: World, like: Tensor) -> dict[str, float]:
    """`{accuracy, nll, ece}` on a split; the same on every rank. Images get `like`'s device and dtype."""
    logits = over_batches(network, to_float(split.images, torch.float32), config, world, like, "clean")
    return classification_metrics(logits, split.labels)


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    labels = labels.to(logits.device)
    return {
        "accuracy": classification.accuracy(logits, labels),
        "nll": classification.nll(logits, labels),
        "ece": calibration.ece(calibration.confidence_bins(logits, labels)),
    }


def evaluate_fast(
    network: Logits, data: DataSet, config: EvaluateConfig, world: World, like: Tensor
) -> dict[str, float]:
    """The suite `fast`: `test/{accuracy,nll,ece}`, `ood/{interp,uniform}/{log_px,max_py,approx_mass}/auroc`.

    The test split is in-distribution; images are clean unless `config.noise_std`. Every rank gets the
    same figures and does its share of the batches.
    """
    test = to_float(data.test.images, torch.float32)
    images = {"test": test} | {name: outliers(name, test) for name in ("interp", "uniform")}
    logits = {name: over_batches(network, x, config, world, like, name) for name, x in images.items()}

    def approx_mass(x: Tensor) -> Tensor:
        return scores.approx_mass(network, x)

    scored = {
        "log_px": {name: scores.log_px(out) for name, out in logits.items()},
        "max_py": {name: scores.max_py(out) for name, out in logits.items()},
        "approx_mass": {n: over_batches(approx_mass, x, config, world, like, n) for n, x in images.items()},
    }
    metrics = {f"test/{k}": v for k, v in classification_metrics(logits["test"], data.test.labels).items()}
    for name in ("interp", "uniform"):
        for score, by_set in scored.items():
            metrics[f"ood/{name}/{score}/auroc"] = ood.auroc(by_set["test"], by_set[name])
    return metrics


def outliers(name: str, test: Tensor) -> Tensor:
    """The set `name` of `sets.SETS` for these test images: the same at every call."""
    return sets.SETS[name](test, generator("cpu", "evaluate", name))


def over_batches(
    function: Callable[[Tensor], Tensor], images: Tensor, config: EvaluateConfig, world: World, like: Tensor, key: str
) -> Tensor:
    """`function` of all images [n, ...] on every rank, each having computed every world.size-th batch.

    `key` names the stream of the noise, if any; the noise of a batch does not depend on who computes it.
    """

    def alone(x: Tensor, _: torch.Generator) -> Tensor:
        return function(x)

    return over_random_batches(alone, images, config, world, like, key)


@torch.no_grad()
def over_random_batches(
    function: Callable[[Tensor, torch.Generator], Tensor],
    images: Tensor,
    config: EvaluateConfig,
    world: World,
    like: Tensor,
    key: str,
) -> Tensor:
    """`over_batches` for a function that draws: from a stream of the batch's own, on `like`'s device."""
    out: Tensor | None = None
    for index, begin in enumerate(range(0, len(images), BATCH)):
        if index % world.size != world.rank and out is not None:
            continue
        x = images[begin : begin + BATCH]
        if config.noise_std:
            x = x + config.noise_std * torch.randn(x.shape, generator=generator("cpu", "evaluate", key, index))
        draws = generator(like.device, "evaluate", key, index, "of the function")
        value = function(x.to(like.device, like.dtype), draws)
        if out is None:
            out = value.new_zeros((len(images), *value.shape[1:]))
        if index % world.size == world.rank:
            out[begin : begin + BATCH] = value
    assert out is not None, "a split is never empty"
    return world.sum(out)
