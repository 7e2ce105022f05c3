"""An ablation without Ray: what is left to do, each arm's figures and its differences to the first, what is kept."""

from __future__ import annotations

import json
import math
import shlex
import shutil

import numpy as np
import pytest
from made_stores import Store
from made_sweeps import made_trial, sweep_of
from scipy import stats

from jem.errors import ConfigError
from jem.files import Location
from orchestrator.config import load_run_config
from orchestrator.events import EventLog
from orchestrator.overview import overview
from orchestrator.sweep.ablation import AblationWork, run_ablation, trials_of
from orchestrator.sweep.comparison import compare
from orchestrator.sweep.config import load_sweep, trial_config
from orchestrator.sweep.table import read_trials
from orchestrator.sweep.trial_report import report, training_seconds
from orchestrator.sync import sync_runs

ARMS = """\
base: digits_uniform
name: three
seeds: 5
settings: {workers: 1, evaluate.suite: fast}
arms:
  plain: {}
  leaky: {model.activation: leaky_relu}
  short: {sgld.steps: 3, steps: 700, batch_size: 32}
"""
FIGURES = ("test/accuracy", "test/nll", "test/ece", "ood/interp/log_px/auroc", "val/nll")
WILD = ("diverged", "energy gap 1.2e+06\nraise recovery.max to go on")


@pytest.fixture
def store(migrated, tmp_path, monkeypatch):
    """MLflow's database in ./runs of the folder that one is in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copyfile(migrated, tmp_path / "runs" / "mlflow.db")
    return Store(tmp_path / "runs")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """What is left to train is an error."""

    def refused(*_):
        raise AssertionError("Ray is not needed where every trial has ended")

    monkeypatch.setattr("orchestrator.sweep.fixed.start_ray", refused)


@pytest.fixture
def three(tmp_path):
    return lambda *typed: sweep_of(tmp_path, ARMS, *typed)


ROOT = "runs/three"


def figures(arm, seed):
    """Of a seed, and of an arm: short is worse for sure, leaky differs by chance alone."""
    worse = {"plain": 0.0, "leaky": 0.001 * (-1) ** seed, "short": 0.3 + 0.001 * seed}[arm]
    return {key: 0.1 * n + 0.01 * math.sin(seed + n) + worse for n, key in enumerate(FIGURES, 1)} | {"train/loss": 9.0}


def made(sweep, trial, status="finished", message="", rate=1000.0, rollbacks=0):
    """The folder of a trial as its process leaves it, which trained `rate` images a second."""
    own = {"stage": "ablation", "number": trial.number, "candidate": trial.candidate, "seed": trial.seed}
    metrics = figures(trial.candidate, trial.seed) | {"train/images_per_s": rate} if status == "finished" else {}
    steps = sweep.steps_at(trial.point) if status == "finished" else 120
    folder = made_trial(ROOT, trial.name, trial.point, status, metrics, step=steps, message=message, **own)
    log = EventLog(folder.local / "events.jsonl")
    log.append("tags", tags={"hardware": "1 thread; 2 cores of mine"})
    log.close()
    if rollbacks:
        (folder / "recovery.json").write(json.dumps({"rollbacks": [{}] * rollbacks}).encode())
    return folder


def made_all(sweep, **ends):
    """A run each; `ends`: (status, message) by NAME_SEED of those that did not finish."""
    for trial in trials_of(sweep):
        status, message = ends.get(trial.name.replace("-s", "_"), ("finished", ""))
        made(sweep, trial, status, message)


def arms_json():
    return json.loads(Location.of(f"{ROOT}/arms.json").read())


def compared(sweep):
    """What arms.json would hold, without MLflow."""
    rows = read_trials(Location.of(ROOT))
    reports = {row.name: report(row, sweep, Location.of(f"{ROOT}/trials/{row.name}")) for row in rows}
    return compare(rows, reports, sweep.arms)


def t_interval(values):
    return [float(x) for x in stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))]


# What comes of it


def test_each_arms_figures_are_means_and_t_intervals_of_the_seeds_that_finished(store, three, monkeypatch):
    monkeypatch.setattr("orchestrator.sweep.fixed.FixedTrials.left", lambda _: [])  # all were tried, by this command
    made_all(three(), leaky_4=WILD, short_0=("failed", "RuntimeError: gone"))
    result = run_ablation(three())
    found = arms_json()
    assert list(found) == ["plain", "leaky", "short"]
    kept = {"plain": range(5), "leaky": range(4), "short": range(1, 5)}
    for arm, seeds in kept.items():
        assert found[arm]["figures"].keys() == set(FIGURES)
        for key in FIGURES:
            values = [figures(arm, seed)[key] for seed in seeds]
            told = found[arm]["figures"][key]
            assert told["mean"] == pytest.approx(np.mean(values), rel=1e-12)
            assert [told["low"], told["high"]] == pytest.approx(t_interval(values), rel=1e-12)
            assert told["n"] == len(seeds)
    counts = {arm: [one[k] for k in ("seeds", "finished", "diverged", "failed")] for arm, one in found.items()}
    assert counts == {"plain": [5, 5, 0, 0], "leaky": [5, 4, 1, 0], "short": [5, 4, 0, 1]}
    assert [one["settings"] for one in found.values()] == [arm.point for arm in three().arms]
    assert (result.status, result.exit_code) == ("finished", 0)
    assert result.trials == {"all": 15, "finished": 13, "diverged": 1, "failed": 1}
    assert result.message.startswith("13 of 15 trials finished; ")
    assert "leaky-s4 diverged: energy gap 1.2e+06" in result.message
    assert "short-s0 failed: RuntimeError: gone" in result.message


def test_a_difference_is_paired_over_the_seeds_that_both_finished(store, three):
    made_all(three(), leaky_4=WILD, plain_1=WILD)
    found = compared(three())
    assert "difference" not in found["plain"]
    for arm, seeds in (("leaky", (0, 2, 3)), ("short", (0, 2, 3, 4))):
        assert found[arm]["difference"].keys() == set(FIGURES)
        for key in FIGURES:
            values = [figures(arm, seed)[key] - figures("plain", seed)[key] for seed in seeds]
            told = found[arm]["difference"][key]
            assert told["mean"] == pytest.approx(np.mean(values), rel=1e-9, abs=1e-12)
            assert [told["low"], told["high"]] == pytest.approx(t_interval(values), rel=1e-9, abs=1e-12)
            assert told["n"] == len(seeds)


def test_pairing_finds_what_is_hidden_by_how_seeds_differ(store, three):
    """Seeds differ by 0.01, the arm by 0.3 in every seed: the interval of the difference is far narrower."""
    made_all(three())
    short = compared(three())["short"]
    widths = [one["high"] - one["low"] for one in (short["difference"]["test/nll"], short["figures"]["test/nll"])]
    assert widths[0] < widths[1] / 3


def test_the_summary_has_a_line_an_arm_and_marks_differences_that_are_sure(store, three):
    made_all(three(), leaky_4=WILD)
    made(three(), trials_of(three())[0], rollbacks=2)
    result = run_ablation(three())
    text = Location.of(f"{ROOT}/summary.md").read().decode()
    head = (
        "| arm | seeds finished | test/accuracy | test/nll | test/ece | ood/interp/log_px/auroc | diverged | recoveries"
    )
    assert f"{head} | seconds |" in text
    lines = [line for line in text.splitlines() if line.startswith(("| plain", "| leaky", "| short"))]
    plain, leaky, short, less_leaky, less_short, *_ = lines
    assert plain.startswith("| plain | 5 of 5 | ")
    assert plain.endswith(" | 0 | 2 | 96.0 |"), "1,500 steps of 64 images, 1,000 images a second"
    assert leaky.startswith("| leaky | 4 of 5 | ")
    assert leaky.endswith(" | 1 | 0 | 96.0 |")
    assert short.endswith(" | 0 | 0 | 22.4 |")
    assert "**" not in less_leaky
    assert less_short.count("**") == 8
    assert "- diverged: leaky-s4 at step 120: energy gap" in text
    assert result.verdict in text
    assert result.verdict.startswith("14 of 15 trials finished. Differs from plain, paired by seed: short: test/acc")
    assert "leaky:" not in result.verdict


def test_of_one_seed_there_are_means_and_differences_without_intervals(store, three):
    made_all(three("seeds=1"))
    result = run_ablation(three("seeds=1"))
    short = arms_json()["short"]
    assert short["figures"]["test/nll"] == {"mean": figures("short", 0)["test/nll"], "low": None, "high": None, "n": 1}
    expected = figures("short", 0)["test/nll"] - figures("plain", 0)["test/nll"]
    assert short["difference"]["test/nll"] == {"mean": expected, "low": None, "high": None, "n": 1}
    assert result.verdict.endswith("Differences from plain are of one seed at most, and have no interval.")
    assert result.intervals == {}


def test_seconds_are_of_trials_that_finished_and_recoveries_of_all(store, three):
    sweep = three("seeds=3")
    for trial, rate, rollbacks in zip(
        trials_of(sweep), (1000, 1, 1, 2000, 1, 1, 4000, 1, 1), [1, 0, 0] * 3, strict=True
    ):
        made(sweep, trial, rate=float(rate), rollbacks=rollbacks)
    made(sweep, trials_of(sweep)[6], *WILD, rollbacks=10)
    plain = compared(sweep)["plain"]
    assert plain["seconds"] == pytest.approx((96 + 48) / 2)
    assert plain["rollbacks"] == 12


def test_of_each_trial_a_small_file_is_kept_whose_command_trains_the_same(store, three):
    made_all(three("seeds=2"), short_0=WILD)
    made(three("seeds=2"), trials_of(three("seeds=2"))[5], rollbacks=1)
    run_ablation(three("seeds=2"))
    files = sorted(path.name for path in Location.of(f"{ROOT}/arms").children())
    assert files == sorted(f"{trial.name}.json" for trial in trials_of(three("seeds=2")))
    told = json.loads(Location.of(f"{ROOT}/arms/short-s1.json").read())
    command = told.pop("command")
    assert told == {
        "arm": "short",
        "seed": 1,
        "settings": {"sgld.steps": 3, "steps": 700, "batch_size": 32},
        "status": "finished",
        "reason": "",
        "steps": 700,
        "seconds": 22.4,
        "rollbacks": 1,
        "metrics": figures("short", 1) | {"train/images_per_s": 1000.0},
        "hardware": "1 thread; 2 cores of mine",
    }
    python, job, *typed = shlex.split(command)
    assert (python, job) == ("python", "jobs/train.py")
    again = load_run_config(typed[0], typed[1:])
    ours = trial_config(three("seeds=2"), three("seeds=2").arm("short").point, seed=1)
    assert (again.science, again.steps, again.evaluate) == (ours.science, ours.steps, ours.evaluate)
    wild = json.loads(Location.of(f"{ROOT}/arms/short-s0.json").read())
    assert (wild["status"], wild["steps"], wild["metrics"]) == ("diverged", 120, {})
    assert wild["reason"].startswith("energy gap")


def test_where_none_finished_the_status_is_that_of_the_failures(store, three):
    made_all(three("seeds=1"), plain_0=WILD, leaky_0=WILD, short_0=WILD)
    result = run_ablation(three("seeds=1"))
    assert (result.status, result.exit_code, result.metrics) == ("diverged", 4, {})
    assert result.message.endswith("--fresh starts them anew")
    assert store.status(result.run_id) == "FAILED"
    assert arms_json()["plain"]["seconds"] is None


# MLflow


def test_mlflow_has_a_parent_with_the_arms_figures_and_a_child_a_trial(store, three):
    made_all(three("seeds=2"), short_1=WILD)
    result = run_ablation(three("seeds=2"))
    tags = store.tags(result.run_id)
    assert (tags["kind"], tags["trials"], tags["status"]) == ("ablation", "5 of 6 trials finished", "finished")
    assert "| leaky |" in tags["mlflow.note.content"]
    assert store.params(result.run_id) == {
        **{"base": "digits_uniform", "seed": "0", "steps": "1500", "arms.plain": "the base"},
        "arms.leaky": "model.activation=leaky_relu",
        "arms.short": "batch_size=32 sgld.steps=3 steps=700",
    }
    points = {key: value for key, _, value, _ in store.points(result.run_id)}
    shown = [key for key in FIGURES if not key.startswith("val/")]
    assert {key for key in points if not key.endswith(("/low", "/high"))} == {
        f"{arm}/{key}" for arm in ("plain", "leaky", "short") for key in shown
    }
    assert points["plain/test/nll"] == result.metrics["plain/test/nll"]
    assert [points[f"leaky/test/nll/{end}"] for end in ("low", "high")] == result.intervals["leaky/test/nll"]
    assert store.files(result.run_id) == ["arms.json", "summary.md", "sweep.yaml", "trials.csv", "trials.parquet"]
    children = [run for run in store.runs() if store.tags(run).get("mlflow.parentRunId") == result.run_id]
    told = {store.tags(run)["mlflow.runName"]: store.tags(run) for run in children}
    assert {name: (one["candidate"], one["steps"], one["ablation"]) for name, one in told.items()} == {
        trial.name: (trial.candidate, "700" if trial.candidate == "short" else "1500", "three")
        for trial in trials_of(three("seeds=2"))
    }
    assert sorted(store.status(run) for run in children) == ["FAILED", *["FINISHED"] * 5]


def test_jobs_sync_sends_the_parent_and_its_children(store, three, monkeypatch):
    made_all(three("seeds=1"))
    with monkeypatch.context() as away:
        away.setattr("orchestrator.sweep.session.UPLOAD_S", 0.0)
        run_ablation(three("seeds=1"))
    result = sync_runs(["three"])
    assert [run["name"] for run in result.runs] == ["three", "three/leaky-s0", "three/plain-s0", "three/short-s0"]
    assert {run["status"] for run in result.runs} == {"sent"}


# More of it later


def left_of(monkeypatch, sweep):
    """The names of what would be trained."""
    seen = []
    monkeypatch.setattr(
        AblationWork,
        "work",
        lambda self: seen.extend(trial.name for trial in self.left()) or {"status": "stopped", "message": "here"},
    )
    return run_ablation(sweep), seen


def test_what_is_finished_is_read_out(store, three):
    made_all(three("seeds=2"), leaky_1=WILD)
    first = run_ablation(three("seeds=2"))
    attempts = json.loads(Location.of(f"{ROOT}/sweep.json").read())["attempts"]
    assert run_ablation(three("seeds=2")) == first
    assert run_ablation(three("seeds=2", "resources.cpu=2")) == first
    assert json.loads(Location.of(f"{ROOT}/sweep.json").read())["attempts"] == attempts


def test_a_sweep_that_was_stopped_goes_on_with_what_is_left_and_tells_what_it_has(store, three, monkeypatch):
    for trial in trials_of(three())[:7]:
        made(three(), trial)
    made(three(), trials_of(three())[7], "stopped")
    made(three(), trials_of(three())[8], *WILD)
    result, left = left_of(monkeypatch, three())
    assert left == ["leaky-s2", *(f"{arm}-s{seed}" for seed in (3, 4) for arm in ("plain", "leaky", "short"))]
    assert (result.status, result.exit_code) == ("stopped", 143)
    assert result.message == "here; 7 of 15 trials finished (7 finished, 1 diverged, 7 stopped)"
    found = arms_json()
    assert [one["seeds"] for one in found.values()] == [5, 5, 5]
    assert found["leaky"]["difference"]["test/nll"]["n"] == 2
    not_begun = json.loads(Location.of(f"{ROOT}/arms/short-s4.json").read())
    assert (not_begun["status"], not_begun["reason"], not_begun["seconds"]) == ("stopped", "not begun", 0.0)
    assert store.points(result.run_id) == [], "figures are sent at the end alone"


def test_more_seeds_later_leave_those_that_are_there(store, three, monkeypatch):
    made_all(three("seeds=2"))
    two = run_ablation(three("seeds=2"))
    stopped, left = left_of(monkeypatch, three("seeds=3"))
    assert left == ["plain-s2", "leaky-s2", "short-s2"]
    assert stopped.run_id == two.run_id


def test_where_the_minutes_are_spent_the_trials_that_did_not_begin_are_told(store, three, monkeypatch):
    sweep = three("seeds=2", "budget.minutes=1")
    for trial in trials_of(sweep)[:4]:
        made(sweep, trial)

    def spent(self):
        (self.root / "closing").write(b"1")
        return {"status": "finished"}

    monkeypatch.setattr(AblationWork, "work", spent)
    result = run_ablation(sweep)
    assert result.trials == {"all": 6, "finished": 4, "out of time": 2}
    assert result.status == "finished"
    assert result.verdict.startswith("4 of 6 trials finished (2 out of time). ")


def test_other_arms_of_the_same_name_are_told_with_the_differences(store, three):
    made_all(three("seeds=2"))
    run_ablation(three("seeds=2"))
    with pytest.raises(ConfigError) as caught:
        run_ablation(three("arms.leaky=none", "arms.short.steps=800"))
    said = str(caught.value)
    assert "arms.leaky: is None" in said
    assert "'steps': 800" in said
    assert "--fresh" in said


def test_an_ablation_where_another_kind_of_sweep_is_is_refused(store, three):
    made_all(three("seeds=2"))
    run_ablation(three("seeds=2"))
    record = json.loads(Location.of(f"{ROOT}/sweep.json").read())
    Location.of(f"{ROOT}/sweep.json").write(json.dumps(record | {"kind": "sweep"}).encode())
    with pytest.raises(ConfigError, match="of another kind: sweep, not ablation"):
        run_ablation(three("seeds=2"))


def test_jobs_runs_lists_the_folder_as_what_it_is(store, three, capsys):
    made_all(three("seeds=2"), leaky_1=WILD)
    run_ablation(three("seeds=2"))
    capsys.readouterr()
    (folder,) = overview([]).folders
    assert (folder["kind"], folder["status"], folder["next"]) == ("ablation", "finished", None)
    assert folder["counts"] == {"all": 6, "finished": 5, "diverged": 1}
    assert "three: an ablation, finished (5 finished, 1 diverged)" in capsys.readouterr().out
    path = Location.of(f"{ROOT}/sweep.json")
    path.write(json.dumps(json.loads(path.read()) | {"status": "running"}).encode())  # and nobody holds it
    (folder,) = overview([]).folders
    assert (folder["status"], folder["next"]) == ("interrupted", f"python jobs/sweep.py {ROOT}/sweep.yaml")
    again = load_sweep(f"{ROOT}/sweep.yaml", [])
    assert (again.name, again.science) == ("three", three().science)


def test_a_damaged_trial_counts_as_failed_in_its_arm(store, three):
    made_all(three("seeds=2"))
    Location.of(f"{ROOT}/trials/leaky-s1/trial.json").write(b"{")
    Location.of(f"{ROOT}/trials/notes/mine.txt").write(b"not ours")
    (row,) = [row for row in read_trials(Location.of(ROOT)) if row.name == "leaky-s1"]
    assert (row.stage, row.candidate, row.seed, row.status) == ("ablation", "leaky", 1, "failed")
    result = run_ablation(three("seeds=2"))
    assert result.trials == {"all": 6, "finished": 5, "failed": 1}
    assert arms_json()["leaky"]["failed"] == 1


# Seconds


def test_seconds_are_those_of_the_training_steps_run_again_or_not(tmp_path):
    """Two attempts and a rollback: 50 + 50 + 25 steps, back to 50, 50, then from 100 again 50 + 50; 32 images each."""
    log = EventLog(tmp_path / "events.jsonl")

    def point(step, rate):
        log.append("metrics", step=step, metrics={"train/loss": 1.0, "train/images_per_s": rate})

    assert training_seconds(log.path, 32) == 0.0
    log.append("attempt", attempt=1, step=0, workers=1, why="")
    point(50, 100.0)
    log.append("metrics", step=50, metrics={"val/nll": 1.0})
    point(100, 200.0)
    log.append("rollback", number=1, from_step=125, step=50, reason="", remedy="", level=1)
    point(100, 400.0)
    log.append("attempt", attempt=2, step=100, workers=1, why="")
    point(150, 100.0)
    point(200, 100.0)
    log.close()
    expected = 32 * (50 / 100 + 50 / 200 + 25 / 200 + 50 / 400 + 50 / 100 + 50 / 100)
    assert training_seconds(log.path, 32) == pytest.approx(expected)
