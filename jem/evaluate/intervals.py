"""How far a figure may be off because the test set is finite: bootstrap intervals over its images.

A statistic is written once, as a function of how often each image counts: all ones give the figure itself,
random counts the figures of resampled test sets, many at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 1000

CHUNK = 2**21
"""Counts held at once (16 MiB). Fixed, so that the draws do not depend on the machine."""

Statistic = Callable[..., Tensor]
"""From the counts [r, n] of one sample, or of each of several, float64, to r figures or vectors [r, ...]."""


class Interval(NamedTuple):
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def draw_counts(n: int, resamples: int, generator: torch.Generator) -> Float[Tensor, "resamples n"]:
    """How often each of n images is drawn by n draws with replacement, for a number of resamples."""
    rows = torch.randint(n, (resamples, n), generator=generator, device=generator.device).cpu()
    ones = torch.ones((), dtype=torch.float64).expand(rows.shape)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, rows, ones)


def bootstrap(
    statistic: Statistic, sizes: tuple[int, ...], generator: torch.Generator, resamples: int = RESAMPLES
) -> Float[Tensor, "resamples ..."]:
    """The statistic of `resamples` resampled data (Efron, 1979); several samples are drawn independently.

    Of one data set and a generator in one state the draws are always the same: the difference of two models'
    figures is a statistic like any other, and paired if it uses one `counts` for both.
    Raises ValueError if a sample is empty.
    """
    if not all(sizes):
        raise ValueError(f"bootstrap: samples of {sizes} images; each needs at least one")
    at_once = max(1, CHUNK // sum(sizes))
    parts = []
    for begin in range(0, resamples, at_once):
        r = min(at_once, resamples - begin)
        parts.append(statistic(*(draw_counts(n, r, generator) for n in sizes)))
    return torch.cat(parts)


def estimate(statistic: Statistic, sizes: tuple[int, ...]) -> Tensor:
    """The statistic of the data themselves, [...]."""
    return statistic(*(torch.ones(1, n, dtype=torch.float64) for n in sizes))[0]


def percentile_intervals(values: Tensor, samples: Float[Tensor, "resamples ..."]) -> list[Interval]:
    """The middle 95 % of the resampled figures, one interval for each of `values` [...], flattened.

    Widened to hold the figure, which a statistic that is biased in resamples (average precision is, upward, as images
    stand in them several times) can leave outside. Resamples in which a figure is undefined (NaN) are left out. An
    interval of a figure at its very bound has no width: a test set without a mistake says by itself only that the
    error is below about 3 / n.
    """
    low, high = _middle(samples)
    flat = values.flatten()
    return _together(values, low.fmin(flat), high.fmax(flat))


def reflected_intervals(values: Tensor, samples: Float[Tensor, "resamples ..."]) -> list[Interval]:
    """The percentile interval mirrored at the figure, within 0 and 1, widened to hold the figure ("basic" bootstrap).

    For sizes of deviations of a share: a resample deviates more than the data it is drawn from, as they do from the
    truth, so that percentiles lean the wrong way.
    """
    low, high = _middle(samples)
    flat = values.flatten()
    return _together(values, (2 * flat - high).clamp(min=0).minimum(flat), (2 * flat - low).clamp(max=1).maximum(flat))


def _middle(samples: Tensor) -> Tensor:
    """The 2.5th and the 97.5th percentile, [2, k]."""
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return samples.reshape(len(samples), -1).nanquantile(quantiles, dim=0)


def _together(values: Tensor, low: Tensor, high: Tensor) -> list[Interval]:
    return [Interval(*row) for row in torch.stack([values.flatten(), low, high], dim=1).tolist()]


def mean_of(values: Float[Tensor, "n ..."]) -> Statistic:
    """The mean over images of a figure that each has, or of several: counts [r, n] to [r, *k]."""
    flat = values.double().cpu().flatten(1) if values.ndim > 1 else values.double().cpu()[:, None]

    def statistic(counts: Tensor) -> Tensor:
        mean = counts @ flat / counts.sum(dim=1, keepdim=True)
        return mean.reshape(len(counts), *values.shape[1:])

    return statistic
