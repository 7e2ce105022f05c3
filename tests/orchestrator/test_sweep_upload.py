"""A sweep's runs in a real MLflow on SQLite: one parent, one child a trial, each point once, whatever happens."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from made_stores import Store
from ports import free_port

from jem.files import Location
from orchestrator.events import EventLog, read
from orchestrator.mlflow_run import RunSpec
from orchestrator.runs import RunRecord, lock, read_record
from orchestrator.survey import look
from orchestrator.sweep.upload import Uploads
from orchestrator.sync import sync_runs

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(migrated, tmp_path):
    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    return Store(tmp_path)


@pytest.fixture
def sweep(store):
    return Sweep(store)


class Sweep:
    """A sweep's folder beside its store, and what a driver tells of it."""

    def __init__(self, store: Store, root: Path | None = None) -> None:
        self.store = store
        self.root = root or store.db.parent / "digits_sgld"
        self.root.mkdir()
        (self.root / "sweep.json").write_text("{}")
        self.log = EventLog(self.root / "events.jsonl")
        self.known: list[str] = []

    def uploads(self, uri=None):
        spec = RunSpec(uri or self.store.uri, "jem", "digits_sgld", str(self.store.artifacts), {"space.x": "0 to 1"})
        return Uploads(spec, self.log.path, self.root, on_run=self.known.append)

    def add(self, uploads, *names, uri=None):
        for name in names:
            params, tags = {"sgld.step_size": "0.5"}, {"stage": "search"}
            spec = RunSpec(uri or self.store.uri, "jem", name, str(self.store.artifacts), params, tags)
            uploads.add(name, spec, self.path(name) / "events.jsonl", self.path(name))

    def path(self, name):
        return self.root / "trials" / name

    def train(self, name, first, last, commit=True):
        log = EventLog(self.path(name) / "events.jsonl")
        if first == 1:
            log.append("attempt", attempt=1, step=0)
        for step in range(first, last + 1):
            log.append("metrics", step=step, metrics={"train/loss": 1.0 / step, "val/nll": 0.1})
        if commit:
            log.append("checkpoint", step=last)
        log.close()

    def children(self):
        """{name: run id}, which asserts that the parent is one, and no trial is an orphan or there twice."""
        names = self.store.rows("SELECT run_uuid, name FROM runs WHERE lifecycle_stage = 'active'")
        (parent,) = [run_id for run_id, name in names if name == "digits_sgld"]
        assert "mlflow.parentRunId" not in self.store.tags(parent)
        children = {name: run_id for run_id, name in names if run_id != parent}
        assert len(children) == len(names) - 1, names
        for run_id in children.values():
            assert self.store.tags(run_id)["mlflow.parentRunId"] == parent
        return children

    def steps(self):
        return {name: len(self.store.steps(run_id)) for name, run_id in self.children().items()}

    def statuses(self):
        return {name: self.store.status(run_id) for name, run_id in self.children().items()}


def until(condition, timeout=30):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


ENDINGS = {
    "finished": "FINISHED",
    "pruned": "KILLED",
    "stopped": "KILLED",
    "out of time": "KILLED",
    "diverged": "FAILED",
    "failed": "FAILED",
}


def test_each_trial_is_a_child_that_ends_as_what_it_is_with_the_reason(sweep):
    uploads = sweep.uploads()
    uploads.start()
    for status in ENDINGS:
        sweep.add(uploads, status)
        sweep.train(status, 1, 6, commit=False)
        uploads.close_trial(status, status, f"why {status}")
    sweep.log.append("metrics", step=6, metrics={"best/val/nll": 0.1})
    (sweep.root / "trials.csv").write_text("a,b")
    sweep.log.append("artifact", path="trials.csv")
    parent = uploads.finish("finished", 60)
    assert uploads.complete
    assert sweep.known == [parent] == [uploads.run_id]
    assert sweep.statuses() == ENDINGS
    assert sweep.steps() == dict.fromkeys(ENDINGS, 6)
    for status, run_id in sweep.children().items():
        tags = sweep.store.tags(run_id)
        assert (tags["status"], tags["reason"], tags["stage"]) == (status, f"why {status}", "search")
        assert sweep.store.params(run_id) == {"sgld.step_size": "0.5"}
        assert uploads.trial_run_id(status) == run_id
    assert sweep.store.status(parent) == "FINISHED"
    assert sweep.store.params(parent) == {"space.x": "0 to 1"}
    assert sweep.store.steps(parent, "best/val/nll") == [6]
    assert sweep.store.files(parent) == ["trials.csv"]


def test_a_trial_that_ended_by_itself_ends_as_what_the_sweep_says(sweep):
    """Stopped from outside, it says `stopped`; the sweep knows that the scheduler did it."""
    uploads = sweep.uploads()
    uploads.start()
    sweep.add(uploads, "t000", "t001", "t002")
    for name in ("t000", "t001"):
        sweep.train(name, 1, 3)
        log = EventLog(sweep.path(name) / "events.jsonl")
        log.append("end", status="failed")
        log.close()
    sweep.train("t002", 1, 3)
    uploads.close_trial("t000", "pruned", "val/nll 0.1 at step 3")
    uploads.finish("stopped", 60)
    assert sweep.statuses() == {"t000": "KILLED", "t001": "FAILED", "t002": "KILLED"}
    assert read(sweep.path("t002") / "events.jsonl")[0][-1]["status"] == "stopped"


def test_points_are_sent_while_trials_run_and_only_committed_ones(sweep):
    uploads = sweep.uploads()
    uploads.start()
    sweep.add(uploads, "t000", "t001")
    sweep.train("t000", 1, 5)
    sweep.train("t000", 6, 8, commit=False)
    sweep.train("t001", 1, 3)
    sweep.log.append("metrics", step=1, metrics={"best/val/nll": 0.1})
    sweep.log.append("checkpoint", step=1)
    until(lambda: uploads.trial_run_id("t001") and sweep.store.steps(uploads.trial_run_id("t001")) == [1, 2, 3])
    assert sweep.steps() == {"t000": 5, "t001": 3}
    assert sweep.store.steps(uploads.run_id, "best/val/nll") == [1]
    assert set(sweep.statuses().values()) == {"RUNNING"}
    uploads.finish("stopped", 60)


def test_a_trial_that_is_sent_costs_nothing_any_more_even_after_a_restart(sweep, monkeypatch):
    names = [f"t{number:03}" for number in range(20)]
    uploads = sweep.uploads()
    uploads.start()
    for name in names:
        sweep.add(uploads, name)
        sweep.add(uploads, name)
        sweep.train(name, 1, 3)
        uploads.close_trial(name, "finished")
    uploads.finish("stopped", 60)
    ended = sweep.store.rows("SELECT run_uuid, end_time FROM runs WHERE name != 'digits_sgld'")
    calls = count_calls(monkeypatch)
    for path in sweep.root.glob("trials/*/events.jsonl"):
        path.chmod(0o444)
    again = sweep.uploads()
    again.start()
    for name in names:
        sweep.add(again, name)
    until(lambda: "get_run" in calls)
    for name in names:
        again.close_trial(name, "finished")
    again.finish("finished", 60)
    assert again.complete
    assert len(calls) < 10, "those of the parent"
    assert sweep.store.rows("SELECT run_uuid, end_time FROM runs WHERE name != 'digits_sgld'") == ended
    assert [again.trial_run_id(name) for name in names] == [sweep.children()[name] for name in names]


def test_a_trial_costs_at_most_two_tenths_of_a_second(sweep):
    uploads, names = sweep.uploads(), [f"t{number:03}" for number in range(60)]
    uploads.start()
    until(lambda: uploads.run_id)
    start = time.process_time()
    for name in names:
        sweep.add(uploads, name)
        sweep.train(name, 1, 10)
        uploads.close_trial(name, "finished")
    uploads.finish("finished", 60)
    assert uploads.complete
    assert (time.process_time() - start) / len(names) < 0.2
    assert sweep.steps() == dict.fromkeys(names, 10)


def count_calls(monkeypatch):
    """The names of MLflow's calls from now on."""
    calls = []
    intercept(monkeypatch, lambda name, call: (calls.append(name), call())[1])
    return calls


CALLS = ("get_run", "get_experiment_by_name", "search_runs", "create_run", "log_batch", "update_run", "set_terminated")


def intercept(monkeypatch, handle):
    """Have `handle(name, call)` do each call to MLflow."""
    from mlflow import MlflowClient

    for name in CALLS:
        whole = getattr(MlflowClient, name)

        def caught(self, *args, _whole=whole, _name=name, **kwargs):
            return handle(_name, lambda: _whole(self, *args, **kwargs))

        monkeypatch.setattr(MlflowClient, name, caught)


class Killed(BaseException):
    """Ends the uploader's thread where it stands: nothing behind it catches this."""


def die_at(monkeypatch, number, answered):
    """The uploader's thread dies in its call `number`, before MLflow does it or before it has the answer."""
    calls = []

    def handle(name, call):
        calls.append(name)
        if len(calls) == number:
            if answered:
                call()
            raise Killed(name)
        return call()

    intercept(monkeypatch, handle)


def sender():
    return next((t for t in threading.enumerate() if t.name == "mlflow-uploader"), None)


def drive(sweep):
    """A driver's life: one trial is over, one has a checkpoint; then the other is pruned. False: it died."""
    uploads = sweep.uploads()
    sweep.add(uploads, "t000", "t001")
    uploads.close_trial("t000", "diverged", "energy gap")
    uploads.start()
    until(lambda: not sender() or len(sweep.store.rows("SELECT * FROM metrics")) >= 2 * (3 + 4))
    if sender():
        sweep.train("t001", 5, 6)
        uploads.close_trial("t001", "pruned")
        uploads.finish("finished", 30)
    return uploads.complete


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # that is what a death is here
@pytest.mark.parametrize("answered", [True, False], ids=["after", "before"])
def test_a_death_at_any_call_to_mlflow_leaves_no_orphan_and_no_double(migrated, tmp_path, answered):
    number, deaths = 0, 0
    while number == deaths:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copyfile(migrated, folder / "mlflow.db")
        sweep = Sweep(Store(folder))
        sweep.train("t000", 1, 3)
        sweep.train("t001", 1, 4)
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, number, answered)
            deaths += not drive(sweep)
        tags = sweep.store.rows("SELECT DISTINCT run_uuid FROM tags WHERE key = 'mlflow.parentRunId'")
        assert len(tags) == max(0, len(sweep.store.runs()) - 1), "no orphan, not even for a moment"
        drive(sweep)
        assert sweep.steps() == {"t000": 3, "t001": 6}, number
        assert sweep.statuses() == {"t000": "FAILED", "t001": "KILLED"}
        assert len(sweep.store.rows("SELECT * FROM metrics")) == 2 * (3 + 6)
        sweep.log.close()
    assert deaths > 15, "the story has that many calls"


DRIVER = """
import sys, time
from pathlib import Path
from orchestrator.events import EventLog
from orchestrator.mlflow_run import RunSpec
from orchestrator.sweep.upload import Uploads

root, uri, artifacts, last = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
uploads = Uploads(RunSpec(uri, "jem", "digits_sgld", artifacts), root / "events.jsonl", root)
uploads.start()
logs, begun = {}, {}
for name in ("t000", "t001", "t002"):
    folder = root / "trials" / name
    folder.mkdir(parents=True, exist_ok=True)
    uploads.add(name, RunSpec(uri, "jem", name, artifacts), folder / "events.jsonl", folder)
    logs[name] = EventLog(folder / "events.jsonl")
    begun[name] = max([int(p.name) for p in folder.glob("[0-9]*")], default=0)  # checkpoints
    if begun[name] < 75 or name != "t000":
        logs[name].append("attempt", attempt=1, step=begun[name])
for step in range(1, last + 1):
    for name, log in logs.items():
        if step <= begun[name] or (name == "t000" and step > 75):
            continue
        log.append("metrics", step=step, metrics={"train/loss": 1.0 / step, "val/nll": step})
        if step % 25 == 0:
            (root / "trials" / name / str(step)).touch()
            log.append("checkpoint", step=step)
        if name == "t000" and step == 75:
            uploads.close_trial(name, "pruned", "asha")
        time.sleep(0.002)
uploads.finish("finished", 60)
"""


def test_a_driver_that_is_killed_at_any_time_leaves_one_parent_with_each_trial_once(sweep):
    def driver(last):
        command = [sys.executable, "-c", DRIVER, sweep.root, sweep.store.uri, sweep.store.artifacts, last]
        return subprocess.Popen(list(map(str, command)), cwd=ROOT)

    def written():
        return sum(sweep.store.rows(f"SELECT COUNT(*) FROM {table}")[0][0] for table in ("tags", "metrics"))

    for number in range(4):
        process, goal = driver(100_000), written() + 1
        while written() < goal:
            time.sleep(0.01)
        time.sleep(0.13 * number)
        process.kill()
        process.wait()
    last = max(int(path.name) for path in sweep.path("t001").glob("[0-9]*")) + 10
    assert driver(last).wait(60) == 0
    children = sweep.children()
    assert sweep.statuses() == {"t000": "KILLED", "t001": "KILLED", "t002": "KILLED"}
    for name, run_id in children.items():
        expected = list(range(1, (75 if name == "t000" else last) + 1))
        assert sweep.store.steps(run_id) == sweep.store.steps(run_id, "val/nll") == expected


def test_an_mlflow_that_comes_back_gets_everything_after_one_warning(migrated, tmp_path, caplog):
    (tmp_path / "later").write_text("a file where the store's directory should be")
    store = Store(tmp_path / "later")
    sweep = Sweep(store, tmp_path / "digits_sgld")
    uploads = sweep.uploads()
    uploads.start()
    sweep.add(uploads, "t000", "t001")
    sweep.train("t000", 1, 5)
    uploads.close_trial("t000", "pruned")
    sweep.train("t001", 1, 4)
    until(lambda: "cannot be written" in caplog.text)
    time.sleep(0.3)
    assert uploads.run_id is None
    store.db.parent.unlink()
    store.db.parent.mkdir()
    shutil.copyfile(migrated, store.db)
    uploads.close_trial("t001", "finished")
    uploads.finish("finished", 60)
    assert uploads.complete
    assert sweep.steps() == {"t000": 5, "t001": 4}
    assert caplog.text.count("cannot be written") == 1


def left_behind(sweep, caplog):
    """A sweep whose MLflow was never there."""
    dead = f"http://127.0.0.1:{free_port()}"
    uploads = sweep.uploads(dead)
    uploads.start()
    sweep.add(uploads, "t000", "t001", uri=dead)
    for name in ("t000", "t001"):
        record = RunRecord(
            name, {"sgld.step_size": 0.5}, "d1", "pruned", result={"name": name, "run_id": None, "step": 3}
        )
        record.save(Location.of(sweep.path(name)))
        sweep.train(name, 1, 3)
        uploads.close_trial(name, "pruned", "asha")
    start = time.monotonic()
    assert uploads.finish("finished", 2) is None
    assert time.monotonic() - start < 10
    assert not uploads.complete
    # of 3 steps, 2 metrics each
    assert caplog.text.count("12 points and files, and the ends of 3 runs, are still only in") == 1


def test_sync_sends_what_an_mlflow_that_was_away_did_not_take(sweep, caplog):
    left_behind(sweep, caplog)
    uri = f"tracking.uri={sweep.store.uri}"
    result = sync_runs([str(sweep.path("t001")), uri], lambda _: None)
    assert result.runs[0]["status"] == "sent", result.runs
    assert list(sweep.children()) == ["t001"], "its parent is sent first"
    result = sync_runs([f"storage_path={sweep.root / 'trials'}", uri], lambda _: None)
    assert [(entry["name"], entry["status"]) for entry in result.runs] == [("digits_sgld/t000", "sent")]
    result = sync_runs([str(sweep.root), uri], lambda _: None)
    assert [entry["status"] for entry in result.runs] == ["sent"] * 3
    assert sweep.steps() == {"t000": 3, "t001": 3}
    assert sweep.statuses() == {"t000": "KILLED", "t001": "KILLED"}
    tags = sweep.store.tags(sweep.children()["t000"])
    assert (tags["status"], tags["reason"], tags["stage"]) == ("pruned", "asha", "search")
    assert read_record(Location.of(sweep.path("t000"))).mlflow["complete"]
    said = []
    sync_runs([f"storage_path={sweep.store.db.parent}"], said.append)
    assert said == [f"{sweep.store.db.parent}: MLflow has everything"]
    again = sweep.uploads()
    again.start()
    sweep.add(again, "t000", "t001")
    again.finish("finished", 60)
    assert sweep.steps() == {"t000": 3, "t001": 3}


def test_sync_leaves_the_trials_of_a_living_sweep_to_it(sweep, caplog):
    left_behind(sweep, caplog)
    with lock(Location.of(sweep.root)):
        result = sync_runs([str(sweep.path("t001")), f"tracking.uri={sweep.store.uri}"], lambda _: None)
    assert result.runs[0]["status"] == "skipped"
    assert sweep.store.runs() == []


def test_what_is_sent_is_noted_in_the_trials_run_json(sweep):
    uploads = sweep.uploads()
    uploads.start()
    sweep.add(uploads, "t000")
    sweep.train("t000", 1, 3)
    root = Location.of(sweep.path("t000"))
    RunRecord("t000", {}, "d1", "diverged", result={"step": 3, "run_id": None}).save(root)
    assert not look(root).sent
    uploads.close_trial("t000", "diverged", "energy gap")
    uploads.finish("finished", 60)
    record = read_record(root)
    run_id = sweep.children()["t000"]
    assert record.mlflow == {"uri": sweep.store.uri, "experiment": "jem", "run_id": run_id, "complete": True}
    assert (record.status, record.result["run_id"]) == ("diverged", run_id)
    assert look(root).sent


def test_a_trial_that_cannot_be_sent_does_not_hold_up_the_others(sweep, caplog):
    uploads = sweep.uploads()
    sweep.add(uploads, "t000", "t001", "t002")
    (sweep.path("t000") / "events.jsonl").mkdir()  # a log that cannot be read
    sweep.train("t001", 1, 3)
    sweep.train("t002", 1, 4)
    uploads.start()
    uploads.finish("finished", 4)
    assert not uploads.complete
    assert {"t001": 3, "t002": 4}.items() <= sweep.steps().items()
    assert sweep.store.status(uploads.run_id) == "FINISHED"
    assert "0 points and files, and the ends of 1 runs" in caplog.text


@pytest.mark.parametrize("when", ["between two drivers", "while it runs"])
def test_where_somebody_deleted_the_parent_its_children_get_the_new_one(sweep, when, caplog):
    uploads = sweep.uploads()
    uploads.start()
    sweep.add(uploads, "t000", "t001")
    sweep.train("t000", 1, 3)
    uploads.close_trial("t000", "pruned")
    sweep.train("t001", 1, 3)
    if when == "while it runs":
        until(lambda: len(sweep.store.rows("SELECT * FROM metrics")) == 2 * (3 + 3))
    gone = uploads.run_id if when == "while it runs" else uploads.finish("stopped", 60)
    sweep.store.rows("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", gone)
    sweep.log.append("metrics", step=1, metrics={"best/val/nll": 0.1})
    sweep.log.append("checkpoint", step=1)
    if when == "between two drivers":
        uploads = sweep.uploads()
        uploads.start()
        sweep.add(uploads, "t000", "t001")
        uploads.close_trial("t000", "pruned")
    assert uploads.finish("finished", 60) != gone
    assert uploads.complete
    assert sweep.steps() == {"t000": 3, "t001": 3}
