"""Several seeds of a recipe: names, what counts as over, means and intervals. With Ray: tests/sweeps."""

import json
import math
import os

import numpy as np
import pytest
import yaml
from made_sweeps import BEGUN, made_trial
from scipy import stats

from jem.errors import ConfigError
from jem.files import Location
from orchestrator.config import load_run_config, to_yaml
from orchestrator.runs import read_record
from orchestrator.sweep.config import load_sweep
from orchestrator.sweep.decide import over_seeds
from orchestrator.sweep.seeds import SeedsWork, as_sweep, intervals_of, means, planned, run_seeds, trials_of
from orchestrator.sweep.session import Record, open_folder
from orchestrator.sweep.table import read_trials
from orchestrator.sweep.trial import over


def config_of(folder, *settings):
    return load_run_config("digits", [f"storage_path={folder}", "steps=300", *settings])


def test_how_many_seeds_there_are_changes_no_run(tmp_path):
    one, five = config_of(tmp_path), config_of(tmp_path, "seeds=5")
    assert (one.name, one.digest, one.science) == (five.name, five.digest, five.science)
    assert yaml.safe_load(to_yaml(five))["seeds"] == 5
    assert as_sweep(five).run.seeds == 1


def test_the_seeds_begin_with_the_recipes(tmp_path):
    trials = trials_of(config_of(tmp_path, "seeds=3", "seed=7"))
    assert [(trial.name, trial.seed, trial.point) for trial in trials] == [("s7", 7, {}), ("s8", 8, {}), ("s9", 9, {})]


def test_a_sweep_keeps_its_own_seeds():
    sweep = load_sweep("digits_sgld", ["seeds=4"])
    assert (sweep.config.seeds, sweep.run.seeds) == (4, 1)
    for argument in ("settings.seeds=4", "space.seeds.int=[1,3]"):
        with pytest.raises(ConfigError, match="finalists"):
            load_sweep("digits_sgld", [argument])


def test_a_seed_too_many_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="seeds: is 2, too many"):
        config_of(tmp_path, f"seed={2**31 - 1}", "seeds=2")


def test_means_and_intervals_are_those_of_the_seeds_that_finished(tmp_path):
    values = {0: 0.91, 1: 0.95, 2: 0.96, 3: 0.92}
    for seed, value in values.items():
        made_trial(tmp_path, f"s{seed}", metrics={"test/accuracy": value}, stage="seeds", number=seed, seed=seed)
    made_trial(tmp_path, "s4", status="diverged", metrics={"test/accuracy": 0.1}, stage="seeds", number=4, seed=4)
    figures = over_seeds(read_trials(Location.of(tmp_path)))
    found = list(values.values())
    assert means(figures) == {"test/accuracy": pytest.approx(np.mean(found))}
    low, high = stats.t.interval(0.95, 3, np.mean(found), stats.sem(found))
    assert intervals_of(figures)["test/accuracy"] == pytest.approx([low, high])


def test_one_seed_has_no_interval(tmp_path):
    made_trial(tmp_path, "s0", metrics={"test/accuracy": 0.9}, stage="seeds")
    figures = over_seeds(read_trials(Location.of(tmp_path)))
    assert (means(figures), intervals_of(figures)) == ({"test/accuracy": 0.9}, {})


def test_seeds_that_ended_are_not_run_again_but_for_more_steps(tmp_path):
    config = config_of(tmp_path, "seeds=4")
    root = Location.of(tmp_path) / f"{config.name}-seeds"
    statuses = {"s0": "finished", "s1": "diverged", "s2": "stopped"}
    for seed, (name, status) in enumerate(statuses.items()):
        made_trial(root, name, status=status, metrics={"val/nll": 0.5}, stage="seeds", number=seed, seed=seed)
    work = SeedsWork(config, Location.of(tmp_path), root, Record(root.name, config.science, "seeds"))
    assert [trial.name for trial in work.left()] == ["s2", "s3"]
    record = read_record(root / "trials" / "s0")
    assert over(record, 300)
    assert not over(record, 301)


def test_the_time_of_a_driver_that_was_killed_counts(tmp_path):
    config = config_of(tmp_path, "seeds=2")
    root = Location.of(tmp_path) / f"{config.name}-seeds"
    made_trial(root, "s0", stage="seeds", metrics={"val/nll": 0.5})
    os.utime((root / "trials" / "s0" / "events.jsonl").local, (BEGUN + 90, BEGUN + 90))
    attempts = [{"started": BEGUN - 50, "ended": BEGUN - 40}, {"started": BEGUN}]
    record = Record(root.name, config.science, "seeds", attempts=attempts)
    assert SeedsWork(config, Location.of(tmp_path), root, record).spent == 10 + 90


def test_a_folder_of_other_settings_is_refused_and_kept(tmp_path):
    config = config_of(tmp_path, "name=mine", "seeds=2")
    root = Location.of(tmp_path) / "mine-seeds"
    open_folder(root, Record(root.name, config.science, "seeds"), fresh=False).save(root)
    before = (root / "sweep.json").read()
    with pytest.raises(ConfigError) as caught:
        run_seeds(config_of(tmp_path, "name=mine", "seeds=2", "sgld.steps=3"))
    assert "sgld.steps: is 3" in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert (root / "sweep.json").read() == before
    assert json.loads(before)["kind"] == "seeds"


def test_the_plan_says_how_many_and_how_many_at_once(tmp_path):
    rows, figures = planned(config_of(tmp_path, "seeds=5", "workers=1"))
    assert rows["seeds"].startswith("5: 0 to 4")
    assert figures["seeds"] == 5
    assert 1 <= figures["at_once"] <= 5
    assert math.isfinite(figures["at_once"])
