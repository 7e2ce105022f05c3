"""Reports of evaluations that did not take place: consistent figures of synthetic logits."""

from __future__ import annotations

import copy
import functools
import json
import math

import torch

from jem.config import AttackConfig, EvaluateConfig, JEMConfig
from jem.evaluate import calibration, calibration_intervals, classification, ood, robustness, scores, temperature
from jem.evaluate.generation import log_marks
from jem.evaluate.intervals import bootstrap, estimate, mean_of, percentile_intervals
from jem.evaluate.robust_figures import robust_figures
from jem.evaluate.sampled import chains_section, grids, picture
from jem.randomness import generator
from jem.settings import override
from orchestrator.config import DEFAULTS

FAST = ("log_px", "max_py", "approx_mass")
FULL = (*FAST, "refine", "refine_l2", "msp", "energy", "odin", "mahalanobis", "vim", "knn")
CONVENTIONS = {
    "in-distribution": "the test split, the positive class; every score rises with it",
    "aupr": "average precision, not the trapezoids below the curve",
    "fpr95": "of a threshold that accepts 95 % of the test images",
    "ece": "20 equal-width bins; binned errors are biased upward on small test sets",
}


def made_report(suite="full", n=120, n_classes=4, sets=("interp", "uniform"), seed=0, classes=None, sharpness=3.0):
    """A report.json; equal arguments give equal reports, each a copy of its own."""
    names = tuple(classes or (str(i) for i in range(n_classes)))
    return copy.deepcopy(_made(suite, n, names, tuple(sets), seed, sharpness))


@functools.cache
def _made(suite, n, classes, sets, seed, sharpness):
    logits, labels = sampled(n, len(classes), seed, sharpness)
    fitted = temperature.fit_temperature(*sampled(n, len(classes), seed + 1, sharpness))
    scored = scored_by("test", logits, seed, 0.0, suite)
    threshold = ood.threshold_at_tpr(scores.log_px(sampled(n, len(classes), seed + 1, sharpness)[0]))
    outside = {}
    for k, name in enumerate(sets):
        other = sampled(n, len(classes), seed + 2 + k, sharpness * (0.2 + 0.6 * k / len(sets)))[0]
        outside[name] = scored_by(name, other, seed, 1.5 - k / len(sets), suite)
    report = {
        "schema": 1,
        "suite": suite,
        "model": made_model(seed),
        "data": {
            "name": "digits",
            "digest": "da7a" * 16,
            "image_shape": [1, 8, 8],
            "classes": list(classes),
            "sizes": {"train": 1294, "validation": 143, "test": n},
        },
        "settings": {"suite": suite, "noise_std": 0.0, "max_images": 10000, "sets": list(sets)},
        "facts": {"git.commit": "c0ffee" * 6 + "+", "version.torch": "2.15.0", "python": "3.11.2"},
        "conventions": CONVENTIONS,
        "temperature": fitted._asdict(),
        "threshold": {"tpr": 0.95, "log_px": threshold, "test_accepted": share(scored["log_px"] >= threshold)},
        "test": {"n": n} | classified(logits, labels),
        "test_scaled": calibrated(logits / fitted.value, labels),
        "per_class": per_class(logits, labels),
        "confusion": classification.confusion_matrix(logits, labels).tolist(),
        "reliability": {"before": diagram(logits, labels), "after": diagram(logits / fitted.value, labels)},
        "ood": {name: entry(scored, others, threshold, suite) for name, others in outside.items()},
        "histograms": histograms(scored, outside) if suite == "full" else {},
        "roc": {name: curves(scored, others) for name, others in outside.items()} if suite == "full" else {},
        "left_out": {} if suite == "full" else {"rot90": "not in the suite fast"},
        "seconds": 12.5,
    }
    report["metrics"] = {f"test/{key}": v[0] for key, v in report["test"].items() if key != "n"}
    if suite == "full":
        report |= attacked(seed) | with_samples(seed)
    return json.loads(json.dumps(without_nan(report), allow_nan=False))


def made_model(seed):
    config = DEFAULTS | {"seed": seed, "model.name": "small_conv", "data.name": "digits", "data.noise_std": 0.1}
    return {
        "source": "runs:/0123456789abcdef",
        "name": f"digits-{seed}",
        "digest": f"{seed:02x}beef" + "ab" * 29,
        "step": 1500,
        "weights": "ema",
        "parameters": 123456,
        "checkpoint": "/runs/digits/checkpoints/00001500",
        "config": config,
    }


def sampled(n, n_classes, seed, sharpness):
    draws = generator("cpu", "made", seed)
    labels = torch.arange(n) % n_classes
    logits = torch.randn(n, n_classes, generator=draws, dtype=torch.float64) * 1.5
    logits[torch.arange(n), labels] += sharpness
    return logits * 1.3, labels


def scored_by(name, logits, seed, shift, suite):
    draws = generator("cpu", "made", name, seed)
    found = {"log_px": scores.log_px(logits), "max_py": scores.max_py(logits)}
    for k, score in enumerate(FAST[2:] if suite == "fast" else FULL[2:]):
        found[score] = torch.randn(len(logits), generator=draws, dtype=torch.float64) - shift * k / 4
    return found


def drawn(seed=0):
    return generator("cpu", "made", "bootstrap", seed)


def classified(logits, labels):
    return classification.with_intervals(logits, labels, drawn()) | calibrated(logits, labels)


def calibrated(logits, labels):
    return calibration_intervals.with_intervals(logits, labels, drawn())


def per_class(logits, labels):
    support = classification.confusion_matrix(logits, labels).sum(dim=1).tolist()
    return {"support": support} | classification.per_class_intervals(logits, labels, drawn())


def diagram(logits, labels):
    found = calibration.reliability(calibration.confidence_bins(logits, labels))
    return {key: value.tolist() for key, value in found._asdict().items()}


def entry(inside, outside, threshold, suite):
    found = {score: separated(inside[score], outside[score]) for score in inside}
    if suite == "fast":
        found = {score: {"auroc": figures["auroc"]} for score, figures in found.items()}
    below = outside["log_px"] < threshold
    return {"n": len(below), "how": "made of nothing, as they are", "called_outside": share(below), "scores": found}


def share(hit):
    mean = mean_of(hit.double())
    return percentile_intervals(estimate(mean, (len(hit),)), bootstrap(mean, (len(hit),), drawn()))[0]


def separated(inside, outside):
    """`ood.with_intervals` of fewer resamples."""
    values = torch.tensor(list(ood.figures(inside, outside).values()))
    samples = bootstrap(ood.statistic(inside, outside), (len(inside), len(outside)), drawn(), 100)
    return dict(zip(ood.METRICS, percentile_intervals(values.double(), samples), strict=True))


def histograms(inside, outside):
    found = {}
    for score in FAST:
        by_set = {"test": inside[score]} | {name: others[score] for name, others in outside.items()}
        edges = torch.linspace(min(map(torch.min, by_set.values())), max(map(torch.max, by_set.values())), 41).double()
        counts = {name: torch.histogram(values, edges).hist.tolist() for name, values in by_set.items()}
        found[score] = {"edges": edges.tolist(), "counts": counts}
    return found


def curves(inside, outside):
    found = {score: ood.roc(inside[score], outside[score]) for score in inside}
    return {score: {"fpr": curve.fpr.tolist(), "tpr": curve.tpr.tolist()} for score, curve in found.items()}


def made_against(first, second):
    """An against.json of two reports; the difference's interval as if they were independent."""
    rows = []
    for group, part, keys in (
        ("classification", "test", ("accuracy",)),
        ("calibration", "test", calibration_intervals.METRICS),
        ("after temperature", "test_scaled", calibration_intervals.METRICS),
    ):
        for key in keys:
            rows.append(
                row(group, key, "higher" if key == "accuracy" else "lower", first[part][key], second[part][key])
            )
    for name, found in first["ood"].items():
        for score, figures in found["scores"].items():
            other = second["ood"][name]["scores"][score]
            rows.append(row("ood", f"ood/{name}/{score}/auroc", "higher", figures["auroc"], other["auroc"]))
    models = [{key: one["model"][key] for key in ("name", "source", "digest")} for one in (first, second)]
    return {"schema": 1, "models": models, "rows": rows}


def row(group, metric, better, a, b):
    difference = [a[0] - b[0], a[1] - b[2], a[2] - b[1]]
    return {"group": group, "metric": metric, "better": better, "values": [a, b], "difference": difference}


def made_card(report):
    """A model.json of the model of a report."""
    return {
        "config": report["model"]["config"],
        "image_shape": report["data"]["image_shape"],
        "classes": report["data"]["classes"],
        "temperature": report["temperature"]["value"],
        "threshold": report["threshold"]["log_px"],
        "layout": "NHWC",
        "dtype": "uint8",
        "digest": report["model"]["digest"],
        "info": {
            "step": 1500,
            "weights": "ema",
            "data_digest": report["data"]["digest"],
            "source": "runs:/0123456789abcdef",
            "facts": report["facts"],
        },
    }


def without_nan(value):
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


ATTACKS = EvaluateConfig(suite="full", attack=AttackConfig(images=20, refine=(0, 1, 10)))


def attacked(seed):
    """The section of made norms: each image has a radius, and an attack finds it or a little more."""
    draws = generator("cpu", "made", "attacks", seed)
    parts = {}
    for k in ATTACKS.attack.refine:
        wrong = torch.arange(20) < 2
        parts[k] = {"wrong": wrong.float(), "unbounded": torch.ones(20)}
        for norm, scale in (("linf", 0.15), ("l2", 1.0)):
            radius = scale * (0.2 + torch.rand(20, generator=draws)) * (1 + k / 20)
            for i, name in enumerate(robustness.attacks_of(norm, k, "full")):
                found = radius * (1 + 0.1 * i)
                found[-1] = math.inf  # one that nothing breaks
                parts[k][f"{norm}/{name}"] = torch.where(wrong, 0.0, found)
    return {"robust": robust_figures(parts, ATTACKS, JEMConfig(seed=0))}


def with_samples(seed):
    """Sections and grids of noise."""
    draws = generator("cpu", "made", "samples", seed)
    images = torch.randint(0, 256, (100, 1, 8, 8), generator=draws).to(torch.uint8)
    config = override(JEMConfig(seed=0), {"sgld.steps": 10})
    marks = log_marks(200)
    rows = torch.rand(4, len(marks), 5, generator=draws)
    figures = {"fid": 3.25, "kid": 0.125, "kid_std": 0.01, "is": 6.5, "precision": 0.75, "recall": 0.25}
    one = {"n": 100, "how": "made of noise", "figures": figures, "nearest": {"median": 1.5, "of_test": 1.25}}
    return {
        "gen": {
            "extractor": {"name": "lenet", "of": "digits", "sha256": "ab12cd34" * 8},
            "reference": {"split": "train", "n": 1294},
            "samplers": {"fresh": one, "buffer": one, "test": one},
        },
        "chains": chains_section(rows, marks, config, torch.linspace(-3, -1, 50)),
        "distal": {"reached": [True, False], "steps": [4, 1000], "p": [0.93, 0.4], "target": 0.9},
        "grids": {
            **grids({"fresh": (2 * images.float() / 255 - 1, "made of noise")}, images),
            "adversarials": picture(images[:9], "images and [adversarials]", 3),
            "distal": picture(images[:2], "from noise"),
        },
    }
