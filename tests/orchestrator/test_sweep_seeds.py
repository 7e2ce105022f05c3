"""Several seeds of one recipe, without Ray: names, what is left to do, means and intervals, MLflow, what is said."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from made_stores import Store
from made_sweeps import made_trial, sweep_of
from scipy import stats

from jem.errors import ConfigError
from jem.files import Location
from orchestrator.config import load_run_config, to_yaml
from orchestrator.events import EventLog
from orchestrator.overview import overview
from orchestrator.plan import plan
from orchestrator.runs import RunRecord, open_record, read_record
from orchestrator.sweep.config import load_sweep, trial_config
from orchestrator.sweep.config import to_yaml as sweep_yaml
from orchestrator.sweep.overseer import Overseer
from orchestrator.sweep.seeds import as_sweep, fit_seeds, run_seeds, show_seeds, shown_figures, trials_of
from orchestrator.sweep.session import Record
from orchestrator.sweep.summary import seeds_summary
from orchestrator.sweep.table import read_trials
from orchestrator.sweep.trial import over
from orchestrator.sync import sync_runs

FIGURES = ("test/accuracy", "test/nll", "ood/interp/log_px/auroc", "val/nll")
WILD = ("diverged", "energy gap 1.2e+06\nraise recovery.max to go on")


@pytest.fixture
def store(migrated, tmp_path, monkeypatch):
    """MLflow's database in ./runs of the folder that one is in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copyfile(migrated, tmp_path / "runs" / "mlflow.db")
    return Store(tmp_path / "runs")


@pytest.fixture
def no_ray(monkeypatch):
    """What is left to train is an error."""

    def refused(*_):
        raise AssertionError("Ray is not needed where every seed has ended")

    monkeypatch.setattr("orchestrator.sweep.fixed.start_ray", refused)


def config(*settings):
    return load_run_config("digits", ["name=five", "seeds=5", "steps=300", *settings])


def figures(seed):
    return {key: 0.1 * n + 0.01 * math.sin(seed + n) for n, key in enumerate(FIGURES, 1)} | {"train/loss": 9.0}


def made_seeds(root, seeds, ends=()):
    """A run each: `ends` are (status, message) of those that did not finish, the last ones."""
    for k, seed in enumerate(seeds):
        status, message = ends[k - len(seeds)] if k >= len(seeds) - len(ends) else ("finished", "")
        metrics = figures(seed) if status == "finished" else {}
        own = {"stage": "seeds", "number": seed, "candidate": "base", "seed": seed, "message": message}
        made_trial(root, f"s{seed}", {}, status, metrics, **own)


def problems(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return "; ".join(str(problem) for problem in caught.value.problems)


# The setting


def test_seeds_are_not_the_science_and_one_is_as_if_nothing_was_said(tmp_path):
    one, five = load_run_config("digits", []), load_run_config("digits", ["seeds=5"])
    assert (five.name, five.digest, five.science) == (one.name, one.digest, one.science)
    assert one == load_run_config("digits", ["seeds=1"])
    for given in (one, five):
        (tmp_path / "again.yaml").write_text(to_yaml(given))
        assert load_run_config(str(tmp_path / "again.yaml"), []) == given


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["seeds=0"], "seeds: is 0, must be at least 1"),
        (["seeds=2.5"], "seeds: is 2.5, a whole number was expected"),
        ([f"seed={2**31 - 3}", "seeds=4"], f"the last seed, {2**31}, must be below 2\\*\\*31"),
    ],
)
def test_seeds_that_cannot_be(settings, said):
    with pytest.raises(ConfigError, match=said):
        load_run_config("digits", settings)
    assert load_run_config("digits", [f"seed={2**31 - 3}", "seeds=3"]).seeds == 3


def test_a_sweep_has_seeds_of_its_own_and_its_trials_are_single_runs(tmp_path):
    (tmp_path / "several.yaml").write_text("base: digits\nseeds: 7\n")
    text = "base: several.yaml\nseeds: 4\nspace:\n  sgld.step_size: {uniform: [0.1, 1]}\n"
    sweep = sweep_of(tmp_path, text)
    assert (sweep.config.seeds, sweep.run.seeds, trial_config(sweep, {}).seeds) == (4, 1, 1)
    assert sweep_of(tmp_path, text, "seeds=3").config.seeds == 3
    again = tmp_path / "again.yaml"
    again.write_text(sweep_yaml(sweep))
    assert load_sweep(str(again), []).config.seeds == 4
    own = "seeds: is 2: seeds= is the sweep's own"
    assert own in problems(sweep_of, tmp_path, text, "settings.seeds=2")
    assert own in problems(sweep_of, tmp_path, f"{text}settings: {{seeds: 2}}\n")
    said = problems(sweep_of, tmp_path, text, "space.seeds.choice=[1, 2]")
    assert "space.seeds: cannot be searched: a trial is one run" in said


# What is run


def test_each_seeds_run_is_the_one_that_its_seed_alone_would_give():
    many = config("seed=3", "sgld.steps=2", "workers=1")
    sweep = as_sweep(many)
    assert (sweep.name, [trial.name for trial in trials_of(many)]) == ("five-seeds", ["s3", "s4", "s5", "s6", "s7"])
    for trial in trials_of(many):
        place = {"name": trial.name, "seed": trial.seed, "storage_path": "x"}
        alone = [f"name={trial.name}", f"seed={trial.seed}", "seeds=1", "storage_path=x"]
        expected = config("sgld.steps=2", "workers=1", *alone)
        assert trial_config(sweep, trial.point, **place) == expected


@pytest.mark.parametrize(
    ("settings", "there", "at_once"),
    [
        (["workers=1"], (2, 0, 8), 2),
        (["workers=1"], (16, 0, 64), 5),
        (["workers=1"], (16, 0, 3.5), 3),
        (["workers=2"], (5, 0, 64), 2),
        (["workers=4"], (2, 0, 1), 1),  # slowly, as a single run
        (["workers=1"], (16, 2, 64), 2),
        (["workers=1", "device=cpu"], (16, 2, 64), 5),
        (["workers=1..4"], (16, 2, 64), 1),
        (["workers=1", "device=cuda"], (16, 0, 64), 1),  # a cluster may bring one
    ],
)
def test_as_many_at_once_as_fit_and_one_at_least(settings, there, at_once):
    assert fit_seeds(as_sweep(config(*settings)), *there).at_once == at_once


def test_a_dry_run_is_that_of_one_run_times_the_seeds(capsys, monkeypatch):
    monkeypatch.setattr("orchestrator.sweep.seeds.machine", lambda: (2.0, 0.0, 8.0))
    one = plan(config("seeds=1", "workers=1"))
    capsys.readouterr()
    many = plan(config("workers=1", "seed=2"))
    out = capsys.readouterr().out
    assert many.name == "five-seeds"
    assert many.metrics == one.metrics | {"seeds": 5, "at_once": 2}
    for text in ("five-seeds\n", "5: 2 to 6", "2 on this machine, 1 worker each", "5 x 300 = 1,500", "seeds: 5"):
        assert text in out


# What comes of it


def test_means_and_t_intervals_of_the_seeds_that_finished_are_told_everywhere(store, no_ray, capsys):
    root = Location.of("runs/five-seeds")
    made_seeds(root, range(5), [WILD])
    result = run_seeds(config())
    assert result.seeds == {"all": 5, "finished": 4, "diverged": 1}
    assert (result.status, result.exit_code, result.name, result.step) == ("finished", 0, "five-seeds", 300)
    assert result.message == "4 of 5 seeds finished; s4 diverged: energy gap 1.2e+06"
    assert result.metrics.keys() == result.intervals.keys() == set(FIGURES)
    for key in FIGURES:
        values = [figures(seed)[key] for seed in range(4)]
        assert result.metrics[key] == pytest.approx(np.mean(values), rel=1e-12)
        expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
        assert result.intervals[key] == pytest.approx(expected, rel=1e-12)
    show_seeds(result)
    out = capsys.readouterr().out
    assert "five-seeds: finished; 5 seeds: 4 finished, 1 diverged" in out
    assert f"{result.metrics['test/nll']:.4f}" in out
    last = json.loads(result.json())
    assert last["intervals"]["test/nll"] == result.intervals["test/nll"]
    # in the folder
    folder = root.local
    assert (folder / "summary.md").read_text() == seeds_summary(read_trials(root), "five-seeds")
    assert json.loads((folder / "seeds.json").read_text())["test/nll"]["values"].keys() == {"0", "1", "2", "3"}
    assert load_run_config(str(folder / "recipe.yaml"), []) == config()
    # in MLflow
    run_id = result.run_id
    points = {key: (step, value) for key, step, value, _ in store.points(run_id)}
    assert points.keys() == {key + end for key in FIGURES for end in ("", "/low", "/high")}
    assert points["val/nll"] == (4 * 300, result.metrics["val/nll"])
    assert [points[f"val/nll/{end}"][1] for end in ("low", "high")] == result.intervals["val/nll"]
    tags = store.tags(run_id)
    assert (tags["kind"], tags["seeds"], tags["status"]) == ("seeds", "4 of 5 seeds finished", "finished")
    assert "| test/nll |" in tags["mlflow.note.content"]
    assert store.status(run_id) == "FINISHED"
    assert store.params(run_id) == {key: str(value) for key, value in config().science.items()}
    assert store.files(run_id) == ["recipe.yaml", "seeds.json", "summary.md", "trials.csv", "trials.parquet"]
    children = [other for other in store.runs() if store.tags(other).get("mlflow.parentRunId") == run_id]
    assert len(children) == 5
    assert sorted(store.status(child) for child in children) == ["FAILED", *["FINISHED"] * 4]


def test_of_two_seeds_the_interval_is_the_closed_form_of_students_distribution_with_one_degree(store, no_ray):
    """t with one degree of freedom is Cauchy's: its 97.5 % quantile is tan(0.475 pi). The standard error is |a-b|/2."""
    made_seeds(Location.of("runs/five-seeds"), range(2))
    result = run_seeds(config("seeds=2"))
    for key in FIGURES:
        a, b = figures(0)[key], figures(1)[key]
        half = math.tan(0.475 * math.pi) * abs(a - b) / 2
        assert result.intervals[key] == pytest.approx([(a + b) / 2 - half, (a + b) / 2 + half], rel=1e-9)


def test_a_single_seed_that_finished_has_a_mean_and_no_interval(store, no_ray):
    made_seeds(Location.of("runs/five-seeds"), range(2), [WILD])
    result = run_seeds(config("seeds=2"))
    assert result.metrics["test/nll"] == figures(0)["test/nll"]
    assert result.intervals == {}
    assert "/low" not in "".join(key for key, *_ in store.points(result.run_id))


@pytest.mark.parametrize(
    ("ends", "status", "code", "remedy"),
    [
        ([WILD, WILD], "diverged", 4, "--fresh starts them anew"),
        ([("failed", "RuntimeError"), WILD], "failed", 1, "the same command tries again what failed"),
        ([("bad data", "no such file")] * 2, "bad data", 2, "the same command tries again what failed"),
    ],
)
def test_where_none_finished_the_status_is_that_of_the_failures(store, monkeypatch, ends, status, code, remedy):
    monkeypatch.setattr("orchestrator.sweep.fixed.FixedTrials.left", lambda _: [])  # all were tried, by this command
    made_seeds(Location.of("runs/five-seeds"), range(2), ends)
    result = run_seeds(config("seeds=2"))
    assert (result.status, result.exit_code, result.metrics) == (status, code, {})
    assert result.message.startswith("0 of 2 seeds finished; s0 ")
    assert result.message.endswith(remedy)
    assert store.status(result.run_id) == "FAILED"


def test_a_seed_that_was_not_evaluated_is_told_and_evaluated_again(store, monkeypatch):
    root = Location.of("runs/five-seeds")
    made_seeds(root, range(5))
    made_trial(root, "s1", {}, stage="seeds", number=1, candidate="base", seed=1, message="trained, but: no svhn")
    with monkeypatch.context() as tried:
        tried.setattr("orchestrator.sweep.fixed.FixedTrials.left", lambda _: [])
        result = run_seeds(config())
    assert result.message.startswith("5 of 5 seeds finished; s1 finished: trained, but: no svhn")
    assert result.message.endswith("the same command tries again what failed")
    assert left_of(monkeypatch)[1] == ["s1"]


def test_what_is_finished_is_read_out_and_what_mlflow_has_not_got_is_sent(store, no_ray, monkeypatch):
    root = Location.of("runs/five-seeds")
    made_seeds(root, range(5))
    monkeypatch.setattr("orchestrator.sweep.session.UPLOAD_S", 0.0)
    first = run_seeds(config())
    monkeypatch.undo()
    monkeypatch.chdir(store.db.parent.parent)
    again = run_seeds(config())
    assert (again.metrics, again.intervals) == (first.metrics, first.intervals)
    assert store.status(again.run_id) == "FINISHED"
    attempts = len(json.loads((root / "sweep.json").read())["attempts"])
    assert run_seeds(config()) == again
    assert len(json.loads((root / "sweep.json").read())["attempts"]) == attempts
    assert run_seeds(config("seeds=2")) == again, "fewer seeds: those that are there stay figures"


def test_jobs_sync_sends_the_parent_and_its_children(store, no_ray, monkeypatch, capsys):
    made_seeds(Location.of("runs/five-seeds"), range(5))
    with monkeypatch.context() as away:
        away.setattr("orchestrator.sweep.session.UPLOAD_S", 0.0)
        run_seeds(config())
    result = sync_runs(["five-seeds"])
    assert [run["name"] for run in result.runs] == ["five-seeds", *(f"five-seeds/s{n}" for n in range(5))]
    assert {run["status"] for run in result.runs} == {"sent"}
    parent = result.runs[0]["run_id"]
    assert {store.tags(run["run_id"])["mlflow.parentRunId"] for run in result.runs[1:]} == {parent}
    assert sync_runs([]).runs == []


# More of it later


def left_of(monkeypatch, *settings):
    """The names of what would be trained."""
    seen = []
    monkeypatch.setattr("orchestrator.sweep.fixed.start_ray", lambda _: (_ for _ in ()).throw(ConfigError("no Ray")))
    monkeypatch.setattr(
        "orchestrator.sweep.seeds.SeedsWork.work",
        lambda self: seen.extend(trial.name for trial in self.left()) or {"status": "stopped", "message": "here"},
    )
    return run_seeds(config(*settings)), seen


def test_more_seeds_or_more_steps_later_and_the_seeds_that_did_not_end_are_what_is_left(store, no_ray, monkeypatch):
    root = Location.of("runs/five-seeds")
    made_seeds(root, range(3), [WILD])
    three = run_seeds(config("seeds=3"))
    made_trial(root, "s3", {}, "stopped", stage="seeds", number=3, candidate="base", seed=3)
    (root / "trials" / "s4").mkdir()  # its process was killed before it wrote anything
    stopped, left = left_of(monkeypatch)
    assert left == ["s3", "s4"]
    assert (stopped.status, stopped.exit_code, stopped.run_id) == ("stopped", 143, three.run_id)
    assert stopped.message.startswith("here; 2 of 5 seeds finished")
    assert left_of(monkeypatch, "seeds=3", "steps=301")[1] == ["s0", "s1"], "a diverged seed stays one"
    made_trial(root, "s1", {}, "failed", stage="seeds", number=1, candidate="base", seed=1, message="disk full")
    assert left_of(monkeypatch, "seeds=3")[1] == ["s1"], "what failed is tried again"
    assert store.steps(three.run_id, "val/nll") == [600], "means are sent at the end alone"


def test_with_a_seed_more_the_parent_gets_a_later_point(store, no_ray):
    root = Location.of("runs/five-seeds")
    made_seeds(root, range(3))
    three = run_seeds(config("seeds=3"))
    made_seeds(root, range(3, 5))
    five = run_seeds(config())
    assert five.run_id == three.run_id
    assert store.steps(five.run_id, "val/nll") == [900, 1500]
    values = [value for key, _, value, _ in store.points(five.run_id) if key == "val/nll"]
    assert values == [three.metrics["val/nll"], five.metrics["val/nll"]]
    assert store.tags(five.run_id)["seeds"] == "5 of 5 seeds finished"


def test_a_run_is_over_when_it_ended_and_has_all_steps_if_it_finished():
    def record(status, step):
        return RunRecord("s0", {}, "0" * 8, status, result={"step": step})

    assert over(record("finished", 300), 300)
    assert not over(record("finished", 300), 301)
    assert over(record("diverged", 20), 300)
    assert not over(record("stopped", 20), 300)
    assert not over(RunRecord("s0", {}, "0" * 8, "running"), 300)
    for status in ("failed", "bad data"):  # of several seeds the same command tries again, as of a single run
        assert over(record(status, 20), 300)
        assert not over(record(status, 20), 300, again=True)
    assert over(record("diverged", 20), 300, again=True)
    unmeasured = RunRecord("s0", {}, "0" * 8, "finished", result={"step": 300, "message": "not evaluated: gone"})
    assert over(unmeasured, 300)
    assert not over(unmeasured, 300, again=True)


def test_a_trial_that_goes_on_for_more_steps_is_open_in_mlflow_again(tmp_path):
    """The overseer saw it finished first, as it was before."""
    calls = []

    class Uploads:
        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, arguments[0]))

    root, sweep = Location.of(tmp_path / "five-seeds"), as_sweep(config())
    overseer = Overseer(sweep, root, Uploads(), lambda name: name, "seeds", 5, 1)
    for status in ("finished", "running", "finished"):
        made_seeds(root, [0], [(status, "")])
        overseer.look(0.0, 0)
    assert [name for name, _ in calls] == ["add", "reopen", "close_trial", "reopen", "reopen", "close_trial"]


# What is in the way


def test_other_science_of_the_same_name_is_told_with_the_differences(store, no_ray):
    made_seeds(Location.of("runs/five-seeds"), range(5))
    run_seeds(config())
    said = problems(run_seeds, config("sgld.steps=3", "seed=1"))
    for text in ("seed: is 1,", "sgld.steps: is 3,", "has 5", "--fresh"):
        assert text in said
    anew = run_seeds(config("sgld.steps=3"), fresh=True)
    assert "Ray is not needed" in anew.message, "it would train"
    assert read_record(Location.of("runs/five-seeds.1/trials/s0")) is not None
    assert Location.of("runs/five-seeds/trials").children() == []


def test_a_single_run_or_a_sweep_in_the_place_is_told(store, no_ray):
    root = Location.of("runs/five-seeds")
    single = load_run_config("digits", ["name=five-seeds"])
    open_record(root, single, False).save(root)
    assert "is a single run's folder" in problems(run_seeds, config())
    (root / "run.json").remove()
    Record("five-seeds", config().science).save(root)
    assert "of another kind: sweep, not seeds" in problems(run_seeds, config())
    (root / "sweep.json").write(b"{")
    with pytest.raises(ConfigError, match=r"sweep\.json: damaged"):
        run_seeds(config())


def test_jobs_runs_lists_the_folder_as_what_it_is(store, no_ray, capsys):
    root = Location.of("runs/five-seeds")
    made_seeds(root, range(5), [WILD])
    run_seeds(config())
    capsys.readouterr()
    listed = overview([])
    (folder,) = listed.folders
    assert (listed.runs, folder["kind"], folder["status"], folder["next"]) == ([], "seeds", "finished", None)
    assert folder["counts"] == {"all": 5, "finished": 4, "diverged": 1}
    out = capsys.readouterr().out
    assert "five-seeds: several seeds, finished (4 finished, 1 diverged); its trials: python jobs/runs.py" in out
    assert [entry["name"] for entry in overview(["five-seeds"]).runs] == ["s4", "s3", "s2", "s1", "s0"]
    record = Record(**json.loads((root / "sweep.json").read()))
    record.status = "running"  # and nobody holds it
    record.save(root)
    (folder,) = overview([]).folders
    command = "python jobs/train.py runs/five-seeds/recipe.yaml"
    assert (folder["status"], folder["next"]) == ("interrupted", command)
    again = load_run_config(command.split()[-1], [])
    assert (again.name, again.seeds) == ("five", 5)


def test_the_short_table_is_of_test_data_where_they_were_measured():
    measured = {"val/nll": 1.0, "val/ood/interp/log_px/auroc": 0.5, "val/accuracy": 0.9}
    assert shown_figures(measured) == ["val/accuracy", "val/nll", "val/ood/interp/log_px/auroc"]
    tested = measured | {"test/nll": 1.0, "ood/interp/log_px/auroc": 0.6, "ood/interp/max_py/auroc": 0.7}
    assert shown_figures(tested) == ["test/nll", "ood/interp/log_px/auroc"]


def test_what_a_killed_driver_left_without_an_end_is_no_figure(store, no_ray, monkeypatch):
    root = Location.of("runs/five-seeds")
    made_seeds(root, range(2))
    folder = made_trial(root, "s2", {}, "running", {"val/nll": 7.0}, stage="seeds", number=2, candidate="base", seed=2)
    EventLog(folder.local / "events.jsonl").close()
    result, left = left_of(monkeypatch, "seeds=3")
    assert left == ["s2"]
    assert result.metrics["val/nll"] == pytest.approx(np.mean([figures(seed)["val/nll"] for seed in range(2)]))
