"""A search as pictures."""

import itertools
from dataclasses import replace

import pytest
from made_sweeps import SWEEP, made_search, sweep_of
from PIL import Image

from jem.files import Location
from orchestrator.sweep.drawing import base_value, scale_of
from orchestrator.sweep.importance import importance_picture, importances
from orchestrator.sweep.pareto import pareto
from orchestrator.sweep.plots import against_parameters, draw_plots, progress
from orchestrator.sweep.space import Axis
from orchestrator.sweep.table import best, read_trials

SINGLE = ["objectives.png", "parallel.png", "importance.png", "progress.png"]
TWO = "objective: [val/accuracy, val/ood/interp/log_px/auroc]"
THREE = "objective: [val/accuracy, val/ood/interp/log_px/auroc, val/ece]"


def searched(folder, more="", n=16, text=SWEEP):
    sweep = sweep_of(folder, f"{text}\n{more}\n")
    made_search(folder / "S", sweep, n)
    return read_trials(Location.of(folder / "S")), sweep


@pytest.mark.parametrize("objective", ["", TWO, THREE])
def test_pictures_are_drawn_and_named(tmp_path, objective):
    rows, sweep = searched(tmp_path, objective)
    names = draw_plots(rows, sweep, tmp_path / "out")
    assert set(names) == {*SINGLE, *(["pareto.png"] if objective else [])}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    for name in names:
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(2**24)) > 20  # more than an empty frame


def test_what_there_are_too_few_trials_for_is_left_out(tmp_path):
    rows, sweep = searched(tmp_path, n=4)
    assert draw_plots(rows, sweep, tmp_path) == ["objectives.png", "parallel.png", "progress.png"]
    assert draw_plots(rows[:1], sweep, tmp_path) == ["progress.png"]  # the base alone
    assert draw_plots([], sweep, tmp_path) == []
    assert draw_plots([replace(row, status="diverged") for row in rows], sweep, tmp_path) == []
    assert draw_plots([replace(row, stage="finalists") for row in rows], sweep, tmp_path) == []


def test_equal_figures_can_be_drawn(tmp_path):
    rows, sweep = searched(tmp_path, TWO)
    same = {"val/accuracy": 0.9, "val/ood/interp/log_px/auroc": 0.5}
    names = draw_plots([replace(row, metrics=same) for row in rows], sweep, tmp_path)
    assert names == ["objectives.png", "parallel.png", "pareto.png", "progress.png"]  # nothing explains no variance


def test_what_would_be_a_formula_or_lacks_letters_is_drawn(tmp_path):
    rows, sweep = searched(tmp_path)
    options = ("$x_{", "日本", None)
    odd = replace(sweep, space=(*sweep.space[:2], Axis("model.activation", "choice", options)))
    changed = [{"model.activation": options[row.number % 3]} for row in rows]
    rows = [replace(row, point=row.point and row.point | new) for row, new in zip(rows, changed, strict=True)]
    assert draw_plots(rows, odd, tmp_path) == SINGLE


def test_a_parameter_that_explains_the_figure_is_important(tmp_path):
    rows, sweep = searched(tmp_path, n=40)
    explained = [
        replace(row, metrics={"val/nll": 0.1 + row.point.get("sgld.steps", 10) / 40}) for row in rows if row.point
    ]
    (shares,) = importances(explained, sweep).values()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["sgld.steps"] > 0.9


def test_a_conditional_parameter_is_left_out_of_the_importances_and_that_is_said(tmp_path):
    text = """
base: digits
space:
  sgld.steps: {int: [2, 9]}
  sgld.step_size: {loguniform: [0.1, 1]}
  objective.energy_l2: {uniform: [0, 1], when: {sgld.steps: [2, 3, 4]}}
"""
    rows, sweep = searched(tmp_path, text=text)
    (shares,) = importances(rows, sweep).values()
    assert set(shares) == {"sgld.steps", "sgld.step_size"}
    title = importance_picture(rows, sweep).get_suptitle()
    assert "objective.energy_l2" in title
    assert "sgld.steps" not in title


def test_conditions_and_the_base_stand_in_the_panels(tmp_path):
    text = """
base: digits_uniform
space:
  model.activation: {choice: [leaky_relu, silu]}
  objective.energy_l2: {loguniform: [0.001, 1], when: {model.activation: silu}}
"""
    rows, sweep = searched(tmp_path, text=text, n=12)
    first, second = against_parameters(rows, sweep).axes
    assert second.get_xlabel() == "objective.energy_l2\nonly with model.activation silu"
    assert second.get_xscale() == "log"
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["leaky_relu", "silu"]
    axis = sweep.space[0]
    assert scale_of(axis).place(base_value(sweep, axis.key)) == 1.0  # silu
    assert scale_of(sweep.space[1]).place(base_value(sweep, "objective.energy_l2")) is None  # 0 has no logarithm
    base = rows[0].metrics["val/nll"]
    for axes in (first, second):
        assert any(list(line.get_ydata()) == [base, base] for line in axes.lines)


def test_the_best_so_far_never_gets_worse_and_ends_at_the_best(tmp_path):
    rows, sweep = searched(tmp_path)
    (axes,) = progress(rows, sweep).axes
    (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    heights = list(line.get_ydata())
    assert heights == sorted(heights, reverse=True)
    assert heights[-1] == best(rows, sweep)[0].metrics["val/nll"]
    assert list(line.get_xdata())[-1] == len(rows)


def test_trials_are_in_the_order_in_which_they_ended(tmp_path):
    rows, sweep = searched(tmp_path)
    late = [replace(row, ended=row.ended + (9999 if row.is_base else 0)) for row in rows]
    (axes,) = progress(late, sweep).axes
    (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert line.get_ydata()[0] == rows[1].metrics["val/nll"]


def test_the_front_is_a_staircase_through_those_that_no_trial_dominates(tmp_path):
    rows, sweep = searched(tmp_path, TWO, n=40)
    (axes,) = pareto(rows, sweep).axes
    (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    front = {(r.metrics["val/accuracy"], r.metrics["val/ood/interp/log_px/auroc"]) for r in best(rows, sweep)}
    assert set(zip(line.get_xdata(), line.get_ydata(), strict=True)) == front
    assert len(front) > 1
    assert list(line.get_xdata()) == sorted(line.get_xdata(), reverse=True)
    assert list(line.get_ydata()) == sorted(line.get_ydata())


def test_names_on_the_front_hide_neither_each_other_nor_a_trial(tmp_path):
    rows, sweep = searched(tmp_path, THREE, n=40)
    figure = pareto(rows, sweep)
    figure.draw_without_rendering()
    assert len(figure.axes) == 3
    assert sum(len(axes.texts) for axes in figure.axes) > 6
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        dots = [axes.transData.transform(point) for marks in axes.collections for point in marks.get_offsets()]
        assert not any(box.contains(*dot) for box in boxes for dot in dots)
