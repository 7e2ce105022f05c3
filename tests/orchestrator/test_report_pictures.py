"""An evaluation as pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from made_reports import made_against, made_report
from PIL import Image

from orchestrator.report_pictures import (
    against_picture,
    against_reliability,
    aurocs,
    confusion,
    histograms,
    picture_names,
    pictures,
    reliability,
    roc,
)

EIGHT = ("interp", "uniform", "gaussian", "constant", "rot90", "mnist", "textures", "/a/path/of_$5/images$" + "x" * 200)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def drawn(png):
    """The share of the picture that is not its background, once it is a valid one."""
    found = pixels(png)
    return (found != 255).any(axis=2).mean()


def redrawn(png, other):
    """Whether two pictures differ in more than a few pixels."""
    a, b = pixels(png), pixels(other)
    return a.shape != b.shape or (a != b).any(axis=2).sum() > 50


@pytest.fixture(scope="module")
def full():
    return pictures(made_report())


def test_the_full_suite_has_all_pictures(full):
    names = ["reliability", "confusion", "ood", "roc", "histograms", "robustness", "chains"]
    names += ["samples_fresh", "neighbours_fresh", "adversarials", "distal"]
    assert list(full) == [f"{name}.png" for name in names]
    assert picture_names(made_report()) == list(full)
    for name, png in full.items():
        assert png.startswith(b"\x89PNG")
        assert drawn(png) > 0.02, name


def test_the_fast_suite_has_what_it_measured():
    report = made_report("fast", sets=("interp",))
    assert list(pictures(report)) == picture_names(report) == ["reliability.png", "confusion.png", "ood.png"]


def test_what_was_not_measured_is_not_drawn():
    assert list(pictures(made_report("fast", sets=()))) == ["reliability.png", "confusion.png"]


def test_equal_reports_give_equal_pictures(full):
    assert pictures(made_report()) == full


@pytest.mark.parametrize(
    ("draw", "change"),
    [
        (reliability, lambda r: r["reliability"]["before"]["accuracy"].__setitem__(-1, 0.1)),
        (reliability, lambda r: r["reliability"]["after"]["counts"].__setitem__(-1, 9.0)),
        (reliability, lambda r: r["test"].update(ece=[0.9, 0.8, 1.0])),
        (reliability, lambda r: r["temperature"].update(value=9.5)),
        (confusion, lambda r: r["confusion"][0].__setitem__(1, 25)),
        (aurocs, lambda r: r["ood"]["interp"]["scores"]["knn"].update(auroc=[0.3, 0.2, 0.4])),
        (roc, lambda r: r["roc"]["uniform"]["log_px"].update(fpr=[0, 1, 1], tpr=[0, 0, 1])),
        (histograms, lambda r: r["histograms"]["max_py"]["counts"]["uniform"].__setitem__(3, 99.0)),
        (histograms, lambda r: r["threshold"].update(log_px=5.0)),
    ],
)
def test_a_picture_shows_its_figures(draw, change):
    report = made_report()
    change(report)
    assert redrawn(draw(report), draw(made_report()))


def test_roc_shows_the_best_baseline_only(full):
    report = made_report()
    scores = report["ood"]["interp"]["scores"]
    best = max((s for s in ("msp", "energy", "odin", "mahalanobis", "vim", "knn")), key=lambda s: scores[s]["auroc"][0])
    worse = "msp" if best != "msp" else "energy"
    report["roc"]["interp"][worse].update(fpr=[0, 1, 1], tpr=[0, 0, 1])
    assert roc(report) == full["roc.png"]
    report["roc"]["interp"][best].update(fpr=[0, 1, 1], tpr=[0, 0, 1])
    assert redrawn(roc(report), full["roc.png"])


def test_counts_are_written_for_few_classes_and_not_for_many():
    """Counts of twice the images change no colour, so a picture that changes has numbers."""
    for n_classes, written in ((20, True), (21, False)):
        report = made_report("fast", n_classes=n_classes, sets=())
        before = confusion(report)
        report["confusion"] = [[2 * count for count in row] for row in report["confusion"]]
        assert redrawn(confusion(report), before) == written


def test_a_class_without_images_is_no_error():
    report = made_report("fast", sets=())
    report["confusion"][2] = [0, 0, 0, 0]
    assert drawn(confusion(report)) > 0.02


def test_undefined_and_missing_figures_are_no_error():
    report = made_report()
    plain = pictures(report)
    scores = report["ood"]["interp"]["scores"]
    scores["log_px"]["auroc"], scores["max_py"]["auroc"], scores["refine"]["auroc"] = (
        [None] * 3,
        None,
        [0.5, None, None],
    )
    for score in ("msp", "energy", "odin", "mahalanobis", "vim", "knn"):
        del scores[score]
    del report["histograms"]["max_py"]["counts"]["uniform"]
    report["test"]["ece"] = None
    report["model"]["name"] = report["model"]["step"] = None
    for name, png in pictures(report).items():
        assert redrawn(png, plain[name]), name


def test_an_interval_need_not_hold_its_figure():
    report = made_report("fast")
    report["ood"]["interp"]["scores"]["log_px"]["auroc"] = [0.5, 0.6, 0.7]
    assert drawn(aurocs(report)) > 0.02


@pytest.mark.parametrize("classes", [2, 100])
def test_two_and_a_hundred_classes_and_eight_sets_stay_pictures_of_a_size(classes):
    report = made_report("full", n=200, n_classes=classes, sets=EIGHT)
    for name, png in pictures(report).items():
        assert drawn(png) > 0.02, name
        assert max(pixels(png).shape) < 2000, name


NAMES = ("$x$", "$5 and $6", "_hidden", "日本語", "a\nb\tc", "{x} \\frac %s", "x" * 500, "")


def test_names_are_drawn_as_they_are():
    """Neither a formula nor a warning (which fails a test here), and no picture as wide as a name is long."""
    report, other = (made_report(classes=NAMES, sets=NAMES[:-1], seed=seed) for seed in (0, 1))
    report["model"]["name"] = NAMES[0]
    found = [*pictures(report).values(), against_picture(made_against(report, other))]
    for name in NAMES[1:]:
        report["model"]["name"], report["data"]["name"] = name or None, name
        found.append(confusion(report))
    assert all(drawn(png) > 0.02 and max(pixels(png).shape) < 2000 for png in found)


def test_two_models_in_one_picture_show_both_and_which_differences_are_sure():
    a, b = made_report("fast"), made_report("fast", seed=5)
    against = made_against(a, b)
    plain = against_picture(against)
    assert drawn(plain) > 0.02
    for model in (0, 1):
        changed = made_against(a, b)
        changed["rows"][-1]["values"][model] = [0.99, 0.98, 1.0]
        assert redrawn(against_picture(changed), plain)
    sure = made_against(a, b)
    for row in sure["rows"]:
        row["difference"] = [0.1, 0.05, 0.2]
    assert redrawn(against_picture(sure), plain), "a mark"
    undefined = made_against(a, b)
    for row in undefined["rows"]:
        row["values"] = [None, [None, None, None]]
    assert redrawn(against_picture(undefined), plain)


def test_two_models_without_outliers_are_compared_too():
    a, b = made_report("fast", sets=()), made_report("fast", sets=(), seed=5)
    assert drawn(against_picture(made_against(a, b))) > 0.02


def test_the_diagrams_of_two_models_show_both():
    a, b = made_report("fast"), made_report("fast", seed=5)
    both = against_reliability(a, b)
    assert drawn(both) > 0.02
    assert redrawn(both, against_reliability(a, a))
    assert redrawn(both, against_reliability(b, b))
