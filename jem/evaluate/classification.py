"""How well p(y|x) names the class.

Precision, recall and F1 of a class that gives them nothing to divide by are NaN: undefined, neither 0 nor 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor

from jem.errors import DivergedError
from jem.evaluate.intervals import Interval, Statistic, bootstrap, estimate, mean_of, percentile_intervals


def accuracy(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """The share of images whose most probable class is the right one; the first class wins a tie."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def nll(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """Mean -log p(y|x), in nats."""
    return F.cross_entropy(logits.double(), labels).item()


def brier(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """Mean squared distance of p(.|x) from the right answer, 0 to 2: see `brier_scores`."""
    return brier_scores(logits, labels).mean().item()


def brier_scores(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """sum_y (p(y|x) - [y is right])^2 of each image, over all classes (Brier, 1950), so 0 to 2, not to 1."""
    p = probabilities(logits)
    return (p - F.one_hot(labels, p.shape[1])).square().sum(dim=1)


def probabilities(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """p(y|x) in float64. Raises DivergedError if one is NaN."""
    p = logits.double().softmax(dim=1)
    if p.isnan().any():
        raise DivergedError("the model's probabilities hold NaN; it diverged, use an earlier checkpoint")
    return p


def confusion_matrix(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Int[Tensor, "c c"]:
    """Images by their right class (row) and the most probable one (column)."""
    n_classes = logits.shape[1]
    predicted = probabilities(logits).argmax(dim=1)
    return torch.bincount(labels * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)


class PerClass(NamedTuple):
    """Figures of each class, [..., c], of confusion matrices [..., c, c]."""

    support: Tensor  # images of the class
    accuracy: Tensor  # share of all images on which "is it this class?" is answered right
    precision: Tensor  # of those called the class, the share that is
    recall: Tensor  # of those that are the class, the share that is called it
    f1: Tensor  # harmonic mean of the two: 2 tp / (2 tp + fp + fn)


def per_class(confusion: Tensor) -> PerClass:
    """One class against the rest, for each class."""
    matrix = confusion.double()
    return _rates(matrix.diagonal(dim1=-2, dim2=-1), matrix.sum(dim=-1), matrix.sum(dim=-2))


def _rates(hit: Tensor, actual: Tensor, called: Tensor) -> PerClass:
    """Of each class's images called it, all of its images, and all called it; [..., c]."""
    total = actual.sum(dim=-1, keepdim=True)
    right = (total - actual - called + 2 * hit) / total
    return PerClass(actual, right, hit / called, hit / actual, 2 * hit / (actual + called))


def with_intervals(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], generator: torch.Generator
) -> dict[str, Interval]:
    """`{accuracy, nll, brier}`, each with its bootstrap interval; the figures are those of the functions above."""
    logits, labels = logits.cpu(), labels.cpu()
    probabilities(logits)
    right = (logits.argmax(dim=1) == labels).double()
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    each = mean_of(torch.stack([right, losses, brier_scores(logits, labels)], dim=1))
    values = torch.tensor([f(logits, labels) for f in (accuracy, nll, brier)], dtype=torch.float64)
    found = percentile_intervals(values, bootstrap(each, (len(labels),), generator))
    return dict(zip(("accuracy", "nll", "brier"), found, strict=True))


def per_class_intervals(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], generator: torch.Generator
) -> dict[str, list[Interval]]:
    """`{accuracy, precision, recall, f1}`, each a list with an entry a class."""
    statistic = per_class_statistic(logits.cpu(), labels.cpu())
    sizes = (len(labels),)
    values, samples = estimate(statistic, sizes), bootstrap(statistic, sizes, generator)
    found = percentile_intervals(values, samples)
    c = logits.shape[1]
    return {name: found[k * c : (k + 1) * c] for k, name in enumerate(PerClass._fields[1:])}


def per_class_statistic(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Statistic:
    """Counts [r, n] to `PerClass` without its support, [r, 4, c]."""
    predicted = probabilities(logits).argmax(dim=1)
    right = predicted == labels

    def statistic(counts: Tensor) -> Tensor:
        none = counts.new_zeros(len(counts), logits.shape[1])
        hit = none.index_add(1, labels[right], counts[:, right])
        actual, called = none.index_add(1, labels, counts), none.index_add(1, predicted, counts)
        return torch.stack(_rates(hit.double(), actual.double(), called.double())[1:], dim=1)

    return statistic
