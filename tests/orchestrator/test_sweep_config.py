"""From a sweep's file and `key=value` arguments to a sweep, or to all that is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from jem.errors import ConfigError
from jem.settings import digest, flatten
from orchestrator.config import load_run_config
from orchestrator.sweep.config import OBJECTIVES, bundled_sweeps, load_sweep, to_yaml, trial_config

MINE = """base: digits_uniform
scheduler: {name: asha}
budget: {trials: 8, steps: 600}
settings:
  workers: 1
space:
  sgld.step_size: {loguniform: [5e-2, 5]}
  sgld:
    steps: {int: [5, 20]}
    clamp: {choice: [none, 1]}
    gradient_clamp: {uniform: [0.1, 10], when: {sgld.clamp: 1}}
"""


@pytest.fixture
def file(tmp_path):
    """Write a sweep; lines are numbered from 1."""

    def write(text=MINE, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def problems(sweep, *arguments):
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep, arguments)
    return [str(problem) for problem in caught.value.problems]


def axes(sweep):
    return {axis.key: (axis.kind, axis.values) for axis in sweep.space}


# Files


@pytest.mark.parametrize("name", bundled_sweeps())
def test_every_bundled_sweep_loads_and_its_base_is_the_recipes(name):
    sweep = load_sweep(name, [])
    assert sweep.name == f"{name}-{digest(sweep.science)}"
    recipe = load_run_config(sweep.config.base, ["workers=1", f"steps={sweep.run.steps}"])
    assert sweep.arms or sweep.run.science == recipe.science, "arms are compared on common ground, which a sweep sets"
    assert trial_config(sweep, {}) == sweep.run


def test_the_bundled_sweeps_are_there():
    assert set(bundled_sweeps()) >= {"digits_sgld", "cifar10_sgld", "loss_weights"}
    assert load_sweep("loss_weights", []).config.objective == (
        *("val/accuracy", "val/ood/interp/log_px/auroc", "val/ece"),
    )


def test_a_space_is_read_with_its_kinds_conditions_and_order(file):
    sweep = load_sweep(file(), [])
    assert axes(sweep) == {
        "sgld.step_size": ("loguniform", (0.05, 5.0)),
        "sgld.steps": ("int", (5, 20)),
        "sgld.clamp": ("choice", (None, 1.0)),
        "sgld.gradient_clamp": ("uniform", (0.1, 10.0)),
    }
    assert sweep.space[-1].when == {"sgld.clamp": (1.0,)}
    assert (sweep.config.budget.trials, sweep.config.budget.steps, sweep.run.steps) == (8, 600, 600)


def test_an_axis_comes_after_what_it_depends_on_wherever_it_is_written(file):
    text = """base: digits_uniform
space:
  objective.p_x_y_weight: {uniform: [0.1, 1], when: {sgld.conditional: true}}
  sgld.conditional: {choice: [true, false]}
"""
    sweep = load_sweep(file(text), [])
    assert [axis.key for axis in sweep.space] == ["sgld.conditional", "objective.p_x_y_weight"]


def test_a_base_is_a_recipe_beside_the_sweeps_file(file, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("base: digits_uniform\nsgld: {steps: 3}\nbatch_size: 32\n")
    path = file(MINE.replace("base: digits_uniform", "base: recipe.yaml"))
    monkeypatch.chdir("/")
    sweep = load_sweep(path, [])
    assert (sweep.run.batch_size, sweep.run.sgld.steps) == (32, 3)
    assert sweep.config.base == str(tmp_path / "recipe.yaml")
    assert load_sweep(path, ["base=digits"]).run.batch_size == 64


@pytest.mark.parametrize("arguments", [(), ("space.sgld.clamp=none", "tracking.every=3", "name=x", "sgld.clamp=2")])
def test_a_sweep_as_a_file_gives_itself_again(file, tmp_path, arguments):
    for source in (*bundled_sweeps(), file()):
        typed = arguments if source == file() else arguments[1:3]
        sweep = load_sweep(source, typed)
        path = tmp_path / "again.yaml"
        path.write_text(to_yaml(sweep))
        again = load_sweep(str(path), [])
        assert (again.run, again.space, again.science) == (sweep.run, sweep.space, sweep.science)
        assert again.config == replace(sweep.config, name=sweep.name)
        assert again.name == sweep.name


def test_options_of_ones_own_function_are_axes_like_others(file):
    text = "base: digits_uniform\nsettings: {model: {name: 'mine:net', options: {wide: 3}}}\nspace:\n"
    sweep = load_sweep(file(text + "  model.options.deep: {choice: [1, [2, 3]]}\n"), [])
    assert axes(sweep) == {"model.options.deep": ("choice", (1, [2, 3]))}
    assert trial_config(sweep, {"model.options.deep": [2, 3]}).model.options == {"wide": 3, "deep": [2, 3]}
    assert load_sweep(file(to_yaml(sweep)), []).space == sweep.space


# The command line


def test_the_command_line_sets_the_sweep_its_space_and_its_runs(file):
    sweep = load_sweep(
        file(),
        [
            *("budget.trials=4", "scheduler.name=none", "searcher=tpe", "seed=7", "seeds=9", "name=mine"),
            *("space.sgld.steps.choice=[1, 2]", "space.sgld.step_size=none", "space.data.noise_std.uniform=[0, 0.2]"),
            *("objective=[val/accuracy, val/ece]", "objective.p_x_weight=0.5", "tracking.uri=http://x"),
            *("workers=2", "settings.batch_size=32", "storage_path=/x"),
        ],
    )
    assert list(axes(sweep)) == ["sgld.steps", "sgld.clamp", "sgld.gradient_clamp", "data.noise_std"]
    assert axes(sweep)["sgld.steps"] == ("choice", (1, 2))
    assert (sweep.config.objective, sweep.run.objective.p_x_weight) == (("val/accuracy", "val/ece"), 0.5)
    assert (sweep.name, sweep.run.name, sweep.run.seed, sweep.config.seeds) == ("mine", None, 7, 9)
    assert (sweep.run.workers, sweep.run.batch_size, sweep.run.storage_path) == (2, 32, "/x")
    assert (sweep.run.tracking.uri, sweep.config.budget.trials) == ("http://x", 4)
    assert load_sweep(file(), ["objective=val/ece"]).config.objective == ("val/ece",)


def test_steps_are_the_budgets_however_they_are_given(file):
    for arguments in (["budget.steps=50"], ["steps=50"], ["steps=50", "budget.steps=70"]):
        sweep = load_sweep(file(), arguments)
        assert (sweep.run.steps, sweep.config.budget.steps) == (50, 50)
    unsaid = file(MINE.replace(", steps: 600", ""))
    assert load_sweep(unsaid, []).config.budget.steps == load_run_config("digits_uniform", []).steps


def test_what_is_fixed_on_the_command_line_is_searched_no_more(file):
    sweep = load_sweep(file(), ["sgld.steps=7"])
    assert "sgld.steps" not in axes(sweep)
    assert sweep.run.sgld.steps == 7
    fixed = file(MINE.replace("  workers: 1\n", "  workers: 1\n  data: {noise_std: 0.3}\n"))
    searched = load_sweep(fixed, ["space.data.noise_std.uniform=[0, 0.2]"])
    assert axes(searched)["data.noise_std"] == ("uniform", (0.0, 0.2))
    assert searched.run.data.noise_std == 0.1, "the recipe's"
    assert problems(file(), "sgld.steps=7", "space.sgld.steps.int=[1, 2]") == [
        "command line: sgld.steps: is fixed, and an axis of the space too (command line); leave out one of them"
    ]


@pytest.mark.parametrize(
    ("argument", "drawn"),
    [
        ("sgld.clamp=1", True),
        ("sgld.clamp=2", False),
        ("sgld.clamp=none", False),
        ("space.sgld.clamp=none", False),  # the base has none
        ("space.sgld.gradient_clamp.when=none", True),
    ],
)
def test_a_condition_on_an_axis_that_is_gone_is_settled(file, argument, drawn):
    sweep = load_sweep(file(), [argument])
    assert ("sgld.gradient_clamp" in axes(sweep)) == drawn
    if drawn:
        assert sweep.space[-1].when == {}


def test_a_sweep_is_named_by_what_it_does_not_by_where(file):
    name = load_sweep(file(), []).name
    assert name.startswith("mine-")
    same = ["budget.minutes=3", "concurrency=1", "finalists=1", "seeds=2", "resources.cpu=2", "storage_path=/x"]
    for argument in [*same, "tracking.every=7", "workers=2", "tracking.images_every=9", "checkpoint.every=11"]:
        assert load_sweep(file(), [argument]).name == name, argument
    others = ["budget.trials=9", "steps=500", "seed=1", "searcher=tpe", "scheduler.name=none", "objective=val/ece"]
    others += ["scheduler.grace_steps=100", "space.sgld.steps.int=[5, 19]", "evaluate.every=30", "evaluate.final=best"]
    others += ["space.sgld.gradient_clamp.when=none", "batch_size=32", "sgld.steps=10"]
    names = {load_sweep(file(), [argument]).name for argument in others}
    assert len(names | {name}) == len(others) + 1
    science = load_sweep(file(), []).science
    assert json.loads(json.dumps(science)) == science


# What trials share


def test_trials_touch_no_test_data_and_register_nothing(file):
    run = load_sweep(file(), []).run
    assert (run.evaluate.suite, run.evaluate.register, run.seed, run.name) == ("none", False, 0, None)
    assert load_sweep(file(), ["evaluate.suite=none", "evaluate.register=false"]).run == run
    found = problems(file(), "evaluate.suite=fast", "evaluate.register=true")
    assert found[0] == "command line: evaluate.suite: is fast: must be none: test data are touched once, by the winner"
    assert len(found) == 2


@pytest.mark.parametrize(
    ("arguments", "measured", "saved"),
    [
        (("steps=600",), 50, 300),  # of 60, what divides the 150 of ASHA
        (("steps=600", "scheduler.name=none"), 60, 300),
        (("steps=5",), 1, 2),
        (("steps=50000",), 500, 500),  # the recipe's
        (("steps=600", "scheduler.grace_steps=7"), 7, 300),
        (("steps=600", "scheduler.grace_steps=149"), 60, 300),  # a prime
        (("steps=600", "evaluate.every=20", "checkpoint.every=30"), 20, 30),
        (("steps=600", "scheduler.name=pbt", "space.sgld.clamp=none"), 120, 120),
        (("steps=600", "scheduler.name=pbt", "scheduler.interval_steps=50"), 50, 50),
    ],
)
def test_trials_are_measured_where_the_scheduler_compares_them(file, arguments, measured, saved):
    run = load_sweep(file(), arguments).run
    assert (run.evaluate.every, run.checkpoint.every) == (measured, saved)
    assert run.tracking.images_every == run.steps


def test_the_schedulers_steps_follow_from_the_budget(file):
    assert load_sweep(file(), []).config.scheduler.grace_steps == 150
    assert load_sweep(file(), ["scheduler.name=pbt"]).config.scheduler.interval_steps == 120
    assert load_sweep(file(), ["scheduler.grace_steps=10"]).config.scheduler.grace_steps == 10


def test_a_trial_is_the_sweeps_run_at_its_point(file):
    sweep = load_sweep(file(), [])
    config = trial_config(sweep, {"sgld.steps": 9, "sgld.clamp": None}, name="t003", **{"checkpoint.every": 5})
    assert (config.sgld.steps, config.name, config.checkpoint.every) == (9, "t003", 5)
    changed = {k for k, v in flatten(config).items() if v != flatten(sweep.run)[k]}
    assert changed == {"sgld.steps", "name", "checkpoint.every"}
    with pytest.raises(ConfigError, match=r"replay\.capacity"):
        trial_config(sweep, {"replay.capacity": 3})
    with pytest.raises(ConfigError, match=r"data\.crop_padding"):
        trial_config(sweep, {"data.crop_padding": 9})


# Mistakes


def test_all_mistakes_of_file_and_command_line_come_at_once_with_their_lines(file):
    text = """base: digits_uniform
sercher: tpe
batch_size: 3
scheduler: asha
budget: {trails: 3}
settings: {sgld: {step: 3}, seed: 3}
space:
  sgld:
    step_size: {loguniform: [0, 1]}
    steps: {uniform: [5, 20], int: [1, 2]}
    clamps: {choice: [1]}
  workers: {int: [1, 2]}
  objective.energy_l2: {choise: [1, 2]}
  data.noise_std: {uniform: [-1, 1]}
"""
    path = file(text)
    found = problems(path, "nonsense", "space.replay.capacity.int=[5, 3]", "finalists=-1", "batch_size=x")
    kinds = "uniform, loguniform, int, logint, choice, grid"
    assert sorted(found) == sorted(
        [
            "command line: 'nonsense' is not of the form key=value",
            f"{path}:2: sercher: no such setting; did you mean 'searcher'?",
            f"{path}:3: batch_size: is a setting of the runs: written below settings: it is that of every trial",
            f"{path}:4: scheduler: is a group of settings, a mapping was expected",
            f"{path}:5: budget.trails: no such setting; did you mean 'budget.trials'?",
            f"{path}:6: sgld.step: no such setting; did you mean 'sgld.steps'?",
            f"{path}:6: seed: is 3: seed= is the sweep's own, of every trial in the search",
            f"{path}:9: space.sgld.step_size.loguniform: is [0, 1], whose low must be greater than 0",
            f"{path}:10: space.sgld.steps: has uniform and int, must have exactly one of {kinds}",
            f"{path}:11: space.sgld.clamps: no such setting; did you mean 'sgld.clamp'?",
            f"{path}:12: space.workers: cannot be searched: all trials take the same resources",
            f"{path}:13: space.objective.energy_l2.choise: no such kind 'choise'; did you mean 'choice'?",
            f"{path}:14: space.data.noise_std.uniform: has -1, must be at least 0",
            "command line: finalists: is -1, must be at least 0",
            "command line: space.replay.capacity.int: is [5, 3], whose low is not less than its high",
            "command line: batch_size: is 'x', a number was expected",
        ]
    )


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("sgld.steps: {uniform: [5, 20]}", "draws fractions of what is a whole number; write int"),
        ("sgld.steps: {loguniform: [5, 20]}", "write logint"),
        ("sgld.steps: {int: [5.5, 20]}", "is [5.5, 20], must be two whole numbers"),
        ("sgld.steps: {int: [0, 20]}", "has 0, must be at least 1"),
        ("sgld.steps: {int: 5}", "is 5, must be [low, high]"),
        ("sgld.steps: {int: [5, a]}", "has a, a number was expected"),
        ("sgld.steps: {int: [5, .inf]}", "has inf, a number was expected"),
        ("sgld.steps: {choice: []}", "must be a list of what there is to choose from"),
        ("sgld.steps: {choice: 5}", "is 5, must be a list of what there is to choose from"),
        ("sgld.steps: {choice: [5, 6, 5.0]}", "has 5 twice"),
        ("sgld.steps: [5, 6]", "is [5, 6], must say how it is drawn: sgld.steps.KIND with KIND one of uniform,"),
        ("sgld.steps: {}", "sgld.steps is no axis of the space"),
        ("sgld.steps: {when: {sgld.clamp: 1}}", "has only conditions, must have exactly one of"),
        ("model.norm: {choice: [none, bach]}", "has bach, must be one of none, batch, instance, layer, act; did you"),
        ("replay.capacity: {choice: [10, 2000]}", "has 10, must be at least batch_size (64)"),
        (
            "batch_size: {choice: [64, 4000]}",
            "has 4000, with which replay.capacity is 2000, must be at least batch_size",
        ),
        ("data.crop_padding: {int: [0, 8]}", "has 8, must be at most 7: the images are 8 pixels wide or high"),
        ("objective.p_x_y_weight: {choice: [0, 1]}", "with which sgld.conditional is false, must be true when"),
        ("sgld: {choice: [1]}", "sgld: no such setting: a group, of which sgld.SETTING=... sets one"),
        ("evaluate.every: {int: [1, 2]}", "all trials are measured alike, or they could not be compared"),
        ("steps: {int: [1, 2]}", "all trials have the same budget: budget.steps="),
        ("seed: {int: [1, 2]}", "every trial has the sweep's seed"),
        ("data.name: {choice: [digits, mnist5k]}", "cannot be searched: figures of other images cannot be compared"),
        ("sgld.steps: {grid: [1, 2]}", "is for searcher=grid, it is random; write choice in its place"),
        (
            "sgld.steps: {int: [1, 2], when: {sgld.clam: 1}}",
            "sgld.clam is no axis of the space; did you mean 'sgld.clamp'?",
        ),
        ("sgld.steps: {int: [1, 2], when: {sgld.clamp: 2}}", "is 2, but sgld.clamp is one of none, 1"),
        ("sgld.steps: {int: [1, 2], when: {sgld.clamp: [1, 2]}}", "is [1, 2], but sgld.clamp is one of none, 1"),
        ("sgld.steps: {int: [1, 2], when: {sgld.noise_scale: 1}}", "from uniform 0.5 to 2; make that a choice"),
        ("sgld.steps: {int: [1, 2], when: {sgld.steps: 1}}", "the conditions depend on each other in a circle"),
        ("sgld.steps: {int: [1, 2], when: 3}", "is not a mapping of other axes to values"),
    ],
)
def test_a_mistake_in_an_axis_is_named_with_its_line_and_remedy(file, axis, said):
    others = "  sgld.clamp: {choice: [none, 1]}\n  sgld.noise_scale: {uniform: [0.5, 2]}\n"
    path = file(f"base: digits_uniform\nspace:\n  {axis}\n{others}")
    (found,) = problems(path)
    assert found.startswith(f"{path}:3: space.")
    assert said in found


def test_a_circle_of_two_is_said_of_both(file):
    text = """base: digits_uniform
space:
  sgld.steps: {int: [1, 2], when: {sgld.clamp: 1}}
  sgld.clamp: {choice: [none, 1], when: {sgld.steps: 1}}
"""
    assert [p.split(":")[1] for p in problems(file(text))] == ["3", "4"]


def test_a_condition_makes_possible_what_alone_is_not(file):
    text = "base: digits\nspace:\n  replay.capacity: {choice: [2000, 9000]}\n  batch_size: {choice: [64, 4000], when: "
    assert load_sweep(file(text + "{replay.capacity: 9000}}\n"), [])
    assert "has 4000, with which replay.capacity" in problems(file(text + "{replay.capacity: 2000}}\n"))[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("objective=val/acuracy",), "objective: is 'val/acuracy', must be one of val/accuracy, val/nll, val/ece"),
        (("objective=[val/nll, val/nll]",), "must be one figure or several different ones"),
        (("objective=[]",), "must be one figure or several different ones"),
        (("space.init_from.choice=[none, /x.pt]",), "cannot be searched: all trials start from the same weights"),
        (("space.recovery.max.int=[1, 3]",), "cannot be searched: all trials are helped alike where they diverge"),
        ((f"seed={2**31 - 1}",), "too large: the last of the finalists' 3"),
        (("space.sgld.steps.choice=[2020-01-01]",), "2020-01-01"),
        (
            ("objective=[val/nll, val/ece]", "scheduler.name=asha"),
            "compares trials by one objective; use none, or one objective",
        ),
        (("trials=3",), "did you mean 'budget.trials'?"),
        (("sercher=tpe",), "did you mean 'searcher'?"),
        (("sgld.step=3",), "did you mean 'sgld.steps'?"),
        (("scheduler=none",), "scheduler: no such setting: a group, of which scheduler.SETTING=... sets one"),
        (("space=3",), "is a group, of which space.KEY... sets one"),
        (("settings.name=x",), "trials are named by the sweep"),
        (("name=a/b",), "must be a folder's name"),
        (("budget.steps=0",), "budget.steps: is 0, must be at least 1"),
        (("budget.trials=1",), "must be at least 2"),
        (("space.sgld.stps=none",), "sgld.stps is no axis of the space; did you mean 'sgld.steps'?"),
        (("searcher=grid",), "searcher: is grid, but no axis is one; write grid: [...] for one at least"),
        (("scheduler.grace_steps=600",), "is 600, must be less than budget.steps (600), or no trial could end early"),
        (("evaluate.every=200",), "must be at most scheduler.grace_steps (150), when trials are compared"),
        (("workers=65",), "command line: workers: is 65, must be from 1 to batch_size (64)"),
        (("scheduler.name=pbt", "budget.minutes=5"), "cannot be with scheduler.name=pbt, whose trials all go on to"),
        (("scheduler.name=pbt", "searcher=tpe"), "must be random with scheduler.name=pbt"),
        (("scheduler.name=pbt", "budget.trials=3"), "budget.trials: is 3, must be at least 4 with scheduler.name=pbt"),
        (("scheduler.name=pbt", "objective=[val/nll, val/ece]"), "is pbt, which compares trials by one objective"),
        (("scheduler.name=pbt", "scheduler.interval_steps=600"), "must be less than budget.steps (600)"),
        (("scheduler.name=pbt", "evaluate.every=50"), "must divide scheduler.interval_steps (120)"),
        (("scheduler.name=pbt", "checkpoint.every=50"), "must divide scheduler.interval_steps (120)"),
        (
            ("scheduler.name=pbt", "space.batch_size.int=[8, 64]"),
            "space.batch_size: cannot change in the middle of a run, as scheduler.name=pbt does; these can: optimizer.",
        ),
        (("resources.gpu=0", "device=cuda"), "resources.gpu: is 0, but device=cuda"),
        (("resources.gpu=1", "device=cpu"), "resources.gpu: is 1, but device=cpu"),
        (("base=digit",), "command line: base: no recipe 'digit'; did you mean 'digits'?"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(file, arguments, said):
    (found,) = problems(file(), *arguments)
    assert found.startswith("command line: ")
    assert said in found


def test_a_grid_must_fit_the_budget_base_included(file):
    text = "base: digits_uniform\nsearcher: grid\nbudget: {trials: 6}\nspace:\n"
    path = file(text + "  sgld.steps: {grid: [5, 10]}\n  sgld.clamp: {grid: [none, 1, 2]}\n")
    assert load_sweep(path, []), "one of its six points is the base"
    (found,) = problems(path, "budget.trials=5")
    assert "budget.trials: is 5, must be at least 6: each point of the grid, and the base" in found


def test_a_sweep_without_axes_or_without_a_base_is_none(file):
    path = file("base: digits_uniform\nspace: {}\n")
    assert problems(path) == [f"{path}: space: has no axes, so that there is nothing to search"]
    (found,) = problems(file("space: {sgld.steps: {int: [1, 2]}}\n"))
    assert found.startswith("base: is required")
    found = problems(file("base: digitz\nspace: {sgld.steps: {int: [0, 2]}}\nsettings: {batch_size: 0}\n"))
    assert [p.split(": ", 1)[1].split(",")[0] for p in found] == [
        "base: no recipe 'digitz'; did you mean 'digits'? Bundled: cifar10",
        "batch_size: is 0",
        "space.sgld.steps.int: has 0",
    ]


def test_mistakes_in_the_recipe_have_its_lines(file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: digits_uniform\nsgld:\n  steps: 0\n")
    assert problems(file(MINE.replace("base: digits_uniform", "base: recipe.yaml"))) == [
        f"{recipe}:3: sgld.steps: is 0, must be at least 1"
    ]


def test_a_sweep_that_is_not_there_is_named_with_the_nearest(tmp_path):
    found = problems("digits_sgd", "nonsense")
    said = "no sweep 'digits_sgd'; did you mean 'digits_sgld'? Bundled: ablation_digits, ablation_fashion_mnist"
    assert said in found[0]
    assert len(found) == 2
    assert problems(f"{tmp_path}/none.yaml") == [f"no such sweep file: {tmp_path}/none.yaml"]


def test_every_objective_is_what_a_run_measures_and_its_worst_is_bad():
    assert {key: (o.mode, o.worst) for key, o in OBJECTIVES.items()} == {
        "val/accuracy": ("max", 0.0),
        "val/nll": ("min", 100.0),
        "val/ece": ("min", 1.0),
        "val/ood/interp/log_px/auroc": ("max", 0.0),
    }


def test_a_password_does_not_reach_the_file(file):
    sweep = load_sweep(file(), ["tracking.uri=http://me:secret@there"])
    assert sweep.run.tracking.uri == "http://me:secret@there"
    assert "secret" not in to_yaml(sweep)
    assert yaml.safe_load(to_yaml(sweep))["settings"]["tracking"]["uri"] == "http://me:***@there"


def test_a_sweep_is_read_and_explained_without_what_takes_seconds_to_import():
    code = (
        "import sys; from orchestrator.sweep.config import load_sweep;"
        "from orchestrator.sweep.help import settings_help;"
        "load_sweep('loss_weights', []); print(settings_help());"
        "print([m for m in ('torch', 'ray', 'mlflow', 'numpy', 'optuna', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert "budget.trials = 16" in out
    assert "digits_sgld" in out
