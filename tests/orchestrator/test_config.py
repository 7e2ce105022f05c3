"""From a recipe and `key=value` arguments to a run's configuration, or to all that is wrong with them."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import yaml

from jem.errors import ConfigError
from jem.files import Location
from jem.settings import flatten
from orchestrator.config import RunConfig, bundled_recipes, from_flat, load_run_config, to_yaml
from orchestrator.remedies import LADDER, remedied
from orchestrator.runs import write_config

SCIENCE = (
    *("seed", "batch_size", "precision", "compile", "init_from"),
    *("model", "data", "optimizer", "sgld", "replay", "objective"),
)
FAMILIES = ("digits", "mnist5k", "fashion_mnist", "cifar10", "cifar100", "svhn")

OTHER = {
    "seed": "1",
    "batch_size": "63",
    "precision": "bf16",
    "compile": "true",
    "init_from": "/a.pt",
    "model.name": "mine:net",
    "model.depth": "22",
    "model.width": "2",
    "model.channels": "[8, 8]",
    "model.norm": "layer",
    "model.activation": "leaky_relu",
    "model.options": "{a: 1}",
    "data.name": "mnist5k",
    "data.root": "/data",
    "data.download": "false",
    "data.validation_size": "100",
    "data.image_size": "32",
    "data.channels": "1",
    "data.noise_std": "0.2",
    "data.stream": "true",
    "data.crop_padding": "1",
    "data.flip": "true",
    "data.augment_p_x": "false",
    "data.labels_per_class": "7",
    "data.labelled_batch_size": "7",
    "data.options": "{a: 1}",
    "optimizer.name": "sgd",
    "optimizer.learning_rate": "1e-2",
    "optimizer.betas": "[0.5, 0.9]",
    "optimizer.momentum": "0.5",
    "optimizer.weight_decay": "1e-5",
    "optimizer.warmup_steps": "7",
    "optimizer.decay_steps": "[7, 9]",
    "optimizer.decay_rate": "0.5",
    "optimizer.clip_norm": "1",
    "optimizer.ema_decay": "0.99",
    "optimizer.sam_rho": "0.05",
    "optimizer.sam_adaptive": "true",
    "sgld.steps": "7",
    "sgld.step_size": "2",
    "sgld.noise_scale": "0.02",
    "sgld.conditional": "true",
    "sgld.gradient_clamp": "2",
    "sgld.clamp": "1.5",
    "replay.capacity": "777",
    "replay.reinit_prob": "0.1",
    "sgld.normalize_gradient": "true",
    "sgld.inner_steps": "7",
    "sgld.final_step_size": "0.1",
    "sgld.final_noise_scale": "0.001",
    "sgld.max_steps": "77",
    "replay.prior": "gaussian",
    "replay.prior_noise": "0.1",
    "replay.prior_rank": "7",
    "replay.uniform_share": "0.5",
    "replay.dtype": "float16",
    "objective.p_y_given_x_weight": "2",
    "objective.p_x_weight": "2",
    "objective.p_x_y_weight": "1",
    "objective.energy_l2": "0.5",
    "objective.p_x_loss": "bce",
    "objective.p_x_given_y_weight": "0.5",
    "objective.mass_weight": "0.3",
    "objective.kl_weight": "0.3",
    "objective.kl_samples": "7",
    "workers": "3",
    "steps": "77",
    "seeds": "3",
    "device": "cpu",
    "deterministic": "true",
    "storage_path": "/elsewhere",
    "checkpoint.every": "7",
    "checkpoint.keep": "7",
    "recovery.max_failures": "7",
    "checkpoint.spaced": "7",
    "checkpoint.max_failures": "7",
    "recovery.hang_timeout": "7",
    "recovery.every": "7",
    "recovery.healthy_steps": "7",
    "recovery.max": "7",
    "recovery.ladder": "[seed]",
    "recovery.relax_steps": "7",
    "tracking.uri": "http://there",
    "tracking.experiment": "other",
    "tracking.every": "7",
    "tracking.images_every": "7",
    "evaluate.suite": "none",
    "evaluate.sets": "[rot90]",
    "evaluate.max_images": "7",
    "evaluate.register": "false",
    "evaluate.model_name": "mine",
    "evaluate.champion": "ece",
    "evaluate.input_layout": "NCHW",
    "evaluate.input_dtype": "float32",
    "evaluate.every": "7",
    "evaluate.final": "best",
    "evaluate.ema": "true",
    "evaluate.noise_std": "0.1",
    "evaluate.attack.images": "7",
    "evaluate.attack.linf": "[0.1, 0.3]",
    "evaluate.attack.l2": "[0.1, 3]",
    "evaluate.attack.refine": "[0, 2]",
    "evaluate.attack.copies": "2",
    "evaluate.attack.copy_noise": "0.1",
    "evaluate.attack.steps": "7",
    "evaluate.attack.restarts": "1",
    "evaluate.attack.min_norm_steps": "7",
    "evaluate.attack.queries": "7",
    "evaluate.generate.samples": "70",
    "evaluate.generate.steps": "7",
    "evaluate.generate.inception": "/a.pth",
    "evaluate.generate.chains": "3",
    "evaluate.generate.lengths": "[1, 2]",
}
NEEDS = {
    **dict.fromkeys(("data.image_size", "data.channels"), ("data.name=my.images:all", "data.crop_padding=0")),
    "data.stream": ("data.name=parquet", "data.root=/data"),
    "model.options": ("model.name=mine:net",),
    "data.options": ("data.name=mine:data",),
    "objective.p_x_y_weight": ("sgld.conditional=true",),
    "objective.kl_samples": ("objective.kl_weight=0.3",),
    "data.labelled_batch_size": ("data.labels_per_class=9",),
    "evaluate.ema": ("optimizer.ema_decay=0.9",),
    "optimizer.sam_adaptive": ("optimizer.sam_rho=0.5",),
}
ALL_SETTINGS = [key for key in flatten(load_run_config("digits", [])) if key != "name"]


def problems(recipe, *arguments):
    with pytest.raises(ConfigError) as caught:
        load_run_config(str(recipe), arguments)
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe; lines are numbered from 1."""

    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


# Recipes


def test_every_family_has_its_recipe_and_its_twins():
    assert set(bundled_recipes()) >= {f"{f}{twin}" for f in FAMILIES for twin in ("", "_paper", "_classifier")}


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_bundled_recipe_builds(name):
    config = load_run_config(name, [])
    assert config.name == f"{name}-{config.digest}"
    assert config.checkpoint.every <= config.steps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_paper_twin_has_the_papers_settings(family):
    config = load_run_config(f"{family}_paper", [])
    assert (config.batch_size, config.model.norm, config.model.activation) == (64, "none", "leaky_relu")
    assert config.precision == "float32"
    o = config.optimizer
    assert (o.name, o.learning_rate, o.betas, o.weight_decay) == ("adam", 1e-4, (0.9, 0.999), 0)
    assert (o.warmup_steps, o.decay_rate, len(o.decay_steps)) == (1000, 0.3, 2)
    assert [round(step / config.steps * 150) for step in o.decay_steps] == [50, 100]  # of 150 epochs
    assert (o.clip_norm, o.ema_decay) == (None, 0)
    s = config.sgld
    assert (s.steps, s.step_size, s.noise_scale, s.clamp, s.conditional) == (20, 1.0, 0.01, None, False)
    assert (config.replay.capacity, config.replay.reinit_prob, config.replay.prior) == (10_000, 0.05, "uniform")
    j = config.objective
    assert (j.p_x_weight, j.p_y_given_x_weight, j.p_x_y_weight, j.energy_l2) == (1, 1, 0, 0)
    assert config.data.noise_std == 0.03
    assert config.data.name == family
    if family in ("cifar10", "cifar100", "svhn"):
        assert (config.model.name, config.model.depth, config.model.width) == ("wide_resnet", 28, 10)
        assert config.data.crop_padding == 4
        assert config.data.flip == (family != "svhn")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_twin_differs_in_its_objective_alone(family):
    plain, classifier = load_run_config(family, []), load_run_config(f"{family}_classifier", [])
    assert not classifier.objective.samples_needed
    assert plain.objective.samples_needed
    changed = {key for key, value in flatten(plain).items() if flatten(classifier)[key] != value}
    assert changed - {"name"} <= {"objective.p_x_weight", "objective.energy_l2"}


# Names


def test_other_lists_every_setting():
    assert set(OTHER) == set(ALL_SETTINGS)


@pytest.mark.parametrize("key", [key for key in ALL_SETTINGS if OTHER[key] is not None])
def test_the_digest_changes_with_the_science_and_with_nothing_else(key):
    base = load_run_config("digits_uniform", NEEDS.get(key, ()))
    other = load_run_config("digits_uniform", [*NEEDS.get(key, ()), f"{key}={OTHER[key]}"])
    assert flatten(other)[key] != flatten(base)[key]
    assert (other.name != base.name) == (key.split(".")[0] in SCIENCE)


def test_a_run_is_named_after_the_recipes_file(recipe):
    path = recipe("base: digits\n", "my_own.yaml")
    assert load_run_config(str(path), []).name.startswith("my_own-")
    assert load_run_config(str(path), ["name=other"]).name == "other"
    assert load_run_config("digits", []).name == load_run_config("digits", ["steps=7", "workers=1"]).name


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ((), "jem-digits"),
        (("data.name=my.images:all_of_them", "data.crop_padding=0"), "jem-my.images-all_of_them"),
        (("data.name=parquet", "data.root=./my photos/32x32/", "data.crop_padding=0"), "jem-32x32"),
        (("data.name=parquet", "data.root=/", "data.crop_padding=0"), "jem-parquet"),
        (("data.name=parquet", "data.root=./фото", "data.crop_padding=0"), "jem-parquet"),
        (("data.name=parquet", "data.root=s3://bucket/photos?region=x", "data.crop_padding=0"), "jem-photos"),
        (("evaluate.model_name=mine-2",), "mine-2"),
        (("evaluate.model_name=none",), "jem-digits"),
    ],
)
def test_a_registered_model_is_named_after_its_data_or_as_asked(settings, name):
    assert load_run_config("digits", settings).registered_name == name


@pytest.mark.parametrize("name", ["a/b", "a b", ".hidden", "", "a\\b", "a" * 201, "é" * 101])
def test_a_name_must_be_a_folders(name):
    assert any("must be a folder's name" in p for p in problems("digits", f"name={name}"))


def test_a_name_is_not_that_of_mlflows_files_beside_the_runs():
    assert any("lies beside the runs" in p for p in problems("digits", "name=mlflow.db"))
    assert load_run_config("digits", ["name=" + "a" * 200]).name == "a" * 200


def test_folders_of_outliers_are_those_of_where_the_command_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_run_config("digits", ["evaluate.sets=[interp,./photos,s3://bucket/a]"])
    assert list(config.evaluate.sets) == ["interp", f"{tmp_path}/photos", "s3://bucket/a"]


# Mistakes


def test_a_files_name_need_be_no_folders(recipe):
    path = recipe("base: digits\n")
    spaced = path.rename(path.with_name("my best recipe.yaml"))
    assert load_run_config(str(spaced), []).name == f"my-best-recipe-{load_run_config('digits', []).digest}"


def test_a_sweep_is_no_recipe_and_what_runs_it_is_said(recipe):
    path = recipe("base: digits\nspace: {sgld.steps: {int: [1, 4]}}\n")
    with pytest.raises(ConfigError, match=f"is a sweep: python jobs/sweep.py {path}"):
        load_run_config(str(path), [])


def test_all_mistakes_of_file_and_command_line_come_at_once_with_their_origin(recipe):
    path = recipe(
        """base: digits
sgld:
  step: 20
  step_size: -1
objective:
  p_x_weight: much
seed: 1.5
replay: 7
data:
  nam: digits
""",
    )
    found = problems(path, "optimiser.learning_rate=1", "batch_size=0", "nonsense", "model.norm=bach", "workers=[1")
    assert sorted(found) == sorted(
        [
            f"{path}:3: sgld.step: no such setting; did you mean 'sgld.steps'?",
            f"{path}:4: sgld.step_size: is -1, must be greater than 0",
            f"{path}:6: objective.p_x_weight: is 'much', a number was expected",
            f"{path}:7: seed: is 1.5, a whole number was expected",
            f"{path}:8: replay: is a group of settings, a mapping was expected",
            f"{path}:10: data.nam: no such setting; did you mean 'data.name'?",
            "command line: optimiser.learning_rate: no such setting; did you mean 'optimizer.learning_rate'?",
            "command line: batch_size: is 0, must be at least 1",
            "command line: 'nonsense' is not of the form key=value",
            "command line: model.norm: is 'bach', must be one of none, batch, instance, layer, act; did you mean "
            "'batch'?",
            "command line: workers: is '[1', which is not a YAML value",
        ]
    )


def test_a_ladder_is_checked_against_the_settings_it_will_change():
    halved = load_run_config("digits_uniform", ["sgld.clamp=1", "recovery.ladder=[sgld.clamp*0.5]"])
    assert halved.recovery.ladder == ("sgld.clamp*0.5",)
    for ladder, said in (
        ("[sgld.clamp*0.5]", "sgld.clamp: is none, which cannot be multiplied; use sgld.clamp=VALUE"),
        ("[seed, sgld.stps*2]", "did you mean sgld.steps?"),
        ("[sgld.steps*two]", "where 'two' is no number"),
        ("[sgld.steps=0]", "sgld.steps: is 0, must be at least 1"),
        ("[sgld.clamp<=low]", "where 'low' is no number"),
        ("[sgld.clamp<=]", "where '' is no number"),
        ("[sgld.steps*2=3]", "must be seed, KEY*FACTOR, KEY=VALUE, KEY>=LEAST or KEY<=MOST"),
        ("[objective.p_x_weight=0 objective.p_y_given_x_weight=0]", "nothing would be trained"),
    ):
        (found,) = problems("digits_uniform", f"recovery.ladder={ladder}")
        assert "recovery.ladder: has" in found
        assert said in found, ladder


@pytest.mark.parametrize(
    ("settings", "change", "expected"),
    [
        (["objective.energy_l2=0.01"], "objective.energy_l2*2>=0.1", {"objective.energy_l2": 0.1}),
        (["objective.energy_l2=0.5"], "objective.energy_l2*2>=0.1", {"objective.energy_l2": 1.0}),
        (["objective.energy_l2=0.5"], "objective.energy_l2>=0.1", {}),
        ([], "sgld.clamp<=1", {"sgld.clamp": 1.0}),
        (["sgld.clamp=0.5"], "sgld.clamp<=1", {}),
        ([], "sgld.clamp*0.5<=1", {"sgld.clamp": 1.0}),
        (["optimizer.clip_norm=none"], "optimizer.clip_norm>=1", {}),
        (["sgld.steps=4", "sgld.max_steps=40"], "sgld.steps>=10", {"sgld.steps": 10, "sgld.max_steps": 100}),
        (["sgld.steps=20"], "sgld.steps>=10", {}),
        ([], "seed", {}),
    ],
)
def test_a_remedy_with_a_bound_never_loosens_what_is_tighter(settings, change, expected):
    before = load_run_config("digits_uniform", [*settings, f"recovery.ladder=[{change}]"])
    after = flatten(remedied(before, change))
    assert {key: value for key, value in after.items() if value != flatten(before)[key]} == expected


@pytest.mark.parametrize("recipe", bundled_recipes())
def test_no_remedy_of_the_ladder_undoes_what_a_bundled_recipe_does_for_stability(recipe):
    before = load_run_config(recipe, [])
    after = before
    for remedy in LADDER:
        for change in remedy.split():
            after = remedied(after, change)
    old, new = flatten(before), flatten(after)
    assert new["objective.energy_l2"] > old["objective.energy_l2"]
    assert new["optimizer.learning_rate"] < old["optimizer.learning_rate"]
    assert new["sgld.steps"] > old["sgld.steps"]
    for key in ("sgld.clamp", "sgld.gradient_clamp"):
        assert new[key] <= (old[key] or math.inf), key


def test_values_that_do_not_go_together_are_found_in_all_groups_at_once():
    found = problems("cifar10", "model.depth=29", "optimizer.decay_steps=[2, 1]", "replay.capacity=10", "workers=65")
    text = "\n".join(found)
    for key in ("model.depth: is 29", "optimizer.decay_steps: is [2, 1]", "replay.capacity: is 10", "workers: is 65"):
        assert f"command line: {key}" in text
    assert len(found) == 4


@pytest.mark.parametrize("mistake", ["optimizer.decay_steps=[2, 1]", "optimizer.ema_decay=much"])
def test_a_mistake_in_one_group_is_not_told_as_one_in_another(mistake):
    (found,) = problems("digits", mistake)  # whose evaluate.ema needs optimizer.ema_decay
    assert f"command line: {mistake.split('=')[0]}: " in found
    (found,) = problems("digits", "optimizer.ema_decay=0")
    assert "evaluate.ema: is true, but no weights are averaged" in found


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("sgld.steps=0", "is 0, must be at least 1"),
        ("sgld.noise_scale=.nan", "is nan, must be at least 0"),
        ("optimizer.learning_rate=.inf", "is inf, must be greater than 0"),
        ("replay.reinit_prob=1.01", "is 1.01, must be at least 0 and at most 1"),
        ("optimizer.betas=[0.9]", "has 1 entries, must have two"),
        ("optimizer.betas=0.9", "is 0.9, a list was expected: [0.9]"),
        ("evaluate.sets=uniform", "is 'uniform', a list was expected: [uniform]"),
        ("device=gpu", "did you mean 'cuda'?"),
        ("data.flip=1", "is 1, true or false was expected"),
        ("seed=true", "is true, a whole number was expected"),
        ("seed=-1", "is -1, must be at least 0"),
        ("seed=none", "is 'none', a number was expected"),
        ("steps=1e-1", "a whole number was expected"),
        ("data.name=cifar11", "did you mean 'cifar10'?"),
        ("data.name=imagefolder", "data.root: is required for data.name=imagefolder"),
        ("data.labelled_batch_size=3", "has no effect without data.labels_per_class"),
        ("data.augment_p_x=false data.noise_std=0", "no training image has noise, is cropped or mirrored; set data.n"),
        ("data.augment_p_x=false objective.p_x_weight=0", "no term sees those images; set objective.p_x_weight"),
        (
            "data.augment_p_x=false objective.p_x_y_weight=1 sgld.conditional=true data.labels_per_class=7",
            "data.augment_p_x: is false, must be true with objective.p_x_y_weight and data.labels_per_class",
        ),
        ("objective.kl_samples=7", "has no effect without objective.kl_weight; set that, to 0.3 say"),
        ("objective.kl_weight=1 objective.kl_samples=65", "is 65, must be at most batch_size (64): a step's chains"),
        ("objective.p_x_loss=bce objective.p_x_weight=0", "is bce, which has no effect without objective.p_x_weight"),
        ("objective.p_x_loss=bce sgld.max_steps=40", "sgld.max_steps: does not go with objective.p_x_loss=bce, whose"),
        ("sgld.normalize_gradient=true sgld.inner_steps=2", "sgld.inner_steps: must be 1 with sgld.normalize_gradient"),
        ("sgld.normalize_gradient=true objective.kl_weight=1", "is positive, must be 0 with sgld.normalize_gradient"),
        ("objective.kl_weight=1 objective.p_x_weight=0", "is positive, but no chains are run; set objective.p_x_w"),
        ("optimizer.sam_adaptive=true", "has no effect without optimizer.sam_rho; set that, to 0.5 say"),
        ("objective.p_x_y_weight=1", "sgld.conditional: is false, must be true"),
        ("evaluate.ema=true", "no weights are averaged; set optimizer.ema_decay"),
        ("evaluate.model_name=a/b", "is 'a/b', must be letters, digits, dots, dashes and underscores"),
        ("evaluate.attack.linf=[0.2,0.1]", "must have entries that rise from one to the next"),
        ("evaluate.generate.lengths=[10,1]", "must have entries that rise from one to the next"),
        ("evaluate.attack.l2=[]", "must have entries that rise"),
        ("evaluate.attack.linf=[0.1,2]", "at most 1"),
        ("evaluate.champion=nlls", "did you mean 'nll'?"),
        ("sgld=20", "sgld: no such setting: a group"),
        ("steps=2026-13-01", "is '2026-13-01', which is not a YAML value"),
        ("model.options=[1]", "is [1], a mapping was expected"),
        ("model.options.day=2026-01-01", "must be of numbers, text, lists and mappings"),
        ("lr=1", "lr: no such setting"),
        ("learning_rate=1", "did you mean 'optimizer.learning_rate'?"),
    ],
)
def test_a_mistake_is_named_with_value_bound_and_remedy(setting, said):
    found = problems("digits_uniform", *setting.split(" "))
    assert len(found) == 1
    assert said in found[0]


def test_required_settings_are_asked_for(recipe):
    found = problems(recipe("batch_size: 8\n"))
    assert [p.split(":")[0] for p in found] == ["seed", "workers", "steps"]
    assert all("is required" in p for p in found)


@pytest.mark.parametrize(("text", "bounds"), [("3", (3, 3)), ("1..4", (1, 4)), ("2..2", (2, 2)), ("64", (64, 64))])
def test_workers_are_a_number_or_a_range(text, bounds):
    config = load_run_config("digits", [f"workers={text}"])
    assert (config.min_workers, config.max_workers) == bounds
    assert from_flat(json.loads(json.dumps(flatten(config)))) == config


@pytest.mark.parametrize("text", ["3..1", "0..2", "1..", "..2", "1...2", "1.5", "-1..2", "two", "true", "none", ""])
def test_workers_that_are_neither_are_named_with_what_they_may_be(text):
    assert problems("digits", f"workers={text}") == [
        f"command line: workers: is '{text}', must be N or MIN..MAX, such as 2 or 1..4"
    ]


def test_every_number_of_workers_in_a_range_must_fit():
    assert problems("digits", "workers=1..65") == ["command line: workers: is 1..65, must be from 1 to batch_size (64)"]
    small = ("batch_size=7", "replay.capacity=8")
    for workers in ("4", "6", "1..4"):
        load_run_config("digits", [f"workers={workers}", *small])
    (problem,) = problems("digits", "workers=4..6", *small)  # 5 of them would not do
    assert "replay.capacity: is 8, must be at least 13 so that each of 4..6 workers" in problem


@pytest.mark.parametrize(("workers", "fits"), [(0, False), (1, True), (64, True), (65, False)])
def test_workers_go_from_1_to_the_batch_size(workers, fits):
    if fits:
        assert load_run_config("digits", [f"workers={workers}"]).workers == workers
    else:
        assert "workers: is" in problems("digits", f"workers={workers}")[0]


def test_every_worker_must_hold_the_chains_it_draws():
    """64 of 65 chains over 3 workers: rank 0 would draw 21 of its 21, rank 1 21 of 22, rank 2 22 of 22."""
    for capacity in range(64, 80):
        for workers in (1, 2, 3, 5, 64):
            held = [capacity * (r + 1) // workers - capacity * r // workers for r in range(workers)]
            drawn = [64 * (r + 1) // workers - 64 * r // workers for r in range(workers)]
            settings = [f"workers={workers}", f"replay.capacity={capacity}"]
            if all(h >= d for h, d in zip(held, drawn, strict=True)):
                load_run_config("digits", settings)
            else:
                assert "replay.capacity" in problems("digits", *settings)[0]


def test_a_key_given_twice_is_refused_with_both_lines(recipe):
    path = recipe("base: digits\nsgld:\n  steps: 3\n  step_size: 1\n  steps: 5\nseed: -1\n")
    assert problems(path) == [
        f"{path}:5: sgld.steps: is given twice, first at {path}:3",
        f"{path}:6: seed: is -1, must be at least 0 and less than 2147483648",
    ]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("seed: 1\nsgld: {steps: 3\n", 3, "not valid YAML"),
        ("seed: 1\n\tworkers: 2\n", 2, "not valid YAML"),
        ("- seed\n- workers\n", 1, "a recipe is a mapping of settings"),
        ("base: digits\nseed: !!python/object:os.system 1\n", 2, "seed: is not a YAML value"),
        ("base: digits\nseed: 2026-13-01\n", 2, "seed: is not a YAML value"),
    ],
)
def test_what_is_not_a_recipe_is_said_with_its_line(recipe, text, line, said):
    path = recipe(text)
    found = problems(path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:{line}: {said}")


def test_an_empty_recipe_lacks_what_is_required(recipe):
    assert len(problems(recipe(""))) == 3


def test_a_recipe_that_is_not_there_is_named_with_the_nearest_and_the_other_mistakes(tmp_path):
    found = problems("digit", "sgld.step=3", "batch_size=0")
    assert "no recipe 'digit'; did you mean 'digits'?" in found[0]
    assert "cifar10_paper" in found[0]
    assert "command line: batch_size: is 0, must be at least 1" in found
    assert "command line: sgld.step: no such setting; did you mean 'sgld.steps'?" in found
    assert len(found) == 3, "what the recipe would have given is not asked for"
    assert problems(tmp_path / "none.yaml") == [f"no such recipe file: {tmp_path}/none.yaml"]


# Inheritance


def test_a_recipe_inherits_from_a_bundled_one_or_from_a_file_beside_it(recipe):
    recipe("base: digits_uniform\nsgld:\n  steps: 3\nreplay:\n  capacity: 500\n", "parent.yaml")
    child = recipe("base: ../parent.yaml\nsgld:\n  step_size: 2\nreplay: {capacity: 600}\n", "below/child.yaml")
    config = load_run_config(str(child), ["sgld.noise_scale=0.5"])
    assert dataclasses.asdict(config.sgld) == {
        **{"steps": 3, "step_size": 2.0, "noise_scale": 0.5},
        **{"conditional": False, "clamp": None, "gradient_clamp": None, "inner_steps": 1},
        **{"normalize_gradient": False},
        **{"final_step_size": None, "final_noise_scale": None, "max_steps": None},
    }
    assert config.replay.capacity == 600
    assert config.data == load_run_config("digits_uniform", []).data


def test_mistakes_of_an_inherited_recipe_have_its_own_file_and_line(recipe):
    parent = recipe("base: digits\nsgld:\n  steps: 0\n", "parent.yaml")
    child = recipe("base: parent.yaml\nseed: -1\n", "child.yaml")
    assert problems(child) == [
        f"{child}:2: seed: is -1, must be at least 0 and less than 2147483648",
        f"{parent}:3: sgld.steps: is 0, must be at least 1",
    ]


@pytest.mark.parametrize("names", [("a.yaml",), ("a.yaml", "b.yaml"), ("a.yaml", "below/b.yaml")])
def test_a_circle_of_recipes_is_refused(recipe, names):
    paths = [recipe("", name) for name in names]
    for path, following in zip(paths, [*paths[1:], paths[0]], strict=True):
        steps_up = "../" * (len(path.parent.parts) - len(paths[0].parent.parts))
        path.write_text(f"base: {steps_up}{following.relative_to(paths[0].parent)}\n")
    assert "inherit from each other in a circle" in problems(paths[0])[0]


@pytest.mark.parametrize("base", ["absent.yaml", "digitz"])
def test_a_base_that_is_not_there_is_said_where_it_is_named(recipe, base):
    path = recipe(f"seed: 1\nbase: {base}\n")
    found = problems(path)
    assert found[0].startswith(f"{path}:2: base: no ")
    assert base in found[0]


# Values


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1E-3", "1.0e-3"])
def test_numbers_may_be_written_as_1e_3_in_files_and_on_the_command_line(recipe, text):
    path = recipe(f"base: digits\noptimizer:\n  learning_rate: {text}\n")
    assert load_run_config(str(path), []).optimizer.learning_rate == 0.001
    assert load_run_config("digits", [f"sgld.noise_scale={text}"]).sgld.noise_scale == 0.001


def test_whole_numbers_may_be_written_with_an_exponent():
    assert load_run_config("digits", ["steps=2e3", "replay.capacity=1e4"]).steps == 2000


@pytest.mark.parametrize("text", ["none", "None", "null", "~"])
def test_none_means_none_and_not_text(recipe, text):
    path = recipe(f"base: digits\nsgld:\n  clamp: 1\noptimizer:\n  clip_norm: {text}\n")
    config = load_run_config(str(path), ["sgld.clamp=none", "init_from=none", "name=none", "data.root=none"])
    assert (config.optimizer.clip_norm, config.sgld.clamp, config.init_from) == (None, None, None)
    assert config.data.root is None
    assert config.name.startswith("mine-")


def test_text_on_the_command_line_is_taken_as_it_stands():
    config = load_run_config("digits", ["name=2026-01-01", "tracking.experiment=007", "tracking.uri=http://a/b=c"])
    assert (config.name, config.tracking.experiment, config.tracking.uri) == ("2026-01-01", "007", "http://a/b=c")


def test_options_of_ones_own_are_handed_on_nested_and_merged(recipe):
    path = recipe("base: digits\nmodel:\n  name: mine:net\n  options:\n    a: 1\n    deep: {x: 1, y: [1, 2]}\n")
    config = load_run_config(str(path), ["model.options.b=2", "model.options.deep.x=3"])
    assert config.model.options == {"a": 1, "b": 2, "deep": {"x": 3, "y": [1, 2]}}


def test_local_paths_are_relative_to_where_the_command_is_typed(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    config = load_run_config("digits", ["init_from=a/b.pt", "data.root=../there"])
    assert (config.init_from, config.data.root) == (f"{tmp_path}/a/b.pt", str(tmp_path.parent / "there"))
    path = recipe("base: digits\ninit_from: ~/model.pt\ndata:\n  root: ./here\n", "below/mine.yaml")
    config = load_run_config(str(path), [])
    assert (config.init_from, config.data.root) == ("/home/me/model.pt", f"{tmp_path}/here")
    here = load_run_config("digits", ["data.root=x"])
    monkeypatch.chdir("/")
    assert load_run_config("digits", [f"data.root={tmp_path}/x"]).name == here.name
    assert load_run_config("digits", ["data.root=x"]).name != here.name


@pytest.mark.parametrize("uri", ["s3://bucket/a", "models:/digits@best", "runs:/abc/model", "/abs/a.pt"])
def test_uris_and_absolute_paths_stay_as_they_are(uri):
    config = load_run_config("digits", [f"init_from={uri}", f"data.root={uri}"])
    assert (config.init_from, config.data.root) == (uri, uri)


@pytest.mark.parametrize("name", bundled_recipes())
def test_the_configuration_as_a_recipe_or_as_json_gives_itself_again(tmp_path, name):
    config = load_run_config(name, ["data.name=mine:data", "data.options.a={b: 1}", "sgld.clamp=0.1"])
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert load_run_config(str(path), []) == config
    assert from_flat(json.loads(json.dumps(flatten(config)))) == config
    assert yaml.safe_load(to_yaml(config))["sgld"]["clamp"] == 0.1


def test_the_recipe_of_a_run_goes_on_with_it_from_wherever_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    config = load_run_config("digits", ["name=tiny"])
    write_config(Location.of("runs") / "tiny", config)
    given = tmp_path / "work" / "runs" / "tiny" / "recipe.yaml"

    def storage(*changes, recipe=given):
        return load_run_config(str(recipe), changes).storage_path

    assert storage() == "./runs", "a recipe, not yet a run's"
    (given.parent / "run.json").write_text("{}")
    assert storage() == "./runs"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert storage() == str(tmp_path / "work" / "runs")
    assert storage(recipe="../work/runs/tiny/recipe.yaml") == str(tmp_path / "work" / "runs")
    assert storage("storage_path=./mine") == "./mine"
    assert storage("name=other") == "./runs"
    given.parent.rename(tmp_path / "elsewhere" / "tiny")
    assert storage(recipe="tiny/recipe.yaml") == str(tmp_path / "elsewhere")


def test_a_configuration_can_be_neither_changed_nor_made_wrong():
    config = load_run_config("digits", [])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    with pytest.raises(ConfigError, match=r"workers: is 0, must be at least 1"):
        RunConfig(workers=0, seed=1, steps=1)


def test_a_password_in_a_stores_uri_is_refused_and_not_repeated():
    for key, uri in (("storage_path", "s3://KEY:SE/CRET@bucket/runs"), ("data.root", "s3://KEY:SECRET@bucket/data")):
        with pytest.raises(ConfigError) as caught:
            load_run_config("digits", [f"{key}={uri}"])
        assert f"{key}: holds a password" in str(caught.value)
        assert "CRET" not in str(caught.value)
    load_run_config("digits", ["storage_path=s3://bucket/a:b@c"])


@pytest.mark.parametrize("nothing", ["", "none", "None"])
def test_a_storage_without_a_name_is_refused(nothing):
    """An empty variable of a shell would put runs into the working directory."""
    with pytest.raises(ConfigError, match=r"storage_path: is .* must name a folder or a URI"):
        load_run_config("digits", [f"storage_path={nothing}"])


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(ConfigError, match=r"model.channels: is empty"):
        load_run_config("digits", ["model.channels=[]"])
