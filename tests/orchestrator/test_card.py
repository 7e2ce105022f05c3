"""The model card."""

from __future__ import annotations

import re

import pytest
from made_reports import made_card, made_report
from markdown_it import MarkdownIt

from orchestrator.card import kind, model_card
from orchestrator.config import DEFAULTS
from orchestrator.report_pictures import picture_names
from orchestrator.report_table import interval_text


@pytest.fixture(scope="module")
def card():
    report = made_report()
    return model_card(report, made_card(report), {"model": "models:/digits@champion", "MLflow run": "http://here/1"})


def html(text):
    return MarkdownIt("commonmark").enable("table").render(text)


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_it_says_what_the_model_is_by_its_objective(card):
    assert "Joint Energy Model" in card.split("##")[0]
    report = made_report()
    report["model"]["config"]["objective.p_x_weight"] = 0.0
    text = model_card(report, made_card(report), {})
    assert "A **classifier**" in text.split("##")[0]
    assert "trained without chains" in section(text, "Limits")
    report["model"]["config"] |= {"objective.p_x_weight": 1.0, "objective.p_x_loss": "bce"}
    text = model_card(report, made_card(report), {})
    assert "tells data from its own samples" in text.split("##")[0]
    assert "log ratio of the data's density and its samples'" in " ".join(section(text, "Limits").split())


def test_a_model_with_either_term_of_the_density_is_a_jem():
    assert kind(DEFAULTS) == kind({}) == "JEM"
    without = DEFAULTS | {"objective.p_x_weight": 0.0}
    assert kind(without) == "classifier"
    assert kind(without | {"objective.p_x_y_weight": 1.0}) == "JEM"
    assert kind(DEFAULTS | {"objective.p_x_loss": "bce"}) == "detector"
    assert kind(without | {"objective.mass_weight": 1.0, "objective.p_x_given_y_weight": 1.0}) == "classifier"


def test_it_says_how_to_use_the_model(card):
    use = section(card, "How to use it")
    assert "mlflow.pyfunc.load_model('models:/digits@champion')" in use
    for word in ("label", "probability", "probabilities", "log_density", "in_distribution"):
        assert f"`{word}`" in use
    assert "uint8, 0 to 255, NHWC: [n, 8, 8, 1]" in use
    assert f"{made_report()['threshold']['log_px']:.6g}" in use
    compile(use.split("```python\n")[1].split("```")[0], "the card", "exec")


def test_images_are_described_as_predict_takes_them():
    report = made_report("fast")
    served = made_card(report) | {"layout": "NCHW", "dtype": "float32"}
    assert "float32, 0 to 1, NCHW: [n, 1, 8, 8]" in model_card(report, served, {})


def test_a_model_that_comes_with_the_project_has_to_be_registered_first(card):
    report = made_report("fast")
    text = model_card(report, made_card(report) | {"info": {"name": "fashion_mnist"}}, {})
    assert "`python jobs/register.py fashion_mnist`" in section(text, "How to use it")
    assert "register.py" not in card


def test_a_model_that_is_not_served_has_no_snippet():
    text = model_card(made_report("fast"), None, {})
    assert "load_model" not in text


def test_it_has_the_data_and_their_splits(card):
    data = section(card, "Data")
    for text in ("digits", "1,294 train", "143 validation", "120 test", "8x8", "1 channel", "4 classes: 0, 1, 2, 3"):
        assert text in data


def test_settings_are_those_that_differ_from_the_defaults_and_the_seed_is_always_there(card):
    training = section(card, "Training")
    assert "Seed: 0" in training
    assert "1,500" in training
    assert "ema" in training
    assert set(re.findall(r"^\| `([a-z_.]+)`", training, re.M)) == {"model.name", "data.name", "data.noise_std"}
    report = made_report("fast")
    report["model"]["config"] = {key: list(v) if isinstance(v, tuple) else v for key, v in DEFAULTS.items()}
    assert "All settings are the defaults" in model_card(report, None, {}), "as JSON has them"


def test_every_metric_is_there_with_its_interval(card):
    report, metrics = made_report(), section(card, "Metrics")
    wanted = [interval_text(value) for key, value in report["test"].items() if key != "n"]
    wanted += [interval_text(value) for value in report["test_scaled"].values()]
    for entry in report["ood"].values():
        wanted += [interval_text(entry["called_outside"])]
        wanted += [interval_text(v, 3) for figures in entry["scores"].values() for v in figures.values()]
    for key in ("accuracy", "precision", "recall", "f1"):
        wanted += [interval_text(value, 3) for value in report["per_class"][key]]
    assert [text for text in wanted if text not in metrics] == []
    assert all(text in metrics for text in report["conventions"].values())


def test_it_shows_the_pictures_by_their_relative_names(card):
    names = picture_names(made_report())
    assert names[:5] == ["reliability.png", "confusion.png", "ood.png", "roc.png", "histograms.png"]
    assert re.findall(r"!\[[^]]+\]\(([^)]+)\)", card) == names
    fast = model_card(made_report("fast"), None, {"ood.png": "pictures/ood 1.png", "against.png": "against.png"})
    found = re.findall(r"!\[[^]]+\]\(([^)]+)\)", fast)
    assert found == ["reliability.png", "confusion.png", "pictures/ood%201.png", "against.png"]


def test_it_names_each_limit(card):
    report, limits = made_report(), section(card, "Limits")
    for text in (
        "up to a constant",
        "not comparable between models",
        "finite test set only, not the seed",
        "biased upward",
        "accepts 95% of the validation images",
        "interp, uniform and **no others**",
        "robust accuracy is an upper bound",
        "Gaussian noise of standard deviation 0.1",
    ):
        assert text in limits, text
    for name, entry in report["ood"].items():
        assert f"{1 - entry['called_outside'][0]:.1%} [" in limits
        assert f"of {name}, which is not of the data" in limits


def test_noise_that_p_x_does_not_see_is_said_to_be_cross_entropys():
    report = made_report()
    report["model"]["config"] |= {"data.augment_p_x": False}
    limits = section(model_card(report, made_card(report), {}), "Limits")
    assert "Training images of cross-entropy, not of p(x), had Gaussian noise of standard deviation 0.1" in limits


def test_it_names_each_hash_and_version(card):
    report, hashes = made_report(), section(card, "Hashes and versions")
    for text in (report["model"]["digest"], report["data"]["digest"], *report["facts"].values()):
        assert text in hashes
    assert "code commit" in hashes


def test_links_are_listed(card):
    assert "[MLflow run](http://here/1)" in section(card, "Links")


def test_a_model_that_was_not_evaluated_has_a_card_that_says_so():
    report = made_report("fast")
    text = model_card(None, made_card(report), {"MLflow run": "http://here/1"})
    assert "not evaluated" in section(text, "Metrics")
    assert "![" not in text
    limits = section(text, "Limits")
    for claim in ("not comparable between models", "nothing was measured", "not tested against adversarial"):
        assert claim in limits.lower()
    for value in (
        report["model"]["digest"],
        report["data"]["digest"],
        report["facts"]["git.commit"],
        "1,500",
        "Seed: 0",
    ):
        assert value in text


def test_a_card_of_nothing_is_no_error():
    assert "not evaluated" in model_card(None, None, {})


def test_undefined_figures_are_called_so():
    report = made_report("fast")
    report["test"]["mce"] = [None, None, None]
    report["ood"]["interp"]["called_outside"] = None
    report["ood"]["uniform"]["called_outside"] = [0.5, None, None]
    assert "| MCE | undefined |" in model_card(report, made_card(report), {})


def test_names_are_neither_markdown_nor_html():
    evil = ("a|b", "<script>x</script>", "*bold* `code`", "[x](y)\n# head")
    report = made_report("fast", classes=evil)
    report["model"]["name"] = "# <b>|name|"
    page = html(model_card(report, made_card(report), {"a [link]": "http://x/(y) z"}))
    assert "<script>" not in page
    assert "<b>" not in page
    assert "<h1>head" not in page
    assert "<td>a|b</td>" in page, "a row of the table of classes, in one piece"
    assert "<td>&lt;script&gt;x&lt;/script&gt;</td>" in page
    assert "<td>*bold* `code`</td>" in page
    assert "<td>[x](y) # head</td>" in page
    assert 'href="http://x/%28y%29%20z"' in page


def test_tables_are_tables(card):
    page = html(card)
    tables = [line for line in card.splitlines() if re.fullmatch(r"\|( --- \|)+", line)]
    assert len(tables) == page.count("<table>") > 5
    assert page.count("<tr>") + len(tables) == sum(line.startswith("|") for line in card.splitlines())


def test_the_rates_of_a_threshold_that_was_fitted_on_noisy_images_are_not_those_of_the_one_that_is_served():
    report = made_report()
    plain = section(model_card(report, made_card(report), {}), "Limits")
    assert "That threshold accepts" in plain
    report["settings"]["noise_std"] = 0.03
    noisy = " ".join(section(model_card(report, made_card(report), {}), "Limits").split())
    fitted = f"fitted on images with noise of 0.03, {report['threshold']['log_px']:.6g},"
    assert f"The threshold {fitted} accepts" in noisy
    assert "hat threshold accepts" not in noisy
