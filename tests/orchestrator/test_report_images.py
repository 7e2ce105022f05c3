import io
import json

import numpy as np
import pytest
from made_reports import made_report
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from orchestrator.card import model_card
from orchestrator.report_further import gen_table, masking_lines, robust_tables
from orchestrator.report_images import _curve, against_robustness, drawings, steps, suspected
from orchestrator.report_table import show_report


def opened(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def said(report):
    console = Console(file=io.StringIO(), width=200)
    show_report(report, console)
    return console.file.getvalue()


def test_every_section_of_a_report_has_its_picture_and_a_report_without_them_has_none():
    names = {"robustness", "chains", "samples_fresh", "neighbours_fresh", "adversarials", "distal"}
    drawn = drawings(made_report())
    assert set(drawn) == {f"{name}.png" for name in names}
    for draw in drawn.values():
        pixels = opened(draw())
        assert pixels.shape[1] > 150
        assert pixels.std() > 5
    assert drawings(made_report(suite="fast")) == {}


def test_a_curve_falls_where_a_smallest_norm_is_and_an_image_that_was_wrong_lowers_its_start():
    x, y = steps([0.0, 0.3, None, 0.1, 0.9], end=0.5)
    assert x == [0.0, 0.1, 0.3, 0.5]
    assert y == pytest.approx([0.8, 0.6, 0.4, 0.4])


def test_a_curve_goes_through_the_accuracies_of_its_grid():
    section = made_report()["robust"]
    for of_k in section["k"].values():
        for found in of_k["norms"].values():
            x, y = steps(found["found"]["worst"], end=10)
            for eps, value in zip(found["eps"], found["accuracy"]["worst"], strict=True):
                at = max(i for i in range(len(x)) if x[i] <= eps)
                assert y[at] == pytest.approx(value[0])


def test_a_sheet_shows_its_images_pixel_for_pixel_below_the_caption():
    report = made_report()
    pixels = opened(drawings(report)["distal.png"]())
    from orchestrator.pictures import grid

    packed = report["grids"]["distal"]
    import base64

    import torch

    images = torch.frombuffer(bytearray(base64.b64decode(packed["pixels"])), dtype=torch.uint8).view(packed["shape"])
    cells = grid(images.float() / 127.5 - 1, packed["columns"])
    h, w = cells.shape[:2]
    assert np.array_equal(pixels[-h:, 6 : 6 + w], cells)


def test_the_tables_have_a_row_an_attack_with_the_worst_last_and_the_figures_of_the_report():
    report = made_report()
    tables = dict(robust_tables(report["robust"]))
    assert len(tables) == 6
    title = next(name for name in tables if name.startswith("JEM-0, L2"))
    head, rows = tables[title]
    assert head == ("attack", "eps 0.25", "eps 0.5", "eps 1", "eps 2")
    assert [row[0] for row in rows] == ["pgd", "ddn", "cw", "square", "worst"]
    worst = report["robust"]["k"]["0"]["norms"]["l2"]["accuracy"]["worst"]
    assert rows[-1][1].startswith(f"{worst[0][0]:.3f} [")
    assert gen_table(report["gen"])[1][0] == ("fresh", "100", "3.25", "0.125", "6.5", "0.75", "0.25", "1.500")
    text = said(report)
    for part in ("20 test images", "JEM-10, Linf", "lenet (digits, sha256 ab12cd34)", "1,294 images", "20,000"):
        assert part in text
    assert "robust accuracy" not in said(made_report(suite="fast"))


def test_suspected_masking_is_said_in_the_table_the_card_and_the_picture():
    report = made_report()
    assert not suspected(report["robust"])
    assert "MASKING" not in said(report)
    report["robust"]["k"]["10"]["masking"]["black_box"]["linf"] = {"by_square_alone": 7, "n": 20, "ok": False}
    assert suspected(report["robust"])
    assert "7 of 20" in list(masking_lines(report["robust"]))[2]
    assert said(report).count("GRADIENT MASKING SUSPECTED") == 1
    assert "gradient masking is **suspected**" in model_card(report, None, {}).lower()


def test_the_card_says_how_robust_the_model_is_in_words_and_only_where_it_was_attacked():
    report = made_report()
    card = model_card(report, None, {})
    worst = report["robust"]["k"]["0"]["norms"]["linf"]["accuracy"]["worst"]
    assert f"keeps {worst[0][0]:.1%} of 20 images at eps 0.01 and {worst[-1][0]:.1%} at 0.2" in card
    assert "robust accuracy is an upper bound" in card
    assert "not tested against adversarial images" not in card
    assert "![Samples: chains from the prior, not selected](samples_fresh.png)" in card
    assert "It was not tested against adversarial images" in model_card(made_report(suite="fast"), None, {})


def test_two_models_are_drawn_on_one_plot_with_the_attacks_that_were_made_on_the_other():
    one, other = made_report(), made_report(seed=1)
    other["robust"]["k"] = {"0": other["robust"]["k"]["0"]}
    other["left_out"] = {"robust_k": "a plain classifier"}
    grid = {norm: found["eps"] for norm, found in one["robust"]["k"]["0"]["norms"].items()}
    transfer = {
        norm: {"eps": eps, **{way: [[0.5, 0.4, 0.6]] * len(eps) for way in ("b_on_a", "a_on_b")}}
        for norm, eps in grid.items()
    }
    without = opened(against_robustness(one, other, {}))
    drawn = opened(against_robustness(one, other, {"transfer": transfer}))
    assert drawn.shape == without.shape
    assert (drawn != without).any()


def test_a_report_with_pictures_is_plain_json():
    json.dumps(made_report(), allow_nan=False)


def test_captions_and_names_are_drawn_as_they_are():
    """Neither a formula nor a warning (which fails a test here), and no picture as wide as a caption is long."""
    report = made_report()
    report["model"]["name"] = "$x_{$ 日本語 \\frac"
    report["grids"]["distal"]["caption"] = "class $a$ and $b_{$ 日本語 <b> " + "x" * 500
    for draw in drawings(report).values():
        assert max(opened(draw()).shape) < 2000


def test_energies_that_are_undefined_are_no_error():
    report = made_report()
    section = report["chains"]
    section["data_energy"] = [None] * 3
    for name in ("energy", "grad_norm", "saturation"):
        section[name] = [[None] * 3] * len(section["steps"])
    section["acceptance"]["own"] = [None] * len(section["steps"])
    assert opened(drawings(report)["chains.png"]()).std() > 5
    assert "the energy of test images is undefined" in said(report)
    assert "the energy of test images is undefined" in model_card(report, None, {})


def test_intervals_at_one_eps_are_beside_each_other():
    of_norm = made_report()["robust"]["k"]["0"]["norms"]["linf"]
    axes = Figure().subplots()
    for place in (-1, 0, 1):
        _curve(axes, of_norm, 0.23, "red", "", "-", place)
    left, middle, right = (list(bars.lines[0].get_xdata()) for bars in axes.containers)
    assert middle == of_norm["eps"]
    assert all(a < b < c for a, b, c in zip(left, middle, right, strict=True))
    assert right[-1] - middle[-1] < 0.01 * 0.23
