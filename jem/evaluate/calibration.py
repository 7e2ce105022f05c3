"""Whether a confidence of 0.8 is right 80 times in a hundred."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jem.errors import DivergedError


class Bins(NamedTuple):
    """Predictions by confidence, in float64; those of two parts of a data set add up to the whole's."""

    counts: Float[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]  # sum of confidences
    correct: Float[Tensor, " bins"]  # number of right predictions


def confidence_bins(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], n_bins: int = 20) -> Bins:
    """Sort predictions into `n_bins` equal-width bins of the top class' probability.

    Bin b holds ((b) / n, (b + 1) / n]; a confidence of exactly 1 is in the last (Guo et al., 2017, eq. 2
    and 3; 20 bins as Grathwohl et al., 2020). Raises DivergedError if a logit is NaN.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    if confidence.isnan().any():
        raise DivergedError("calibration: the model's probabilities hold NaN; it diverged, use an earlier checkpoint")
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=logits.device)
    index = torch.bucketize(confidence, edges[1:-1])
    correct = (predicted == labels).double()
    empty = torch.zeros(n_bins, dtype=torch.float64, device=logits.device)
    return Bins(
        empty.index_add(0, index, torch.ones_like(confidence)),
        empty.index_add(0, index, confidence),
        empty.index_add(0, index, correct),
    )


def ece(bins: Bins) -> float:
    """Expected calibration error: mean |accuracy - confidence| of the bins, weighted by their sizes."""
    return ((bins.correct - bins.confidence).abs().sum() / bins.counts.sum()).item()
