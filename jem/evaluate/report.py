"""From an evaluation's outputs to its figures: a dictionary of plain numbers, which JSON takes as it is.

A figure with an interval is [value, low, high], the interval of 95 % bootstrapped over the images. What is
undefined is None. The draws of each figure are a stream of their own, so that it does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jem.evaluate import calibration, calibration_intervals, classification, ood
from jem.evaluate.calibration import Bins, confidence_bins, reliability
from jem.evaluate.intervals import Interval, bootstrap, mean_of, percentile_intervals
from jem.evaluate.measured import Measured
from jem.evaluate.temperature import fit_temperature
from jem.randomness import generator

SCHEMA = 1
TPR = 0.95
"""The share of validation images that the threshold of in-distribution accepts."""

CURVE_POINTS = 200
HISTOGRAM_BINS = 50

CONVENTIONS = {
    "positive class": "in-distribution, the test split; every score rises with it",
    "auroc": "the chance that an in-distribution image scores higher than another, ties counting half",
    "aupr_in, aupr_out": "average precision (no interpolation), with the images inside, or those outside, as positive",
    "fpr95": "share of the others accepted at the highest threshold that accepts 95 % of the in-distribution images",
    "ece, mce": f"{calibration.N_BINS} equal-width bins of the top class' probability, (low, high], 1.0 in the last",
    "ece_equal_mass": f"{calibration.N_BINS} bins of equal mass, ties shared",
    "ece_classwise": "mean over classes of the ECE of p(y|x)",
    "brier": "sum over classes, 0 to 2",
    "intervals": "95 %, 1000 bootstrap resamples of the images; reflected for the four binned errors. They tell of the "
    "finite test set, not of the seed",
    "small test sets": "binned errors are biased upward on them: compare models on the same images",
    "temperature, threshold": "fitted on the validation split",
}


def figures(measured: Measured, how: Mapping[str, str], suite: str) -> dict[str, Any]:
    """Everything that a report says of a model's outputs; `how` describes each set of outliers."""
    logits, labels = measured.logits["test"], measured.labels["test"]
    temperature = fit_temperature(measured.logits["validation"], measured.labels["validation"])
    threshold = ood.threshold_at_tpr(_log_px(measured.logits["validation"]), TPR)
    scaled = logits.double() / temperature.value
    test = _with_intervals(classification, logits, labels, "classification")
    test |= _with_intervals(calibration_intervals, logits, labels, "calibration")
    after = _with_intervals(calibration_intervals, scaled, labels, "calibration")
    report: dict[str, Any] = {
        "temperature": temperature._asdict(),
        "threshold": {
            "tpr": TPR,
            "log_px": threshold,
            "test_accepted": _share(measured, "test", threshold, above=True),
        },
        "test": {"n": len(labels)} | test,
        "test_scaled": after,
        "per_class": _per_class(logits, labels),
        "confusion": classification.confusion_matrix(logits, labels).tolist(),
        "reliability": {
            "before": _diagram(confidence_bins(logits, labels)),
            "after": _diagram(confidence_bins(scaled, labels)),
        },
        "ood": {name: _outside(measured, name, how[name], threshold, suite) for name in measured.outliers},
        "histograms": _histograms(measured) if suite != "fast" else {},
        "roc": {name: _curves(measured, name) for name in measured.outliers} if suite != "fast" else {},
        "left_out": measured.left_out,
        "conventions": CONVENTIONS,
    }
    return {"schema": SCHEMA, "suite": suite} | report | {"metrics": flat_metrics(report)}


def flat_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures by the names that MLflow gets, without intervals."""
    metrics = {f"test/{key}": value[0] for key, value in report["test"].items() if key != "n"}
    metrics |= {f"test_scaled/{key}": value[0] for key, value in report["test_scaled"].items()}
    metrics["val/temperature"] = report["temperature"]["value"]
    for name, found in report["ood"].items():
        for score, by_metric in found["scores"].items():
            metrics |= {f"ood/{name}/{score}/{metric}": value[0] for metric, value in by_metric.items()}
    return metrics


def _with_intervals(module: Any, logits: Tensor, labels: Tensor, stream: str) -> dict[str, list[float | None]]:
    found: dict[str, Interval] = module.with_intervals(logits, labels, generator("cpu", "bootstrap", stream))
    return {key: plain(value) for key, value in found.items()}


def _per_class(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    support = classification.confusion_matrix(logits, labels).sum(dim=1).tolist()
    found = classification.per_class_intervals(logits, labels, generator("cpu", "bootstrap", "per class"))
    return {"support": support} | {key: [plain(value) for value in values] for key, values in found.items()}


def _outside(measured: Measured, name: str, how: str, threshold: float, suite: str) -> dict[str, Any]:
    of_test, of_set = measured.scores["test"], measured.scores[name]
    shown = ood.METRICS if suite != "fast" else ("auroc",)

    def compared(score: str) -> dict[str, list[float | None]]:
        draws = generator("cpu", "bootstrap", "ood", name, score)
        found = ood.with_intervals(of_test[score], of_set[score], draws)
        return {metric: plain(found[metric]) for metric in shown}

    return {
        "n": len(of_set["log_px"]),
        "how": how,
        "called_outside": _share(measured, name, threshold, above=False),
        "scores": {score: compared(score) for score in of_set},
    }


def _share(measured: Measured, images: str, threshold: float, above: bool) -> list[float | None]:
    """The share of a set at the threshold of log p(x) or above, or below it."""
    hit = ((measured.scores[images]["log_px"] >= threshold) == above).double()
    samples = bootstrap(mean_of(hit), (len(hit),), generator("cpu", "bootstrap", "threshold", images))
    (interval,) = percentile_intervals(hit.mean()[None], samples)
    return plain(interval)


def _curves(measured: Measured, name: str) -> dict[str, Any]:
    """ROC curves, thinned evenly along the points."""
    curves = {}
    for score, outside in measured.scores[name].items():
        found = ood.roc(measured.scores["test"][score], outside)
        kept = torch.linspace(0, len(found.fpr) - 1, min(len(found.fpr), CURVE_POINTS)).round().long()
        curves[score] = {"fpr": found.fpr[kept].tolist(), "tpr": found.tpr[kept].tolist()}
    return curves


def _histograms(measured: Measured) -> dict[str, Any]:
    """Counts of each score over bins that all sets share: from the 0.5th to the 99.5th percentile, ends included."""
    found = {}
    for score in measured.scores["test"]:
        values = {name: of_set[score] for name, of_set in measured.scores.items()}
        low = min(v.quantile(0.005).item() for v in values.values())
        high = max(v.quantile(0.995).item() for v in values.values())
        edges = torch.linspace(low, high if high > low else low + 1, HISTOGRAM_BINS + 1, dtype=torch.float64)
        counts = {n: torch.histogram(v.clamp(edges[0], edges[-1]), edges).hist.tolist() for n, v in values.items()}
        found[score] = {"edges": edges.tolist(), "counts": counts}
    return found


def _diagram(bins: Bins) -> dict[str, list[float]]:
    return {key: value.tolist() for key, value in reliability(bins)._asdict().items()}


def _log_px(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=1).double()


def plain(interval: Interval) -> list[float | None]:
    """[value, low, high], with None for what is undefined: JSON has no NaN."""
    return [number if math.isfinite(number) else None for number in interval]
