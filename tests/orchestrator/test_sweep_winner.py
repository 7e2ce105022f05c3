"""The winner measured on test data, and what becomes of the sweep where that is interrupted or fails."""

from contextlib import contextmanager

import pytest
from made_sweeps import made_finalist, made_trial, sweep_of

from jem.errors import ConfigError, DataError
from jem.files import Location
from orchestrator.attempt import Attempt
from orchestrator.ray_cluster import Cluster
from orchestrator.result import Result
from orchestrator.runs import read_record
from orchestrator.sweep import driver
from orchestrator.sweep.config import trial_config
from orchestrator.sweep.driver import Search, run_sweep
from orchestrator.sweep.session import Record, open_folder
from orchestrator.sweep.table import read_trials
from orchestrator.sweep.trial import Work

TEXT = """
base: digits
budget: {trials: 2, steps: 20}
finalists: 1
seeds: 4
settings: {workers: 1}
space: {sgld.step_size: {uniform: [0.5, 1.0]}}
"""
MEASURED = {"status": "finished", "step": 20, "metrics": {"val/nll": 0.07, "test/nll": 0.08}}
KILLED = {"status": "killed"}
POINT = {"sgld.step_size": 0.75}


@pytest.fixture
def sweep(tmp_path):
    return sweep_of(tmp_path, TEXT, f"storage_path={tmp_path}")


@pytest.fixture
def root(sweep, tmp_path, monkeypatch):
    """A sweep that is trained; its winner, t001, is to be measured."""

    @contextmanager
    def no_ray(_cpus, _settings=None):
        yield Cluster(True, 2, 0)

    def here(_stage, trials, setting, _fitting):
        """As Ray Tune has it, without its processes."""
        for trial in trials:
            work = Work(setting, trial)
            while not work.next()["done"]:
                pass
        return {}

    monkeypatch.setattr(driver, "ray_session", no_ray)
    monkeypatch.setattr("orchestrator.sweep.tuning.run_stage", here)
    root = Location.of(tmp_path) / sweep.name
    made_trial(root, "t000", metrics={"val/nll": 0.10})
    made_trial(root, "t001", POINT, metrics={"val/nll": 0.07})
    for seed in range(1, 5):
        made_finalist(root, "base", seed, metrics={"val/nll": 0.10 + seed / 1000}, number=seed)
        made_finalist(root, "t001", seed, POINT, metrics={"val/nll": 0.07 + seed / 2000}, number=seed)
    folder = root / "trials" / "f-t001-s1"
    record = read_record(folder)
    record.science = trial_config(sweep, POINT, seed=1).science
    record.save(folder)
    return root


def go_on(sweep, root, outcome, monkeypatch):
    """The driver, once more: what `train_here` returns or raises is `outcome`."""

    def train_here(config, *_):
        assert (config.evaluate.suite, config.evaluate.register) == ("fast", True), "as the recipe says"
        if outcome is KILLED:
            monkeypatch.setattr(Attempt, "close", lambda *_: Result())  # it closes nothing any more
        elif isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("orchestrator.sweep.trial.train_here", train_here)
    record = open_folder(root, Record(sweep.name, sweep.science, stages=["search", "finalists"]), fresh=False)
    return Search(sweep, root.parent, root, record).run()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_driver_that_dies_while_it_measures_the_winner_goes_on_with_the_same_winner(
    sweep, root, monkeypatch, elsewhere
):
    with monkeypatch.context() as killed:
        killed.setattr(Search, "close", lambda *_: None)
        go_on(sweep, root, KILLED, killed)
    assert "running" in {row.status for row in read_trials(root)}
    if elsewhere:  # another machine, which has no copy of the log
        (root / "trials" / "f-t001-s1" / "events.jsonl").remove()
    result = go_on(sweep, root, MEASURED, monkeypatch)
    assert (result.status, result.best["candidate"], result.best["name"]) == ("finished", "t001", "f-t001-s1")
    assert result.verdict.startswith("t001 beats the base")
    assert result.metrics["test/nll"] == 0.08
    assert result.trials == {"finished": 10}


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (DataError("svhn: cannot be had"), "bad data", "svhn: cannot be had"),
        (RuntimeError("out of memory"), "failed", "RuntimeError: out of memory"),
        (MEASURED | {"message": "trained to the end, but not evaluated: x"}, "failed", "but not evaluated: x"),
    ],
)
def test_a_winner_that_could_not_be_measured_is_told_and_measured_again(
    sweep, root, monkeypatch, outcome, status, said
):
    result = go_on(sweep, root, outcome, monkeypatch)
    assert (result.status, result.best["candidate"]) == (status, "t001")
    assert result.message.startswith("the winner, f-t001-s1: ")
    assert said in result.message
    assert result.trials == {"finished": 10}, "the trial is what it was"
    result = go_on(sweep, root, MEASURED, monkeypatch)
    assert (result.status, result.metrics["test/nll"]) == ("finished", 0.08)


def test_a_winner_whose_measurement_could_not_begin_is_no_success(sweep, root, monkeypatch):
    made_finalist(root, "t001", 1, POINT, metrics={"val/nll": 0.07}, number=1)  # a run of another science
    result = go_on(sweep, root, MEASURED, monkeypatch)
    assert (result.status, result.best["candidate"]) == ("failed", "t001")
    assert "could not begin" in result.message


def test_a_sweep_that_has_finished_says_what_changes_nothing_any_more(sweep, root, monkeypatch, tmp_path, capsys):
    first = go_on(sweep, root, MEASURED, monkeypatch)
    again = run_sweep(sweep_of(tmp_path, TEXT, f"storage_path={tmp_path}"))
    assert again == first
    assert "changes nothing" not in capsys.readouterr().err
    assert run_sweep(sweep_of(tmp_path, TEXT, f"storage_path={tmp_path}", "seeds=7")) == first
    assert "seeds=7 changes nothing: tiny" in capsys.readouterr().err


def test_more_seeds_asked_for_before_it_has_finished_are_trained(sweep, root, monkeypatch, tmp_path):
    go_on(sweep, root, DataError("svhn: cannot be had"), monkeypatch)  # the finalists are trained, the winner is not
    names = []
    with monkeypatch.context() as patched:
        patched.setattr(
            "orchestrator.sweep.tuning.run_stage", lambda stage, trials, *_: names.append((stage, trials)) or {}
        )
        more = sweep_of(tmp_path, TEXT, f"storage_path={tmp_path}", "seeds=5")
        record = open_folder(root, Record(more.name, more.science), fresh=False)
        result = Search(more, root.parent, root, record).run()
    stage, trials = names[0]
    assert (stage, [trial.name for trial in trials][-2:]) == ("finalists", ["f-base-s5", "f-t001-s5"])
    assert "budget.minutes did not suffice for 1 seed (5)" in result.verdict
    assert result.trials == {"finished": 10, "out of time": 2}


def test_what_only_the_sweep_gives_makes_the_base_complete(tmp_path):
    (tmp_path / "open.yaml").write_text(
        "base: digits\ndata: {name: imagefolder}\nevaluate: {suite: full, register: false}\n"
    )
    text = TEXT.replace("base: digits", f"base: {tmp_path}/open.yaml")
    sweep = sweep_of(tmp_path, text.replace("workers: 1", f"workers: 1, data.root: {tmp_path}"))
    assert sweep.final == {"evaluate.suite": "full", "evaluate.register": False}
    assert (sweep.run.evaluate.suite, sweep.run.evaluate.register) == ("none", False)


def test_sets_that_cannot_be_had_are_told_before_anything_is_trained(tmp_path):
    (tmp_path / "full.yaml").write_text("base: digits\nevaluate: {suite: full}\n")
    text = TEXT.replace("base: digits", f"base: {tmp_path}/full.yaml").replace("workers: 1", "evaluate.sets: [nothing]")
    with pytest.raises(ConfigError, match="nothing"):
        run_sweep(sweep_of(tmp_path, text, f"storage_path={tmp_path}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.yaml", "tiny.yaml"]
