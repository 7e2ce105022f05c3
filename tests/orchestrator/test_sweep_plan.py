"""--dry-run of a sweep, and the sum of its resources."""

from __future__ import annotations

import pytest

from jem.errors import ConfigError
from orchestrator.plan import plan as plan_of_run
from orchestrator.sweep.config import bundled_sweeps, load_sweep, trial_config
from orchestrator.sweep.plan import examples, plan
from orchestrator.sweep.resources import SHARE, fit, machine, worker_resources


def sweep(*arguments, name="digits_sgld"):
    return load_sweep(name, ["device=cpu", *arguments])


def at_once(cpus, gpus, memory, *arguments):
    return fit(load_sweep("digits_sgld", arguments), cpus, gpus, memory).at_once


def problems(cpus, gpus, memory, *arguments):
    with pytest.raises(ConfigError) as caught:
        at_once(cpus, gpus, memory, *arguments)
    return [str(problem) for problem in caught.value.problems]


# Resources


@pytest.mark.parametrize(
    ("cpus", "gpus", "memory", "arguments", "expected"),
    [
        (2, 0, 16, (), 2),  # a one-worker trial is its own worker
        (2, 0, 16, ("workers=2",), 1),  # and the driver of two takes no CPU
        (7, 0, 16, ("workers=2",), 3),
        (7, 0, 16, ("workers=1..3",), 2),  # as many workers as there may be
        (100, 0, 1000, (), 20),  # no more than trials
        (100, 0, 1000, ("concurrency=3",), 3),
        (100, 0, 3.9, (), 3),
        (100, 0, 3.9, ("resources.memory=0",), 20),
        (2, 0, 16, ("resources.cpu=0.5",), 4),
        (1, 0, 16, ("workers=3", f"resources.cpu={1 / 3}"), 1),  # thirds add up to one
        (16, 3, 64, (), 3),  # auto: a GPU a worker
        (16, 3, 64, ("device=cpu",), 16),
        (16, 1, 64, ("workers=2",), 8),  # auto: not enough for a trial, so none
        (16, 3, 64, ("resources.gpu=0.5",), 6),
        (16, 2, 64, ("resources.gpu=0.6",), 2),  # no part of a GPU is of two
        (16, 3, 64, ("device=cuda", "workers=2"), 1),
        (16, 3, 64, ("resources.gpu=0",), 16),
    ],
)
def test_as_many_trials_run_at_once_as_fit(cpus, gpus, memory, arguments, expected):
    assert at_once(cpus, gpus, memory, *arguments) == expected


def test_of_a_cluster_concurrency_is_asked_for_and_an_autoscaler_brings_what_is_missing():
    found = fit(load_sweep("digits_sgld", ["concurrency=3", "resources.label=spot"]), 0, 0, 1, grows=True)
    assert found.at_once == 3
    with pytest.raises(ConfigError, match=r"of which there are 0; .*, or set concurrency=N: so many are asked for"):
        fit(load_sweep("digits_sgld", []), 0, 0, 1, grows=True)  # how many are wanted is not known
    assert problems(8, 0, 16, "resources.label=spot")[0].startswith("resources.label: is 'spot': machines of that kind")


@pytest.mark.parametrize(
    ("arguments", "gpus", "each"),
    [
        ((), 0, {"CPU": 1.0}),
        ((), 2, {"CPU": 1.0, "GPU": 1.0}),
        (("resources.gpu=0",), 2, {"CPU": 1.0}),
        (("resources.cpu=3", "resources.gpu=2", "resources.label=spot"), 4, {"CPU": 3, "GPU": 2, "spot": SHARE}),
    ],
)
def test_ray_gives_a_worker_of_several_what_was_counted_for_it(arguments, gpus, each):
    assert worker_resources(load_sweep("digits_sgld", ["workers=2", *arguments]), gpus) == each


def test_a_trial_takes_what_all_its_workers_take():
    arguments = ["workers=2", "resources.cpu=3", "resources.memory=5", "resources.gpu=1"]
    found = fit(load_sweep("digits_sgld", arguments), 16, 4, 64)
    assert (found.cpu_each, found.gpu_each, found.memory_each, found.at_once) == (6, 2, 10, 2)
    assert "2 x (0 + 2 x 3) = 12 CPUs of 16" in found.why
    assert "2 x (0 + 2 x 5 GiB) = 20 GiB memory of 64 GiB" in found.why
    assert "2 x (0 + 2 x 1) = 4 GPUs of 4; limited by the CPUs" in found.why


def test_two_workers_of_a_trial_cannot_share_a_gpu():
    with pytest.raises(ConfigError, match=r"resources.gpu: is 0.5 with workers=2: .* set workers=1, or whole GPUs"):
        load_sweep("digits_sgld", ["workers=2", "resources.gpu=0.5"])
    assert fit(load_sweep("digits_sgld", ["workers=1", "resources.gpu=0.5"]), 16, 2, 64).gpu_each == 0.5


@pytest.mark.parametrize(
    ("have", "arguments", "said"),
    [
        (
            (2, 0, 16),
            ("workers=3",),
            "resources.cpu: is 1, but a single trial takes 1 x (0 + 3 x 1) = 3 CPUs, of which there are 2; lower "
            "workers or resources.cpu",
        ),
        (
            (4, 0, 16),
            ("workers=2", "concurrency=3"),
            "concurrency: is 3, which takes 3 x (0 + 2 x 1) = 6 CPUs, of which there are 4; use at most 2, or lower "
            "workers or resources.cpu",
        ),
        (
            (4, 0, 16),
            ("device=cuda",),
            "resources.gpu: is 1, but a single trial takes 1 x (0 + 1 x 1) = 1 GPUs, of which there are 0; lower "
            "workers or resources.gpu (0.5: two share one), or set device=cpu",
        ),
        (
            (4, 0, 16),
            ("resources.memory=20",),
            "resources.memory: is 20, but a single trial takes 1 x (0 + 1 x 20 GiB) = 20 GiB memory, of which there "
            "are 16 GiB; lower workers or resources.memory",
        ),
    ],
)
def test_what_does_not_fit_is_said_with_the_sum_and_what_to_change(have, arguments, said):
    assert problems(*have, *arguments) == [said]


def test_all_that_does_not_fit_is_said_at_once():
    keys = [text.split(":")[0] for text in problems(1, 0, 1, "workers=2", "device=cuda", "concurrency=9")]
    assert keys == ["resources.cpu", "resources.memory", "resources.gpu"]


def test_this_machine_has_something():
    cpus, gpus, memory = machine()
    assert cpus >= 1
    assert gpus >= 0
    assert 0.1 < memory < 1e5


# --dry-run


@pytest.mark.parametrize("name", bundled_sweeps())
def test_every_bundled_sweep_can_be_planned(name, capsys):
    asked = sweep(name=name)
    result = plan(asked, 64, 0, 512)
    out = capsys.readouterr().out
    assert (result.status, result.name, result.exit_code) == ("planned", asked.name, 0)
    for axis in asked.space:
        (line,) = [line for line in out.splitlines() if line.startswith(f"{axis.key} ")]
        assert axis.text in line


def test_a_plan_shows_the_space_examples_the_schedule_and_the_sum(tmp_path, capsys):
    asked = sweep(f"storage_path={tmp_path}", "name=mine", "space.sgld.gradient_clamp.uniform=[1, 2]")
    plan(asked, 3, 0, 64)
    out = capsys.readouterr().out
    for text in (
        f"{tmp_path}/mine\n",
        "val/nll (min)",
        "ASHA: one in 3 goes on after 150 steps",
        "20 trials of 600 steps, the base's among them; at most 15 minutes",
        "the best 2 and the base, each with 5 seeds",
        "3 at once: trials x (driver + workers): 3 x (0 + 1 x 1) = 3 CPUs of 3;",
        "at most 21,000: search 12,000 + finalists 9,000 (15 trials)",
        "5 of the points that can be drawn:\n  sgld.step_size=",
    ):
        assert text in out, text
    (line,) = [line for line in out.splitlines() if line.startswith("sgld.gradient_clamp ")]
    assert line.split() == ["sgld.gradient_clamp", "uniform", "1", "to", "2", "none"]
    assert list(tmp_path.iterdir()) == []


def test_the_counts_are_those_by_hand(capsys):
    asked = sweep("budget.trials=7", "steps=100", "finalists=3", "seeds=4")
    metrics = plan(asked, 2, 0, 64).metrics
    a_step = plan_of_run(asked.run).metrics["flop_per_step"]
    assert metrics == {
        **{"axes": 5, "trials": 7, "search_steps": 700, "at_once": 2},
        **{"finalist_trials": 16, "finalist_steps": 1600, "flop": 2300 * a_step},
    }
    alone = plan(sweep("finalists=0"), 2, 0, 64).metrics
    assert (alone["finalist_trials"], alone["finalist_steps"]) == (0, 0)


def test_a_grid_has_as_many_trials_as_points_and_the_base(tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    space = "{sgld.steps: {grid: [1, 2]}, sgld.step_size: {grid: [0.1, 0.2]}}"
    path.write_text(f"base: digits\nsearcher: grid\nfinalists: 0\nbudget: {{trials: 16, steps: 20}}\nspace: {space}\n")
    asked = load_sweep(str(path), [])
    metrics = plan(asked, 20, 0, 64).metrics
    assert (metrics["trials"], metrics["search_steps"], metrics["at_once"]) == (5, 100, 5)
    assert "5 trials of 20 steps" in capsys.readouterr().out


def test_examples_are_trials_that_can_be_and_that_the_search_begins_with():
    asked = sweep("searcher=random")
    found = examples(asked)
    assert len(found) == 5
    assert found == examples(asked, 12)[:5]
    for point in found:
        assert trial_config(asked, point) != asked.run
    assert found != examples(sweep("searcher=random", "seed=1"))


def test_a_point_that_is_the_bases_is_no_candidate():
    only = [f"space.{axis.key}=none" for axis in sweep().space]
    asked = sweep(*only, "space.sgld.steps.choice=[10, 11]", "searcher=random")
    assert asked.run.sgld.steps == 10
    assert examples(asked) == [{"sgld.steps": 11}]


def test_a_plan_that_does_not_fit_is_refused_but_not_for_a_cluster_elsewhere(capsys, monkeypatch):
    asked = sweep("resources.memory=100000")
    with pytest.raises(ConfigError, match=r"resources\.memory: is 100000, but a single trial takes"):
        plan(asked)
    monkeypatch.setenv("RAY_ADDRESS", "ray.example:6379")
    result = plan(asked)
    out = capsys.readouterr().out
    assert "not on this machine: resources.memory: is 100000" in out
    assert "the cluster at RAY_ADDRESS is looked at when the sweep starts" in out
    assert "at_once" not in result.metrics
    with pytest.raises(ConfigError, match=r"resources\.memory"):
        plan(asked, 2, 0, 64)
