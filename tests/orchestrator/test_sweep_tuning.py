"""Whether Ray Tune goes on with what it remembers of a stage, or begins it."""

import pickle

import pytest
from made_sweeps import sweep_of
from ray import tune
from ray.tune.execution import tune_controller
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from jem.files import Location
from orchestrator.events import EventLog
from orchestrator.ray_cluster import Cluster
from orchestrator.sweep.resources import Fit
from orchestrator.sweep.trial import Setting, search_trial
from orchestrator.sweep.tuning import Given, Limited, Rungs, Suggestions, _tuner, scheduler


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


# What Tune forgets


class AsIt:
    """What a scheduler is told of a trial."""

    def __init__(self, name):
        self.trial_id = self.name = name
        self.config = {"trial": {"name": name}}


def pruned(rungs, told):
    """The trials that do not go on, of (name, step, val/nll) in that order."""
    trials = {name: AsIt(name) for name, _, _ in told}
    for trial in trials.values():
        rungs.on_trial_add(None, trial)
    said = {}
    for name, step, value in told:
        if said.get(name) != "STOP":
            said[name] = rungs.on_trial_result(None, trials[name], {"step": step, "val/nll": value})
    return [name for name, action in said.items() if action == "STOP"]


def test_a_search_that_goes_on_compares_at_each_step_what_was_measured_there(tmp_path):
    """Each trial is better than the one before it, and all improve: none is to end early."""
    text = "base: digits\nbudget: {trials: 8, steps: 600}\nscheduler: {name: asha, grace_steps: 150}\n"
    sweep = sweep_of(tmp_path, text + "space: {sgld.step_size: {uniform: [0.5, 1.0]}}\n")
    root = Rungs.root = Location.of(tmp_path / "sweep")

    def shown(number, *steps):
        return [(f"t{number:03}", step, 1.0 / step + (9 - number) / 1e4) for step in steps]

    first, then = shown(0, 150, 300) + shown(1, 150, 300), shown(0, 450) + shown(1, 450)
    others = [one for number in range(2, 7) for one in shown(number, 150, 300, 450)]
    assert pruned(scheduler(sweep), first + then + others) == []
    for name, step, value in first:  # the driver is killed here
        log = EventLog(root.local / "trials" / name / "events.jsonl")
        log.append("metrics", step=step, metrics={"val/nll": value, "val/accuracy": 0.5})
        log.close()
    restored = pickle.loads(pickle.dumps(scheduler(sweep)))
    assert pruned(restored, then + others) == []
    assert pruned(restored, [("t007", 150, 9.0)]) == ["t007"], "it does compare"


def test_tpe_trains_no_point_twice_and_ends_where_there_are_no_more(tmp_path):
    text = "base: digits\nsearcher: tpe\nbudget: {trials: 16, steps: 300}\nspace: {sgld.steps: {choice: [5, 7]}, "
    search = Suggestions(sweep_of(tmp_path, text + "sgld.clamp: {choice: [1.0, 2.0]}}\n"))
    points = []
    for number in range(16):
        Limited.at_once = 3
        found = search.suggest(f"id{number}")
        if found == Searcher.FINISHED:
            break
        points.append(found["trial"]["point"])
        search.on_trial_complete(f"id{number}", {"val/nll": 0.1 if points[-1].get("sgld.steps") == 5 else 0.2})
    assert points[0] == {}, "the base"
    assert sorted(map(str, points[1:])) == sorted({str(point) for point in points[1:]})
    assert len(points) == 4, "the fourth of the space is the base itself"


def test_a_search_of_an_older_version_goes_on(tmp_path):
    search = Suggestions(sweep_of(tmp_path))
    state = {key: value for key, value in search.__dict__.items() if key not in ("names", "seen")}
    old = Suggestions.__new__(Suggestions)
    old.__setstate__(state)
    (tmp_path / "state.pkl").write_bytes(pickle.dumps(state))
    old.restore(str(tmp_path / "state.pkl"))
    Limited.at_once = 2
    assert old.suggest("a")["trial"]["name"] == "t000"
    assert old.suggest("b")["trial"]["point"]
