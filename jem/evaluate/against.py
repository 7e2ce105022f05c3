"""Two models on the same images, side by side: the differences are paired, image by image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from jem.energy import Logits
from jem.errors import ConfigError
from jem.evaluate import calibration_intervals, ood
from jem.evaluate.evaluate import BATCH
from jem.evaluate.intervals import Statistic, bootstrap, estimate, mean_of, percentile_intervals
from jem.evaluate.measured import Measured
from jem.evaluate.report import SCHEMA, plain
from jem.evaluate.robust_figures import beyond, wilson
from jem.randomness import generator

BINNED = ("ece", "ece_equal_mass", "mce", "ece_classwise")
"""Their differences have no interval: each figure is biased upward by an amount that depends on how a model's
confidences are spread, so that resampling would be sure of a difference that is not the models'."""

Report = Mapping[str, Any]


def against(first: tuple[Report, Measured], second: tuple[Report, Measured]) -> dict[str, Any]:
    """Both models' figures, and the first's minus the second's with a paired 95 % bootstrap interval.

    Raises ConfigError if they were evaluated on different images.
    """
    reports, outputs = (first[0], second[0]), (first[1], second[1])
    one, other = (report["data"] for report in reports)
    if one["digest"] != other["digest"] or not torch.equal(*(out.labels["test"] for out in outputs)):
        raise ConfigError(
            f"--against: the models are of different data ({one['name']}, digest {one['digest'][:12]}; "
            f"{other['name']}, digest {other['digest'][:12]}); both must have the same test images"
        )
    models = [{key: report["model"][key] for key in ("name", "source", "digest")} for report in reports]
    rows = [*_of_test(reports, outputs), *_of_outliers(reports, outputs), *_of_attacks(reports, outputs)]
    return {"schema": SCHEMA, "models": models, "rows": rows}


def _of_test(reports: tuple[Report, ...], outputs: tuple[Measured, ...]) -> Iterator[dict[str, Any]]:
    labels = outputs[0].labels["test"]
    logits = [out.logits["test"] for out in outputs]
    scaled = [f.double() / r["temperature"]["value"] for f, r in zip(logits, reports, strict=True)]
    right = [mean_of((f.argmax(dim=1) == labels).double()[:, None]) for f in logits]
    yield from _rows("classification", "test", ["accuracy"], reports, right, (len(labels),), "higher")
    for group, part, of_model in (("calibration", "test", logits), ("after temperature", "test_scaled", scaled)):
        statistics = [calibration_intervals.statistic(f, labels) for f in of_model]
        metrics = list(calibration_intervals.METRICS)
        yield from _rows(group, part, metrics, reports, statistics, (len(labels),), "lower")


def _of_outliers(reports: tuple[Report, ...], outputs: tuple[Measured, ...]) -> Iterator[dict[str, Any]]:
    first, second = outputs
    for name in (n for n in first.outliers if n in second.scores):
        same_size = len(first.scores[name]["log_px"]) == len(second.scores[name]["log_px"])
        for score in (s for s in first.scores[name] if s in second.scores[name] and same_size):
            statistics = [_auroc_of(out.scores["test"][score], out.scores[name][score]) for out in outputs]
            sizes = (len(first.labels["test"]), len(first.scores[name][score]))
            values = [report["ood"][name]["scores"][score]["auroc"] for report in reports]
            yield _row("ood", f"ood/{name}/{score}/auroc", values, statistics, sizes, "higher", 0)


def _of_attacks(reports: tuple[Report, ...], outputs: tuple[Measured, ...]) -> Iterator[dict[str, Any]]:
    """Accuracy under the strongest attack, of the models that refine alike; none if other images were attacked."""
    labels = [out.attacked.get("images", torch.zeros(0)) for out in outputs]
    if any("robust" not in report for report in reports) or not torch.equal(*labels):
        return
    for k in (k for k in reports[0]["robust"]["k"] if k in reports[1]["robust"]["k"]):
        for norm, one in reports[0]["robust"]["k"][k]["norms"].items():
            sections = [one, reports[1]["robust"]["k"][k]["norms"][norm]]
            found = [
                torch.tensor([math.inf if v is None else v for v in section["found"]["worst"]], dtype=torch.float64)
                for section in sections
            ]
            for eps in (eps for eps in one["eps"] if eps in sections[1]["eps"]):
                values = [section["accuracy"]["worst"][section["eps"].index(eps)] for section in sections]
                statistics = [mean_of(beyond(norms, eps).double()[:, None]) for norms in found]
                name = f"robust{f'_k{k}' if k != '0' else ''}/{norm}/{eps:g}/worst/accuracy"
                yield _row("robust", name, values, statistics, (len(found[0]),), "higher", 0)


def transfer(
    logits: tuple[Logits, Logits], outputs: tuple[Measured, Measured], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Each model's accuracy on adversarials that were made on the other, JEM-0: {norm: {eps, b_on_a, a_on_b}}.

    Those of PGD at each eps, whether or not they fool the model that they were made on. The networks take float32,
    on `device`.
    """
    found: dict[str, Any] = {}
    for name in (name for name in outputs[1].attacked if "/transfer/" in name and name in outputs[0].attacked):
        _, norm, _, eps = name.split("/")
        section = found.setdefault(norm, {"eps": [], "b_on_a": [], "a_on_b": []})
        section["eps"].append(float(eps))
        for way, model, maker in (("b_on_a", 0, 1), ("a_on_b", 1, 0)):
            attacked = outputs[maker].attacked
            images = attacked[name].view_as(attacked["images"]).float()
            with torch.no_grad():
                parts = [
                    logits[model]((2 * part - 1).to(device)).argmax(dim=1).cpu() for part in torch.split(images, BATCH)
                ]
            answers = torch.cat(parts)
            section[way].append(wilson(int((answers == attacked["labels"]).sum()), len(answers)))
    return found


def transfer_metrics(section: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`robust/<norm>/<eps>/transfer/accuracy` of the first model, attacked on the second."""
    for norm, found in section.items():
        for eps, value in zip(found["eps"], found["b_on_a"], strict=True):
            yield f"robust/{norm}/{eps:g}/transfer/accuracy", value[0]


def _auroc_of(inside: Tensor, outside: Tensor) -> Statistic:
    statistic = ood.statistic(inside, outside)
    return lambda *counts: statistic(*counts)[:, :1]


def _rows(
    group: str,
    part: str,
    metrics: list[str],
    reports: tuple[Report, ...],
    statistics: list[Statistic],
    sizes: tuple[int, ...],
    better: str,
) -> Iterator[dict[str, Any]]:
    for column, metric in enumerate(metrics):
        values = [report[part][metric] for report in reports]
        yield _row(group, metric, values, statistics, sizes, better, column)


def _row(
    group: str,
    metric: str,
    values: list[Any],
    statistics: list[Statistic],
    sizes: tuple[int, ...],
    better: str,
    column: int,
) -> dict[str, Any]:
    def difference(*counts: Tensor) -> Tensor:
        one, other = (statistic(*counts)[:, column] for statistic in statistics)
        return (one - other)[:, None]

    draws = bootstrap(difference, sizes, generator("cpu", "bootstrap", "against", group, metric))
    (interval,) = percentile_intervals(estimate(difference, sizes), draws)
    found = plain(interval)
    if metric in BINNED:
        found = [found[0], None, None]
    return {"group": group, "metric": metric, "better": better, "values": values, "difference": found}
