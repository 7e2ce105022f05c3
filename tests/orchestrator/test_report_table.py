"""An evaluation as tables."""

from __future__ import annotations

import io
import math

import pytest
from made_reports import FULL, made_against, made_report
from rich.console import Console

from orchestrator.report_table import (
    CONVENTIONS,
    WORDS,
    interval_text,
    parts,
    sections,
    shortened,
    show_against,
    show_report,
    verdict,
)


def shown(function, content, width=120, **terminal):
    """What is printed, without the line breaks that a screen makes."""
    out = io.StringIO()
    function(content, Console(file=out, width=width, **terminal))
    return out.getvalue()


@pytest.fixture(scope="module")
def full():
    return shown(show_report, made_report())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([0.98888, 0.9781, 0.9972], "0.9889 [0.978, 0.997]"),
        ([0.0051, 0.0045, 0.0055], "0.0051 [0.0045, 0.0055]"),
        ([1.0, 1.0, 1.0], "1.0000 [1.000, 1.000]"),
        ([None, None, None], "undefined"),
        ([math.nan, 0.0, 1.0], "undefined"),
        (None, "undefined"),
        ([0.5, None, None], "0.5000 [undefined]"),
    ],
)
def test_a_figure_is_shown_with_its_interval_or_as_undefined(value, text):
    assert interval_text(value) == text


def test_a_difference_has_its_sign():
    assert interval_text([0.02, -0.01, 0.05], signed=True) == "+0.0200 [-0.010, +0.050]"


def test_every_metric_of_the_test_split_is_in_the_table_before_and_after(full):
    report = made_report()
    for key, value in report["test"].items():
        if key != "n":
            line = line_of(full, f"{WORDS[key]} ")
            assert interval_text(value) in line
            after = report["test_scaled"].get(key)
            assert (interval_text(after) if after else "the same") in line


def test_every_score_of_every_set_is_in_the_table_with_all_its_metrics(full):
    report = made_report()
    for name, entry in report["ood"].items():
        block = full.split(f"out of distribution: {name},")[1].split("out of distribution")[0]
        assert list(entry["scores"]) == list(FULL)
        assert entry["how"] in block, "what the set is"
        assert interval_text(entry["called_outside"]) in block
        for score, figures in entry["scores"].items():
            line = line_of(block, f"{score} ")
            assert [c for c in map(line.find, (interval_text(v, 3) for v in figures.values())) if c < 0] == []


def test_every_class_is_in_the_table(full):
    report = made_report(classes=("ant", "bee", "cow", "dog"))
    text = shown(show_report, report)
    for k, name in enumerate(("ant", "bee", "cow", "dog")):
        line = line_of(text, f"{name} ")
        for key in ("accuracy", "precision", "recall", "f1"):
            assert interval_text(report["per_class"][key][k], 3) in line


def test_of_many_classes_the_worst_are_shown_and_it_is_said():
    report = made_report("fast", n_classes=25, sets=())
    f1 = [parts(value)[0] for value in report["per_class"]["f1"]]
    report["per_class"]["f1"][7], report["per_class"]["precision"][7] = [None] * 3, [None] * 3
    text = shown(show_report, report)
    table = text.split("F1")[1]
    assert "10 of the lowest F1 of 25" in text
    assert "undefined" in line_of(table, "7 "), "a class that is never named is among the worst"
    best = max((k for k in range(25) if k != 7), key=f1.__getitem__)
    assert not any(line.split()[:1] == [str(best)] for line in table.splitlines() if "[" in line)


def test_it_says_which_model_and_data_and_what_the_figures_mean(full):
    report = made_report()
    for text in (
        *(report["model"][key] for key in ("name", "source", "digest")),
        *(report["data"]["digest"], "1,500", "120 images", "bootstrap"),
        *(text for pair in report["conventions"].items() for text in pair),
        f"{report['temperature']['value']:.4g}",
        f"{report['threshold']['log_px']:.6g}",
        interval_text(report["threshold"]["test_accepted"]),
    ):
        assert text in full, text


def test_a_report_without_conventions_gets_those_of_this_project():
    report = made_report("fast", sets=()) | {"conventions": {}}
    text = shown(show_report, report)
    assert all(meaning in text for meaning in CONVENTIONS.values())
    assert "positive class" in text
    assert "biased upward" in text


def test_the_fast_suite_shows_the_auroc_alone_and_what_was_left_out():
    text = shown(show_report, made_report("fast"))
    assert "AUROC" in text
    assert "AUPR" not in text.split("left out")[0].split("aupr:")[0]
    assert "left out: rot90: not in the suite fast" in text


def test_an_undefined_figure_is_called_so_and_nothing_is_lost_with_it():
    report = made_report("fast")
    report["test"]["mce"] = [None, None, None]
    report["ood"]["interp"]["scores"]["log_px"]["auroc"] = None
    report["model"]["step"] = report["model"]["name"] = None
    text = shown(show_report, report)
    assert "undefined" in line_of(text, "MCE ")
    assert "undefined" in line_of(text.split("interp")[1], "log_px ")
    assert "unknown step" in text


@pytest.mark.parametrize("width", [100, 80, 40])
def test_nothing_is_cut_off_on_a_narrow_screen(width):
    """Nor without a terminal, where rich takes the screen for 80 wide."""
    report = made_report(
        classes=("ant", "a class with a name as long as the screen, or longer than that", "cow", "dog")
    )
    text = shown(show_report, report, width)
    assert "…" not in text
    assert report["data"]["classes"][1] in text
    assert report["model"]["digest"] in text
    for entry in report["ood"].values():
        for figures in entry["scores"].values():
            for value in figures.values():
                middle, interval = interval_text(value, 3).split(" ", 1)
                assert middle in text
                assert interval in text


def test_tables_of_the_full_suite_fit_100_columns():
    lines = shown(show_report, made_report(), 100).splitlines()
    assert max(len(line) for line in lines if line.count(" [") > 2) <= 100, "figures and intervals on one line"


def test_names_are_no_markup():
    report = made_report("fast", classes=("[red]", "[/]", ":smile:", "[0, 1]"))
    report["model"]["name"] = "[bold]x"
    text = shown(show_report, report, force_terminal=True, color_system="truecolor")
    for name in ("[red]", "[/]", ":smile:", "[0, 1]", "[bold]x"):
        assert name in text


def test_two_models_are_side_by_side_with_their_difference():
    a, b = made_report("fast"), made_report("fast", seed=5)
    against = made_against(a, b)
    text = shown(show_against, against)
    for one in (a, b):
        assert one["model"]["name"] in text
        assert one["model"]["digest"] in text
    for title, rows in sections(against["rows"]).items():
        block = text.split(f"\n{title} ")[1].split("\n\n")[0]
        for label, row in rows:
            digits = 3 if row["group"] == "ood" else 4
            line = line_of(block, f"{label} ")
            for value in row["values"]:
                assert interval_text(value, digits) in line
            assert interval_text(row["difference"], digits, signed=True) in line


@pytest.mark.parametrize(
    ("difference", "better", "who"),
    [
        ([0.1, 0.05, 0.2], "higher", "A"),
        ([0.1, 0.05, 0.2], "lower", "B"),
        ([-0.1, -0.2, -0.05], "higher", "B"),
        ([-0.1, -0.2, -0.05], "lower", "A"),
        ([0.1, -0.05, 0.2], "higher", "-"),
        ([0.1, 0.0, 0.2], "higher", "-"),
        ([None, None, None], "higher", "-"),
        ([0.1, None, None], "higher", "-"),
    ],
)
def test_a_model_is_called_better_if_the_interval_excludes_0(difference, better, who):
    assert verdict({"difference": difference, "better": better}) == who


def test_a_set_may_have_slashes_in_its_name():
    row = {"group": "ood", "metric": "ood/data/my/set/log_px/auroc"}
    assert sections([row]) == {"ood: data/my/set": [("log_px AUROC", row)]}


def test_a_shortened_name_keeps_both_ends_in_one_line():
    assert shortened("a\nb", 5) == "a b"
    assert shortened("0123456789", 5) == "01…89"
    assert len(shortened("x" * 99, 20)) == 20


def line_of(text, begin):
    found = [line for line in text.splitlines() if line.startswith(begin)]
    assert found, f"no line begins with {begin!r}"
    return found[0]
