"""The arms of an ablation: from a sweep's file and `key=value` arguments to runs, or to all that is wrong with them."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter

import pytest
from made_sweeps import sweep_of

from jem.errors import ConfigError
from jem.settings import digest
from orchestrator.config import load_run_config
from orchestrator.plan import passes
from orchestrator.sweep.ablation import trials_of
from orchestrator.sweep.arms import SHARED
from orchestrator.sweep.config import load_sweep, to_yaml, trial_config
from orchestrator.sweep.help import settings_help
from orchestrator.sweep.plan import plan

ARMS = """\
base: digits_uniform
seeds: 2
settings: {workers: 1, evaluate.suite: fast, recovery.max: 0}
arms:
  plain: {}
  leaky: {model.activation: leaky_relu}
  short: {sgld: {steps: 3, clamp: 1}, steps: 700}
  classifier: {recipe: digits_uniform, objective.p_x_weight: 0}
"""
SETTINGS = ["workers=1", "evaluate.suite=fast", "recovery.max=0", "evaluate.register=false"]


def points(sweep):
    return {arm.name: arm.point for arm in sweep.arms}


def problems(folder, text, *arguments):
    with pytest.raises(ConfigError) as caught:
        sweep_of(folder, text, *arguments)
    return [str(problem).removeprefix(f"{folder}/tiny.yaml:") for problem in caught.value.problems]


def with_arms(lines, rest=""):
    return f"base: digits_uniform\n{rest}arms:\n  plain: {{}}\n" + "".join(f"  {line}\n" for line in lines)


# What is read


def test_an_arm_is_what_it_changes_of_the_base_nested_or_dotted_in_the_order_of_the_file(tmp_path):
    sweep = sweep_of(tmp_path, ARMS)
    assert points(sweep) == {
        "plain": {},
        "leaky": {"model.activation": "leaky_relu"},
        "short": {"sgld.steps": 3, "sgld.clamp": 1.0, "steps": 700},
        "classifier": {"objective.p_x_weight": 0.0},
    }
    assert list(points(sweep)) == ["plain", "leaky", "short", "classifier"]
    assert (sweep.space, sweep.config.seeds, sweep.run.seeds) == ((), 2, 1)


@pytest.mark.parametrize(
    ("arm", "recipe", "settings"),
    [
        ("plain", "digits_uniform", []),
        ("leaky", "digits_uniform", ["model.activation=leaky_relu"]),
        ("short", "digits_uniform", ["sgld.steps=3", "sgld.clamp=1", "steps=700"]),
        ("classifier", "digits_uniform", ["objective.p_x_weight=0"]),
    ],
)
def test_each_trial_is_the_run_that_jobs_train_would_make_of_its_settings(tmp_path, arm, recipe, settings):
    sweep = sweep_of(tmp_path, ARMS)
    place = {"name": f"{arm}-s1", "seed": 1, "storage_path": "x"}
    typed = [f"{key}={value}" for key, value in place.items()]
    expected = load_run_config(recipe, [*SETTINGS, *settings, *typed])
    assert trial_config(sweep, points(sweep)[arm], **place) == expected


def test_all_arms_begin_with_the_first_seed_before_any_does_with_the_next(tmp_path):
    trials = trials_of(sweep_of(tmp_path, ARMS, "seed=3", "arms.short=none"))
    assert [trial.name for trial in trials] == [
        *("plain-s3", "leaky-s3", "classifier-s3"),
        *("plain-s4", "leaky-s4", "classifier-s4"),
    ]
    assert [trial.number for trial in trials] == list(range(6))
    assert {(trial.stage, trial.candidate, trial.seed) for trial in trials[3:5]} == {
        ("ablation", "plain", 4),
        ("ablation", "leaky", 4),
    }


def test_a_recipe_brings_what_is_trained_and_not_where_or_how(tmp_path):
    (tmp_path / "other.yaml").write_text(
        "base: digits_uniform\nworkers: 3\nseed: 9\nsteps: 50\nbatch_size: 32\nsgld: {steps: 4, clamp: 2}\n"
        "evaluate: {every: 7, suite: full}\ncheckpoint: {every: 8}\ntracking: {every: 9}\n"
    )
    text = with_arms(["other: {recipe: other.yaml, sgld.steps: 6}"], "settings: {workers: 1, sgld.clamp: 1}\n")
    sweep = sweep_of(tmp_path, text)
    assert points(sweep)["other"] == {"batch_size": 32, "sgld.steps": 6, "steps": 50}, "the sweep's clamp stays"
    assert points(sweep_of(tmp_path, text, "steps=20"))["other"] == {"batch_size": 32, "sgld.steps": 6}


def test_what_a_base_has_and_an_arms_recipe_has_not_is_not_the_arms(tmp_path):
    (tmp_path / "base.yaml").write_text("base: digits_uniform\nsgld: {clamp: 2}\n")
    sweep = sweep_of(
        tmp_path, with_arms(["free: {recipe: digits_uniform}"]).replace("base: digits_uniform", "base: base.yaml")
    )
    assert points(sweep)["free"] == {"sgld.clamp": None}


def test_arms_may_be_measured_on_test_data_and_register_nothing_unless_asked(tmp_path):
    run = sweep_of(tmp_path, ARMS.replace("evaluate.suite: fast", "evaluate.suite: full")).run
    assert (run.evaluate.suite, run.evaluate.register) == ("full", False)
    assert sweep_of(tmp_path, ARMS, "evaluate.register=true", "evaluate.suite=none").run.evaluate.register
    assert sweep_of(tmp_path, ARMS).run.evaluate.every == load_run_config("digits_uniform", []).evaluate.every


def test_averaged_weights_are_measured_in_the_arm_that_has_them(tmp_path):
    sweep = sweep_of(tmp_path, with_arms(["ema: {optimizer.ema_decay: 0.9, evaluate.ema: true}"]))
    assert trial_config(sweep, points(sweep)["ema"]).evaluate.ema
    assert not sweep.run.evaluate.ema


@pytest.mark.parametrize(("base", "recipe"), [("digits_uniform", "digits"), ("digits", "digits_uniform")])
def test_an_arm_of_another_recipe_averages_and_measures_as_that_one_does(tmp_path, base, recipe):
    lines = with_arms([f"other: {{recipe: {recipe}}}"]).replace("base: digits_uniform", f"base: {base}")
    sweep = sweep_of(tmp_path, lines)
    other, alone = trial_config(sweep, points(sweep)["other"]), load_run_config(recipe, [])
    assert (other.evaluate.ema, other.optimizer.ema_decay) == (alone.evaluate.ema, alone.optimizer.ema_decay)


# The name


def test_the_name_is_that_of_the_file_and_a_digest_of_what_is_trained_and_measured(tmp_path):
    sweep = sweep_of(tmp_path, ARMS)
    assert sweep.name == f"tiny-{digest(sweep.science)}"
    assert sweep.science["baseline"] == "plain"
    assert sweep.science["arms.short"]["steps"] == 700
    same = [["seeds=9"], ["workers=2"], ["budget.minutes=5"], ["tracking.every=3"], ["evaluate.register=true"]]
    assert {sweep_of(tmp_path, ARMS, *typed).name for typed in same} == {sweep.name}
    other = [
        *(["seed=1"], ["steps=100"], ["arms.short.steps=701"], ["arms.leaky=none"], ["arms.more.batch_size=32"]),
        *(
            ["evaluate.suite=none"],
            ["evaluate.every=3"],
            ["recovery.max=1"],
            ["sgld.step_size=2"],
        ),
    ]
    names = [sweep_of(tmp_path, ARMS, *typed).name for typed in other]
    assert len({sweep.name, *names}) == len(other) + 1
    assert sweep_of(tmp_path, ARMS, "name=mine").name == "mine"


@pytest.mark.parametrize("typed", [(), ("arms.short=none", "name=x", "tracking.every=3", "seed=4", "steps=9")])
def test_an_ablation_as_a_file_gives_itself_again(tmp_path, typed):
    sweep = sweep_of(tmp_path, ARMS, *typed)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(sweep))
    again = load_sweep(str(path), [])
    assert (again.run, again.arms, again.science) == (sweep.run, sweep.arms, sweep.science)
    assert (again.config, again.name) == (replace(sweep.config, name=sweep.name), sweep.name)


# The command line


def test_arms_are_added_changed_and_removed_on_the_command_line(tmp_path):
    typed = [
        *("arms.leaky.sgld.steps=2", "arms.short=none", "arms.decay.optimizer.weight_decay=1e-3", "arms.decay.steps=9"),
        *("arms.whole={sgld: {steps: 4}, optimizer.clip_norm: 1}", "arms.other.recipe=digits_unstable"),
    ]
    assert points(sweep_of(tmp_path, ARMS, "arms.classifier=none", *typed)) == {
        "plain": {},
        "leaky": {"model.activation": "leaky_relu", "sgld.steps": 2},
        "decay": {"optimizer.weight_decay": 0.001, "steps": 9},
        "whole": {"sgld.steps": 4, "optimizer.clip_norm": 1.0},
        "other": {
            **{"model.activation": "leaky_relu", "sgld.steps": 3, "steps": 1200},
            **{"optimizer.learning_rate": 0.005, "optimizer.decay_steps": [1000], "optimizer.decay_rate": 0.1},
        },
    }


def test_typed_settings_are_of_all_arms_but_an_arms_own_wins(tmp_path):
    sweep = sweep_of(tmp_path, ARMS, "sgld.steps=5", "steps=40", "evaluate.suite=none")
    runs = {arm.name: trial_config(sweep, arm.point) for arm in sweep.arms}
    assert {name: run.sgld.steps for name, run in runs.items()} == {
        **{"plain": 5, "leaky": 5, "short": 3, "classifier": 5},
    }
    assert {name: run.steps for name, run in runs.items()} == {
        **{"plain": 40, "leaky": 40, "short": 700, "classifier": 40},
    }
    assert {run.evaluate.suite for run in runs.values()} == {"none"}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("arms.leeky=none", "command line: arms.leeky: no such arm; did you mean 'leaky'?"),
        ("arms.leaky=3", "command line: arms.leaky: is 3, must be a mapping of settings; {} for the base as it is"),
        ("arms.leaky.sgld.step=3", "command line: arms.leaky.sgld.step: no such setting; did you mean 'sgld.steps'?"),
        ("arms=3", "command line: arms: is a group, of which arms.KEY... sets one"),
        ("evaluate.suite=most", "command line: evaluate.suite: is 'most', must be one of none, fast, full, paper"),
    ],
)
def test_what_is_typed_wrongly_is_told(tmp_path, typed, said):
    assert said in "\n".join(problems(tmp_path, ARMS, typed))


# Mistakes


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("x: {model.activaton: silu}", "4: arms.x.model.activaton: no such setting; did you mean 'model.activation'?"),
        ("x: {model.activation: gelu}", "4: arms.x.model.activation: is 'gelu', must be one of leaky_relu, silu"),
        ("x: {model: {}}", "4: arms.x.model: no such setting: a group, of which model.SETTING=... sets one"),
        ("x: {evaluate.ema: true}", "4: arms.x.evaluate.ema: is true, but no weights are averaged"),
        ("x: {objective.p_x_y_weight: 1}", "4: arms.x: gives a run whose sgld.conditional is false, must be true"),
        ("x: {data.crop_padding: 8}", "4: arms.x.data.crop_padding: is 8, must be at most 7"),
        ("x: {recipe: digit}", "4: arms.x.recipe: no recipe 'digit'; did you mean 'digits'?"),
        ("x: {recipe: nowhere.yaml}", "4: arms.x.recipe: no such recipe file: "),
        ("x: {recipe: 3}", "4: arms.x.recipe: is 3, must be a recipe's name or file"),
        ("x: {base: digits}", "4: arms.x.base: no such setting; did you mean 'recipe'?"),
        (
            "x: {}",
            "4: arms.x: is the base as it is: write it first, for the others to be compared with, or leave it out",
        ),
        ("x: {sgld.steps: 10}", "4: arms.x: is the base as it is"),
        ("x:", "4: arms.x: is the base as it is"),
        ("x: 5", "4: arms.x: is 5, must be a mapping of settings"),
        ("a/b: {steps: 3}", "4: arms.a/b: must be named by letters, digits and underscores: it names folders"),
        ("f-x: {steps: 3}", "4: arms.f-x: must be named by letters, digits and underscores"),
    ],
)
def test_an_arm_that_cannot_be_is_told_with_its_line(tmp_path, arm, said):
    (found,) = problems(tmp_path, with_arms([arm]))
    assert found.startswith(said)


def test_two_arms_that_train_the_same_are_told(tmp_path):
    arms = ["a: {sgld: {clamp: 1}}", "b: {sgld.clamp: 1.0, sgld.steps: 10}"]
    said = "5: arms.b: trains what a does; give it a setting of its own, or leave it out"
    assert problems(tmp_path, with_arms(arms)) == [said]


@pytest.mark.parametrize("key", sorted(SHARED))
def test_where_and_how_is_the_same_for_all_arms(tmp_path, key):
    inside = {"tracking": "every", "evaluate": "suite", "checkpoint": "every", "recovery": "max"}
    whole = f"{key}.{inside[key]}" if key in inside else key
    (found,) = problems(tmp_path, with_arms([f"x: {{{whole}: 2, steps: 3}}"]))
    assert found.startswith(f"4: arms.x.{whole}: cannot differ between arms: {SHARED[key]}")
    assert ("; settings." in found) == (key not in ("name", "seed", "seeds"))


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("objective: val/nll", "objective"),
        ("searcher: tpe", "searcher"),
        ("scheduler: {name: asha}", "scheduler.name"),
        ("scheduler: {quantile: 0.5}", "scheduler.quantile"),
        ("budget: {trials: 4, minutes: 3}", "budget.trials"),
        ("finalists: 0", "finalists"),
    ],
)
def test_what_is_of_a_search_is_refused_beside_arms(tmp_path, line, key):
    said = "is of a search, and arms are all trained, to the end and with every seed; leave it out"
    assert problems(tmp_path, with_arms(["x: {steps: 3}"], f"{line}\n")) == [f"2: {key}: {said}"]


def test_a_space_beside_arms_is_refused(tmp_path):
    text = with_arms(["x: {steps: 3}"], "space: {sgld.steps: {int: [1, 2]}}\n")
    said = (
        "space.sgld.steps.int: is searched, and there are arms, which are all trained; leave out the arms or the space"
    )
    assert problems(tmp_path, text) == [f"2: {said}"]
    assert problems(tmp_path, ARMS, "space.sgld.steps.int=[1,2]") == [f"command line: {said}"]


@pytest.mark.parametrize("key", ["name", "seed", "seeds", "steps"])
def test_what_the_sweep_sets_itself_is_no_setting_of_its_runs(tmp_path, key):
    (found,) = problems(tmp_path, with_arms(["x: {batch_size: 3}"], f"settings: {{{key}: 3}}\n"))
    assert found.startswith(f"2: {key}: is 3: ")


def test_seeds_that_cannot_be(tmp_path):
    (found,) = problems(tmp_path, ARMS, f"seed={2**31 - 2}", "seeds=3")
    assert found == f"command line: seeds: is 3, too many: the last seed, {2**31}, must be below 2**31"


def test_a_recipe_of_other_data_is_no_arm(tmp_path):
    (found,) = problems(tmp_path, with_arms(["x: {recipe: mnist5k}"]))
    assert found == "4: arms.x.recipe: mnist5k is of the data mnist5k, and arms are compared on the same, digits"


def test_every_mistake_is_in_one_error(tmp_path):
    text = with_arms(
        ["a: {sgld.steps: x}", "b: {model.nam: y}", "c: {workers: 2}"], "finalists: 2\nsettings: {sedd: 1}\n"
    )
    found = problems(tmp_path, text, "arms.d=none", "seeds=0")
    keys = ("finalists", "sedd", "arms.a.sgld.steps", "arms.b.model.nam", "arms.c.workers", "arms.d", "seeds")
    assert sorted(problem.split(": ")[1] for problem in found) == sorted(keys)


def test_without_a_base_the_arms_are_checked_alone(tmp_path):
    found = "\n".join(
        problems(tmp_path, with_arms(["x: {sgld.steps: x}"]).replace("base: digits_uniform", "base: nothing"))
    )
    assert "1: base: no recipe 'nothing'" in found
    assert "4: arms.x.sgld.steps: is 'x'" in found


def test_no_arms_and_no_space_is_nothing_to_do(tmp_path):
    assert "arms: are all removed" in "\n".join(problems(tmp_path, with_arms([]), "arms.plain=none"))
    assert "space: has no axes, so that there is nothing to search" in "\n".join(
        problems(tmp_path, "base: digits_uniform\narms: {}\n")
    )


# --dry-run and --help


def test_a_plan_shows_each_arms_settings_steps_and_cost_beside_a_classifier(tmp_path, capsys):
    asked = sweep_of(tmp_path, ARMS, f"storage_path={tmp_path}", "name=mine", "device=cpu")
    result = plan(asked, 2, 0, 64)
    out = capsys.readouterr().out
    cost = {arm.name: passes(trial_config(asked, arm.point)) for arm in asked.arms}
    assert cost == {"plain": 26, "leaky": 26, "short": 12, "classifier": 3}
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert lines["plain"] == ["plain", "1,500", "26", "8.7", "the", "base"]
    assert lines["short"] == ["short", "700", "12", "4.0", "sgld.steps=3", "sgld.clamp=1", "steps=700"]
    assert lines["classifier"] == ["classifier", "1,500", "3", "1.0", "objective.p_x_weight=0"]
    for text in (f"{tmp_path}/mine\n", "2 at once: trials x", "8 trials; no limit of time", "2: 0 to 1"):
        assert text in out, text
    assert (result.status, result.name) == ("planned", "mine")
    steps = 2 * (3 * 1500 + 700)
    total = 2 * (1500 * (26 + 26 + 3) + 700 * 12)
    assert result.metrics == {
        **{"arms": 4, "trials": 8, "steps": steps, "passes": total, "at_once": 2},
        **{f"{name}/passes_per_step": passes_ for name, passes_ in cost.items()},
        **{f"{name}/times_a_classifier": passes_ / 3 for name, passes_ in cost.items()},
        **{f"{name}/steps": 700 if name == "short" else 1500 for name in cost},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


def test_no_more_trials_at_once_than_there_are(tmp_path, capsys):
    assert plan(sweep_of(tmp_path, ARMS, "device=cpu"), 64, 0, 512).metrics["at_once"] == 8
    assert "limited by the arms" in capsys.readouterr().out


def test_help_tells_of_arms():
    text = settings_help()
    assert "arms.NAME.KEY=VALUE" in text
    assert "ablation_digits" in text


def test_the_bundled_ablation_is_there():
    sweep = load_sweep("ablation_digits", [])
    first, *_, last = names = list(points(sweep))
    assert (first, last, len(names)) == ("baseline", "classifier", 22)
    assert points(sweep)["baseline"] == {}, "the paper's techniques alone"
    assert (sweep.config.base, sweep.config.seeds, sweep.run.workers) == ("digits_paper", 5, 1)
    assert sweep.run.recovery.max == 0, "what diverges is counted"
    assert (sweep.run.evaluate.suite, sweep.config.resources.cpu) == ("full", 1)


def test_the_one_on_fashion_mnist_ends_with_its_recipe():
    sweep = load_sweep("ablation_fashion_mnist", [])
    arms = points(sweep)
    assert list(arms) == ["baseline", "gaussian_prior", "ema", "combined", "combined_full_weight", "classifier"]
    assert (sweep.config.base, sweep.config.seeds, sweep.run.recovery.max) == ("fashion_mnist_paper", 3, 0)
    recipe = load_run_config("fashion_mnist", [])
    combined = arms["combined"]
    same = {key: value for key, value in combined.items() if not key.startswith(("optimizer.", "steps"))}
    for key, value in same.items():
        assert attrgetter(key)(recipe) == value, "all that the recipe has"
    share = [round(step / combined["steps"], 3) for step in combined["optimizer.decay_steps"]]
    assert share == pytest.approx([step / recipe.steps for step in recipe.optimizer.decay_steps], abs=1e-3)
