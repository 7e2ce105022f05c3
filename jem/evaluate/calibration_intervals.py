"""The calibration of one test set, each figure with its bootstrap interval."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor

from jem.evaluate import calibration, classification
from jem.evaluate.calibration import N_BINS, bin_index, confidences, share_out
from jem.evaluate.intervals import Interval, Statistic, bootstrap, mean_of, percentile_intervals, reflected_intervals

METRICS = ("ece", "ece_equal_mass", "mce", "ece_classwise", "brier", "nll")


def figures(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], n_bins: int = N_BINS) -> dict[str, float]:
    """All `METRICS` of a data set: lower is better, 0 is perfect."""
    bins = calibration.confidence_bins(logits, labels, n_bins)
    return {
        "ece": calibration.ece(bins),
        "ece_equal_mass": calibration.ece_equal_mass(logits, labels, n_bins),
        "mce": calibration.mce(bins),
        "ece_classwise": calibration.ece_classwise(logits, labels, n_bins),
        "brier": classification.brier(logits, labels),
        "nll": classification.nll(logits, labels),
    }


def with_intervals(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], generator: torch.Generator, n_bins: int = N_BINS
) -> dict[str, Interval]:
    """All `METRICS` with 95 % bootstrap intervals: reflected for the binned errors, percentile for Brier and NLL.

    Binned errors are biased upward, the more so the fewer images and the better calibrated the model: simulated with
    10 classes, one of ECE .10 is measured as .12 on 360 images, and its interval held the truth in 92 % of the data
    sets (the percentile interval in 65 %); a perfect one is measured as .06. `mce` and `ece_classwise` are worse:
    compare them between models on the same images, and read nothing into their size.
    """
    logits, labels = logits.cpu(), labels.cpu()
    values = torch.tensor(list(figures(logits, labels, n_bins).values()), dtype=torch.float64)
    samples = bootstrap(statistic(logits, labels, n_bins), (len(labels),), generator)
    binned = reflected_intervals(values[:4], samples[:, :4])
    return dict(zip(METRICS, binned + percentile_intervals(values[4:], samples[:, 4:]), strict=True))


def statistic(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], n_bins: int = N_BINS) -> Statistic:
    """Counts [r, n] to all `METRICS`, [r, 6]."""
    confidence, correct = confidences(logits, labels)
    p = classification.probabilities(logits)
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    brier_nll = mean_of(torch.stack([classification.brier_scores(logits, labels), losses], dim=1))
    index = bin_index(confidence, n_bins)
    gaps, ones = in_bins(correct - confidence, index, n_bins), in_bins(torch.ones_like(confidence), index, n_bins)
    by_class = [((labels == y).double() - py, bin_index(py, n_bins)) for y, py in enumerate(p.T.contiguous())]

    def function(counts: Tensor) -> Tensor:
        total = counts.sum(dim=1)
        gap, mass = (counts @ gaps).abs(), counts @ ones
        adaptive = share_out(confidence, correct, counts, n_bins)
        classwise = sum((counts @ in_bins(*of_class, n_bins)).abs().sum(dim=1) for of_class in by_class) / len(by_class)
        columns = [
            gap.sum(dim=1) / total,
            (adaptive.correct - adaptive.confidence).abs().sum(dim=1) / total,
            (gap / mass).nan_to_num(0).amax(dim=1),
            classwise / total,
        ]
        return torch.cat([torch.stack(columns, dim=1), brier_nll(counts)], dim=1)

    return function


def in_bins(values: Float[Tensor, " n"], index: Int[Tensor, " n"], n_bins: int) -> Float[Tensor, "n bins"]:
    """Each value in the column of its bin: counts @ this are the sums over each bin."""
    return values.new_zeros(len(values), n_bins).scatter(1, index[:, None], values[:, None])
