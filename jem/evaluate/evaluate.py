"""Validation, and functions of many images in batches that are fixed: nothing depends on who computes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jem.config import EvaluateConfig
from jem.data.augment import to_float
from jem.data.sources import Split
from jem.energy import Logits
from jem.evaluate import calibration, classification, ood, scores
from jem.evaluate.sets import interpolations
from jem.randomness import generator
from jem.world import World

BATCH = 250
"""Images evaluated at once. Fixed: float32 logits of an image change in the last bits with its batch."""


def validate(network: Logits, split: Split, config: EvaluateConfig, world: World, like: Tensor) -> dict[str, float]:
    """`{accuracy, nll, ece, ood/interp/log_px/auroc}` on a split; the same on every rank.

    Outliers are the midpoints of the split's own images: no test image is looked at. Images get `like`'s device and
    dtype. Raises DivergedError if a logit is not finite.
    """
    images = to_float(split.images, torch.float32)
    logits = over_batches(network, images, config, world, like, "clean")
    found = classification_metrics(logits, split.labels)
    between = over_batches(network, interpolations(images), config, world, like, "interp")
    return found | {"ood/interp/log_px/auroc": ood.auroc(scores.log_px(logits), scores.log_px(between))}


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    labels = labels.to(logits.device)
    return {
        "accuracy": classification.accuracy(logits, labels),
        "nll": classification.nll(logits, labels),
        "ece": calibration.ece(calibration.confidence_bins(logits, labels)),
    }


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
    function: Callable[..., Tensor],
    images: Tensor,
    config: EvaluateConfig,
    world: World,
    like: Tensor,
    key: str,
    labels: Tensor | None = None,
    size: int = BATCH,
) -> Tensor:
    """`over_batches` for a function that draws: from a stream of the batch's own, on `like`'s device.

    Images of uint8 are brought to [-1, 1]. With `labels` [n] it is given each batch's as well; `size` images are a
    batch. An error on one rank ends all (`World.together`).
    """
    begins = range(0, len(images), size)
    mine = range(world.rank, len(begins), world.size)

    def of_this_rank() -> Tensor:
        out: Tensor | None = None
        for index in mine or (0,):  # a rank without a batch learns from the first one's first image what a row is
            rows = slice(begins[index], begins[index] + size if mine else 1)
            x = images[rows]
            if x.dtype == torch.uint8:
                x = to_float(x, torch.float32)
            if config.noise_std:
                x = x + config.noise_std * torch.randn(x.shape, generator=generator("cpu", "evaluate", key, index))
            draws = generator(like.device, "evaluate", key, index, "of the function")
            beside = () if labels is None else (labels[rows].to(like.device),)
            value = function(x.to(like.device, like.dtype), draws, *beside).to(like.device)
            if out is None:
                out = value.new_zeros((len(images), *value.shape[1:]))
            if mine:
                out[rows] = value
        assert out is not None, "a split is never empty"
        return out

    return world.sum(world.together(of_this_rank))
