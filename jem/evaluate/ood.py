"""How well a score tells in-distribution images from others.

In-distribution is the positive class throughout, and scores rise with it. Of a threshold t, the images accepted are
those with a score of t or more; TPR is the share of in-distribution images accepted, FPR that of the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jem.errors import DivergedError
from jem.evaluate.intervals import Interval, Statistic, bootstrap, percentile_intervals

METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95")


def auroc(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> float:
    """The chance that an in-distribution score exceeds an outside one, ties counting half.

    Raises DivergedError if a score is not finite.
    """
    from sklearn.metrics import roc_auc_score  # it takes as long as torch to import: here no start waits for it

    scores = checked(inside, outside)
    positive = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    return float(roc_auc_score(positive.numpy(), scores.numpy()))


def aupr_in(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> float:
    """Average precision with in-distribution as the positive class: sum_t (TPR_t - TPR_{t-1}) precision_t.

    scikit-learn's `average_precision_score`; not the trapezoids under the curve (as in pytorch-ood), which
    interpolate where precision is not linear. A score that tells nothing has n / (n + m).
    """
    return figures(inside, outside)["aupr_in"]


def aupr_out(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> float:
    """Average precision with the others as the positive class, found by low scores: see `aupr_in`."""
    return figures(inside, outside)["aupr_out"]


def fpr95(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> float:
    """FPR at the highest threshold that is a score and has a TPR of 0.95 or more; lower is better."""
    return figures(inside, outside)["fpr95"]


def threshold_at_tpr(inside: Float[Tensor, " n"], tpr: float = 0.95) -> float:
    """The highest score t of `inside` such that a share of `tpr` or more of them is t or higher."""
    scores = checked(inside, inside)[: len(inside)].sort(descending=True).values
    accepted = torch.arange(1, len(scores) + 1, dtype=torch.float64) / len(scores)
    return scores[int((accepted >= tpr).int().argmax())].item()


def figures(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> dict[str, float]:
    """All `METRICS`. Raises DivergedError if a score is not finite, ValueError if a set is empty."""
    ones = (torch.ones(1, len(scores), dtype=torch.float64) for scores in (inside, outside))
    found = dict(zip(METRICS, statistic(inside, outside)(*ones)[0].tolist(), strict=True))
    return found | {"auroc": auroc(inside, outside)}  # equal but for the last digits, which are published


def with_intervals(
    inside: Float[Tensor, " n"], outside: Float[Tensor, " m"], generator: torch.Generator
) -> dict[str, Interval]:
    """All `METRICS` with 95 % percentile bootstrap intervals, both sets resampled, each with its own size.

    A perfect separation gives intervals without width: see `intervals.percentile_intervals`.
    """
    values = torch.tensor([figures(inside, outside)[name] for name in METRICS], dtype=torch.float64)
    samples = bootstrap(statistic(inside, outside), (len(inside), len(outside)), generator)
    return dict(zip(METRICS, percentile_intervals(values, samples), strict=True))


def statistic(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> Statistic:
    """Counts [r, n] and [r, m] of the two sets to all `METRICS`, [r, 4]."""
    # the highest score first; ties are a group
    levels, group = (-checked(inside, outside)).unique(return_inverse=True)  # type: ignore[no-untyped-call]

    def function(counts_in: Tensor, counts_out: Tensor) -> Tensor:
        none = counts_in.new_zeros(len(counts_in), len(levels))
        positive = none.index_add(1, group[: len(inside)], counts_in)
        negative = none.index_add(1, group[len(inside) :], counts_out)
        n, m = positive.sum(dim=1), negative.sum(dim=1)
        tp, fp = positive.cumsum(dim=1), negative.cumsum(dim=1)
        reached = (tp / n[:, None] >= 0.95).int().argmax(dim=1, keepdim=True)
        columns = [
            (negative * (tp - positive / 2)).sum(dim=1) / (n * m),
            average_precision(positive, negative),
            average_precision(negative.flip(1), positive.flip(1)),
            fp.gather(1, reached)[:, 0] / m,
        ]
        return torch.stack(columns, dim=1)

    return function


def average_precision(positive: Float[Tensor, "r g"], negative: Float[Tensor, "r g"]) -> Float[Tensor, " r"]:
    """Of images counted by groups of equal score, the most positive first."""
    tp, fp = positive.cumsum(dim=1), negative.cumsum(dim=1)
    precision = tp / (tp + fp).clamp(min=1)  # 0 / 0 in groups before the first that a resample holds
    return (positive * precision).sum(dim=1) / positive.sum(dim=1)


class Roc(NamedTuple):
    """The ROC curve from (0, 0) to (1, 1): a point for each score that occurs, the highest first. float64."""

    fpr: Tensor
    tpr: Tensor
    thresholds: Tensor  # one fewer: nothing is accepted at (0, 0)


def roc(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> Roc:
    scores = checked(inside, outside)
    levels, group = (-scores).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    parts = (group[len(inside) :], group[: len(inside)])
    counts = [torch.bincount(part, minlength=len(levels)).cumsum(0).double() for part in parts]
    fpr, tpr = (torch.cat([part.new_zeros(1), part / part[-1]]) for part in counts)
    return Roc(fpr, tpr, -levels)


def checked(inside: Tensor, outside: Tensor) -> Float[Tensor, " n_and_m"]:
    """Both sets' scores in float64 on the CPU, if they can be compared."""
    if not len(inside) or not len(outside):
        raise ValueError(f"AUROC: {len(inside)} in-distribution scores and {len(outside)} others; both are needed")
    scores = torch.cat([inside, outside]).double().cpu()
    if not scores.isfinite().all():
        raise DivergedError("AUROC: a score is not finite; the model diverged, use an earlier checkpoint")
    return scores
