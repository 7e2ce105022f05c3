"""What is drawn from a search space, and that it is one definition for every searcher."""

from __future__ import annotations

import optuna
import pytest

from orchestrator.sweep.space import Axis, distributions, draw, drawn, grid, in_space, points, to_params

STEP = Axis("sgld.step_size", "loguniform", (0.05, 5.0))
STEPS = Axis("sgld.steps", "int", (5, 8))
CLAMP = Axis("sgld.clamp", "choice", (None, 1.0))
GRADIENT = Axis("sgld.gradient_clamp", "uniform", (0.1, 0.2), {"sgld.clamp": (1.0,)})
CHANNELS = Axis("model.channels", "choice", ((8, 8), (16, 32), (16,)))
SPACE = (STEP, STEPS, CLAMP, GRADIENT, CHANNELS)


def every(point):
    return True


def ranged(n, *axes, seed=0, searcher="random"):
    return points(axes, searcher, n, seed, every)


def test_what_is_drawn_is_in_its_range_reaches_over_it_and_has_its_type():
    found = ranged(400, *SPACE)
    sizes = [point["sgld.step_size"] for point in found]
    assert all(0.05 <= size <= 5 for size in sizes)
    assert 150 < sum(size < 0.5 for size in sizes) < 250, "half of a range of two decades lies in its first"
    assert {point["sgld.steps"] for point in found} == {5, 6, 7, 8}
    assert {point["sgld.clamp"] for point in found} == {None, 1.0}
    assert {point["model.channels"] for point in found} == {(8, 8), (16, 32), (16,)}
    assert {type(point["sgld.steps"]) for point in found} == {int}


def test_the_kinds_differ_by_how_their_values_are_spread():
    def share(kind, low, high, below):
        drawn_values = [p["x"] for p in ranged(400, Axis("x", kind, (low, high)), Axis("y", "uniform", (0, 1)))]
        return sum(value < below for value in drawn_values) / 400

    assert share("uniform", 0.0, 100.0, 50) == pytest.approx(0.5, abs=0.1)
    assert share("loguniform", 1.0, 100.0, 10) == pytest.approx(0.5, abs=0.1)
    assert share("int", 1, 100, 51) == pytest.approx(0.5, abs=0.1)
    assert share("logint", 1, 100, 10) == pytest.approx(0.5, abs=0.12)


def test_an_axis_with_a_condition_is_drawn_only_where_it_holds():
    found = ranged(100, *SPACE)
    assert {(p["sgld.clamp"], "sgld.gradient_clamp" in p) for p in found} == {(None, False), (1.0, True)}


def test_a_condition_on_what_was_not_drawn_does_not_hold():
    third = Axis("c", "choice", (1, 2), {"b": (1, 2)})
    space = (Axis("a", "choice", (True, False)), Axis("b", "choice", (1, 2), {"a": (True,)}), third)
    found = ranged(50, *space)
    assert {(p["a"], "b" in p, "c" in p) for p in found} == {(True, True, True), (False, False, False)}
    assert len(found) == 5, "four with a, one without"
    assert not drawn(third, {"a": False})


def test_points_are_the_same_for_a_seed_others_for_another_and_more_of_them_begin_alike():
    assert ranged(20, *SPACE) == ranged(20, *SPACE)
    assert ranged(20, *SPACE)[:7] == ranged(7, *SPACE)
    assert ranged(20, *SPACE) != ranged(20, *SPACE, seed=1)


def test_no_point_comes_twice_and_a_small_space_ends():
    found = ranged(50, STEPS, CLAMP)
    assert len(found) == 8
    assert len({tuple(point.items()) for point in found}) == 8


def test_what_cannot_be_is_drawn_again():
    asked = []

    def only_large(point):
        asked.append(point["sgld.step_size"])
        return point["sgld.step_size"] > 1

    found = points(SPACE, "random", 20, 0, only_large)
    assert len(found) == 20
    assert all(point["sgld.step_size"] > 1 for point in found)
    assert len(asked) > 20
    assert points(SPACE, "random", 20, 0, lambda _: False) == []


def test_a_grid_is_every_combination_once_however_many_are_asked_for():
    a, b = Axis("a", "grid", (1, 2, 3)), Axis("b", "grid", (None, (4, 5)))
    expected = [{"a": x, "b": y} for x in (1, 2, 3) for y in (None, (4, 5))]
    assert grid((a, b)) == expected
    assert ranged(50, a, b, searcher="grid") == expected
    assert points((a, b), "grid", 50, 0, lambda p: p["a"] != 2) == [p for p in expected if p["a"] != 2]


def test_a_grid_with_conditions_has_no_combination_twice():
    a, b = Axis("a", "grid", (1, 2)), Axis("b", "grid", (3, 4), {"a": (2,)})
    assert ranged(9, a, b, searcher="grid") == [{"a": 1}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]


def test_beside_a_grid_the_other_axes_are_drawn_anew_each_time():
    found = ranged(9, Axis("a", "grid", (1, 2, 3)), STEP, searcher="grid")
    assert [point["a"] for point in found] == [1, 2, 3] * 3
    assert len({point["sgld.step_size"] for point in found}) == 9


def test_optuna_draws_what_the_distributions_say():
    """What draw suggests and the distributions are the same to Optuna, for a sampler that learns as well."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=3))
    for number in range(12):
        trial = study.ask()
        point = draw(SPACE, trial)
        expected = {key: d for key, d in distributions(SPACE).items() if key in point}
        assert trial.distributions == expected
        assert to_params(SPACE, point) == trial.params
        study.tell(trial, float(number))


def test_a_point_can_be_told_to_optuna_and_comes_back():
    point = {"sgld.step_size": 0.3, "sgld.steps": 6, "sgld.clamp": 1.0, "sgld.gradient_clamp": 0.15}
    point["model.channels"] = (16, 32)
    study = optuna.create_study()
    study.enqueue_trial(to_params(SPACE, point))
    assert draw(SPACE, study.ask()) == point


def test_true_and_1_are_different_choices_of_different_axes():
    space = (Axis("a", "choice", (False, True)), Axis("b", "choice", (0, 1)))
    assert {(type(p["a"]), type(p["b"])) for p in ranged(9, *space)} == {(bool, int)}


@pytest.mark.parametrize(
    ("perturbed", "inside"),
    [
        ({"sgld.step_size": 6.0}, {"sgld.step_size": 5.0}),
        ({"sgld.step_size": 0.04}, {"sgld.step_size": 0.05}),
        ({"sgld.steps": 6.6}, {"sgld.steps": 7}),
        ({"sgld.steps": 9.6}, {"sgld.steps": 8}),
        ({"sgld.clamp": 0.8}, {"sgld.clamp": 1.0}),
        ({"sgld.clamp": None, "sgld.gradient_clamp": 0.15}, {"sgld.clamp": None}),
        ({"sgld.clamp": 1.0, "sgld.gradient_clamp": 0.3}, {"sgld.clamp": 1.0, "sgld.gradient_clamp": 0.2}),
        ({"model.channels": (16, 32), "other": 1}, {"model.channels": (16, 32)}),
    ],
)
def test_what_pbt_perturbs_stays_in_the_space(perturbed, inside):
    found = in_space(SPACE, perturbed)
    assert found == inside
    assert [type(value) for value in found.values()] == [type(value) for value in inside.values()]


def test_axes_are_said_in_words():
    assert STEP.text == "loguniform 0.05 to 5"
    assert CLAMP.text == "one of none, 1"
    assert CHANNELS.text == "one of [8, 8], [16, 32], [16]"
    assert Axis("a", "grid", (True, "b")).text == "each of true, b"
    assert (GRADIENT.condition, STEP.condition) == ("sgld.clamp 1", "")
