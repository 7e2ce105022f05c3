"""Whether Ray Tune goes on with what it remembers of a stage, or begins it."""

import pytest
from made_sweeps import sweep_of
from ray import tune
from ray.tune.execution import tune_controller
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from jem.files import Location
from orchestrator.ray_cluster import Cluster
from orchestrator.sweep.resources import Fit
from orchestrator.sweep.trial import Setting, search_trial
from orchestrator.sweep.tuning import Given, Suggestions, _tuner


@pytest.fixture
def begin(tmp_path, monkeypatch):
    sweep = sweep_of(tmp_path)
    setting = Setting(sweep, Location.of(tmp_path) / "sweep", Cluster(True, 2, 0), 1)
    trials = [search_trial(sweep, number, {}) for number in range(3)]
    monkeypatch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "auto")  # as it is afterwards
    monkeypatch.setattr(tune.Tuner, "restore", lambda path, **_: f"goes on with {path}")
    return lambda at_once=2: _tuner("search", trials, setting, Fit(at_once, 1, 0, 1, ""), tune.Trainable)


def test_a_stage_whose_driver_died_before_tune_remembered_a_trial_is_begun(begin, tmp_path):
    assert isinstance(begin(), tune.Tuner)
    folder = tmp_path / "sweep" / "tune" / "search"
    assert [path.name for path in folder.glob("[!.]*")] == ["tuner.pkl"]
    assert tune.Tuner.can_restore(str(folder)), "Ray would go on, with no trial"
    assert isinstance(begin(), tune.Tuner)


def test_a_stage_that_tune_remembers_goes_on(begin, tmp_path):
    begin()
    folder = tmp_path / "sweep" / "tune" / "search"
    (folder / "experiment_state-2026-11-30_04-00-00.json").write_text("{}")
    assert begin() == f"goes on with {folder}"


@pytest.mark.parametrize("kind", ["given", "suggested"])
def test_whoever_goes_on_with_a_stage_decides_how_many_trials_run_at_once(begin, tmp_path, kind):
    def searcher():
        sweep = sweep_of(tmp_path)
        return Given([search_trial(sweep, n, {}) for n in range(5)]) if kind == "given" else Suggestions(sweep)

    begin(at_once=1)
    first = searcher()
    assert first.suggest("a")["trial"]["name"] == "t000"
    assert first.suggest("b") is None
    first.on_trial_complete("a", result={}, error=False)
    assert first.suggest("b")["trial"]["name"] == "t001"
    first.save(str(tmp_path / "searcher.pkl"))

    begin(at_once=3)
    assert tune_controller._get_max_pending_trials(SearchGenerator(first)) == 3, "all of them start at once"
    again = searcher()
    again.restore(str(tmp_path / "searcher.pkl"))
    assert [again.suggest(x)["trial"]["name"] for x in "cd"] == ["t002", "t003"]
    assert again.suggest("e") is None
    for ended in "bc":
        again.on_trial_complete(ended, error=True)
    assert again.suggest("e")["trial"]["name"] == "t004"
    assert again.suggest("f") is Searcher.FINISHED if kind == "given" else again.suggest("f")
