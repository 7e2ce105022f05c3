"""Whether a confidence of 0.8 is right 80 times in a hundred."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jem.errors import DivergedError
from jem.evaluate.classification import probabilities

N_BINS = 20
"""As Grathwohl et al. (2020)."""


class Bins(NamedTuple):
    """Predictions by confidence, in float64; those of two parts of a data set add up to the whole's.

    Fields are [bins], or [..., bins] of several data sets (of resamples, of classes).
    """

    counts: Tensor
    confidence: Tensor  # sum of confidences
    correct: Tensor  # number of right predictions


def confidence_bins(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], n_bins: int = N_BINS) -> Bins:
    """Sort predictions into `n_bins` equal-width bins of the top class' probability.

    Bin b holds ((b) / n, (b + 1) / n]; a confidence of exactly 1 is in the last (Guo et al., 2017, eq. 2
    and 3; 20 bins as Grathwohl et al., 2020). Raises DivergedError if a logit is NaN.
    """
    confidence, correct = confidences(logits, labels)
    index = bin_index(confidence, n_bins)
    empty = torch.zeros(n_bins, dtype=torch.float64, device=logits.device)
    return Bins(
        empty.index_add(0, index, torch.ones_like(confidence)),
        empty.index_add(0, index, confidence),
        empty.index_add(0, index, correct),
    )


def confidences(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The top class' probability, and 1 where that class is right, else 0; the first class wins a tie."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    if confidence.isnan().any():
        raise DivergedError("calibration: the model's probabilities hold NaN; it diverged, use an earlier checkpoint")
    return confidence, (predicted == labels).double()


def bin_index(confidence: Tensor, n_bins: int) -> Tensor:
    """Which of the equal-width bins, 0 to n_bins - 1; 0 itself is in the first."""
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=confidence.device)
    return torch.bucketize(confidence, edges[1:-1])


def ece(bins: Bins) -> float:
    """Expected calibration error: mean |accuracy - confidence| of the bins, weighted by their sizes."""
    return ((bins.correct - bins.confidence).abs().sum() / bins.counts.sum()).item()


def mce(bins: Bins) -> float:
    """Maximum calibration error: the largest |accuracy - confidence| of a bin that is not empty, be it of one image."""
    used = bins.counts > 0
    return ((bins.correct - bins.confidence)[used].abs() / bins.counts[used]).max().item()


def ece_equal_mass(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], n_bins: int = N_BINS) -> float:
    """ECE with bins that hold n / n_bins predictions each, the adaptive bins of Nguyen & O'Connor (2015).

    See `equal_mass_bins` for ties, and for n that `n_bins` does not divide.
    """
    return ece(equal_mass_bins(logits, labels, n_bins))


def equal_mass_bins(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], n_bins: int = N_BINS) -> Bins:
    """Sort predictions by confidence and cut them into `n_bins` of exactly equal mass.

    A prediction on a cut is shared by the bins on either side, and equal confidences (at 1, often hundreds)
    are shared evenly: no bin depends on the order of the images.
    """
    counts = torch.ones(1, len(labels), dtype=torch.float64, device=logits.device)
    return Bins(*(part[0] for part in share_out(*confidences(logits, labels), counts, n_bins)))


def share_out(confidence: Tensor, correct: Tensor, counts: Float[Tensor, "r n"], n_bins: int) -> Bins:
    """`equal_mass_bins` of r data sets in which prediction i stands `counts[:, i]` times; fields [r, n_bins].

    Mass, confidence and right predictions are summed from low to high confidence, over groups of equal
    confidence; a bin is what these sums gain between two cuts, linear inside a group.
    """
    levels, group = confidence.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    none = counts.new_zeros(len(counts), len(levels))
    mass = none.index_add(1, group, counts)
    right = none.index_add(1, group, counts * correct)
    total = counts.sum(dim=1, keepdim=True)
    cuts = total * torch.arange(1, n_bins, device=counts.device) / n_bins
    ends = mass.cumsum(dim=1)
    at = torch.searchsorted(ends, cuts).clamp(max=len(levels) - 1)  # the group that a cut goes through
    left = ends.gather(1, at) - cuts  # the mass of that group above the cut

    def between_cuts(sums: Tensor) -> Tensor:
        per_mass = sums.gather(1, at) / mass.gather(1, at)
        below = sums.cumsum(dim=1).gather(1, at) - left * per_mass
        return torch.cat([0 * total, below, sums.sum(dim=1, keepdim=True)], dim=1).diff(dim=1)

    return Bins(between_cuts(mass), between_cuts(mass * levels), between_cuts(right))


def ece_classwise(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], n_bins: int = N_BINS) -> float:
    """The mean over classes of the ECE of p(y|x) as the probability that the class is y (Kull et al., 2019, eq. 3).

    It sees the whole distribution, the top class or not. Most of p(y|x) is near 0 and right to be, so that the
    figure is smaller than the ECE by about the number of classes.
    """
    return sum(ece(bins) for bins in classwise_bins(logits, labels, n_bins)) / logits.shape[1]


def classwise_bins(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], n_bins: int = N_BINS) -> list[Bins]:
    """For each class, all images in equal-width bins of the class' probability."""
    found = []
    empty = torch.zeros(n_bins, dtype=torch.float64, device=logits.device)
    for y, p in enumerate(probabilities(logits).T.contiguous()):
        index = bin_index(p, n_bins)
        sums = (torch.ones_like(p), p, (labels == y).double())
        found.append(Bins(*(empty.index_add(0, index, part) for part in sums)))
    return found


class Reliability(NamedTuple):
    """A reliability diagram: the bins that hold predictions, [k] each, in float64, from low to high confidence."""

    low: Tensor  # the bin's edges
    high: Tensor
    counts: Tensor
    confidence: Tensor  # mean, between the edges
    accuracy: Tensor


def reliability(bins: Bins) -> Reliability:
    """The diagram of equal-width bins (Guo et al., 2017, figure 1); empty bins are left out."""
    used = bins.counts > 0
    edges = torch.linspace(0, 1, len(used) + 1, dtype=torch.float64, device=used.device)
    counts = bins.counts[used]
    return Reliability(
        edges[:-1][used], edges[1:][used], counts, bins.confidence[used] / counts, bins.correct[used] / counts
    )
