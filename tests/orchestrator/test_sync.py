"""What runs' logs still hold is sent after the runs, to a real MLflow on SQLite."""

from __future__ import annotations

import shutil
import sqlite3

import pytest
from made_runs import Driver, made, write_log
from ports import free_port
from worker_runs import object_store

from jem.errors import ConfigError
from orchestrator.events import EventLog
from orchestrator.runs import read_record, spool_of
from orchestrator.sync import sync_runs

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def storage(migrated, tmp_path, monkeypatch):
    """./runs of the folder that one is in, with MLflow's database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "runs").mkdir()
    shutil.copyfile(migrated, tmp_path / "runs" / "mlflow.db")
    return tmp_path / "runs"


@pytest.fixture
def dead():
    """The URI of a server that is not there."""
    return f"http://127.0.0.1:{free_port()}"


def rows(database, query, *arguments):
    with sqlite3.connect(database) as connection:
        return connection.execute(query, arguments).fetchall()


def steps(database, run_id):
    query = "SELECT step FROM metrics WHERE run_uuid = ? AND key = 'train/loss' ORDER BY step"
    return [step for (step,) in rows(database, query, run_id)]


def status(database, run_id):
    return rows(database, "SELECT status FROM runs WHERE run_uuid = ?", run_id)[0][0]


def synced(*arguments):
    """The result, and its entries as {name: status}; what is said of them by the way."""
    said = []
    result = sync_runs([*arguments], said.append)
    assert len(said) == max(1, len(result.runs))
    return result, {entry["name"]: entry["status"] for entry in result.runs}, "\n".join(said)


def test_all_runs_that_are_not_in_mlflow_are_sent_once_and_remembered(storage):
    roots = {name: made(storage, name, end, complete=False) for name, end in (("a", "finished"), ("b", "diverged"))}
    made(storage, "whole")
    result, entries, _ = synced()
    assert entries == {"a": "sent", "b": "sent"}
    assert (result.status, result.exit_code) == ("finished", 0)
    database = storage / "mlflow.db"
    for name, ending in (("a", "FINISHED"), ("b", "FAILED")):
        record = read_record(roots[name])
        run_id = record.mlflow["run_id"]
        assert record.mlflow["complete"]
        assert record.result["run_id"] == run_id
        assert steps(database, run_id) == list(range(1, 21))
        assert status(database, run_id) == ending
        params = dict(rows(database, "SELECT key, value FROM params WHERE run_uuid = ?", run_id))
        assert params["sgld.steps"] == str(record.science["sgld.steps"])
    _, entries, said = synced()
    assert (entries, said) == ({}, f"{storage}: MLflow has everything")
    again, entries, _ = synced("a")
    assert entries == {"a": "sent"}
    assert again.run_id == read_record(roots["a"]).mlflow["run_id"]
    assert len(rows(database, "SELECT * FROM runs")) == 2


def test_a_run_with_a_living_driver_is_left_to_it(storage):
    root = made(storage, "tiny", "running", complete=False)
    with Driver(root.path) as driver:
        result, entries, said = synced()
        assert f"pid {driver.process.pid} on" in said
    assert entries == {"tiny": "skipped"}
    assert result.exit_code == 0
    assert rows(storage / "mlflow.db", "SELECT * FROM runs") == []


def test_a_run_that_was_cut_off_is_sent_up_to_its_last_checkpoint_and_stays_open(storage):
    root = made(storage, "tiny", "running", step=25, complete=True)  # as the attempt before had left it
    _, entries, _ = synced()
    assert entries == {"tiny": "open"}
    record, database = read_record(root), storage / "mlflow.db"
    assert not record.mlflow["complete"]
    run_id = record.mlflow["run_id"]
    assert steps(database, run_id) == list(range(1, 21))
    assert status(database, run_id) == "RUNNING"
    log = EventLog(root.local / "events.jsonl")
    log.append("end", status="stopped")
    log.close()
    result, entries, _ = synced()
    assert entries == {"tiny": "sent"}
    assert result.run_id == run_id
    assert steps(database, run_id) == list(range(1, 26))


def test_a_run_that_cannot_be_sent_is_told_and_the_others_go_on(storage, dead):
    roots = [made(storage, name, complete=False, uri=dead if name == "b" else None) for name in "abc"]
    (made(storage, "d", complete=False).local / "run.json").write_text("{")
    made(storage, "e", complete=False, log=False)
    result, entries, said = synced()
    assert entries == {"a": "sent", "b": "failed", "c": "sent", "d": "failed", "e": "failed"}
    assert (result.status, result.exit_code) == ("failed", 1)
    assert result.message == "not everything could be sent of b, d, e"
    for text in ("20 points and files are still only in", "run.json: damaged", "there is no such log here"):
        assert text in said
    assert not read_record(roots[1]).mlflow["complete"]


def test_another_mlflow_can_be_named_and_gets_everything(storage, dead, tmp_path):
    root = made(storage, "tiny", complete=False, uri=dead)
    synced("tiny")
    result, entries, _ = synced("runs/tiny", f"tracking.uri=sqlite:///{storage}/mlflow.db")
    assert entries == {"tiny": "sent"}
    record = read_record(root)
    assert record.mlflow["uri"] == record.result["tracking_uri"] == f"sqlite:///{storage}/mlflow.db"
    assert steps(storage / "mlflow.db", result.run_id) == list(range(1, 21))
    location = rows(storage / "mlflow.db", "SELECT artifact_location FROM experiments WHERE name = 'jem'")[0][0]
    assert location.endswith("runs/mlartifacts")


def test_all_runs_are_asked_of_the_mlflow_that_is_named(storage, tmp_path):
    made(storage, "a", complete=False)
    assert synced()[1] == {"a": "sent"}
    assert "MLflow has everything" in synced()[2]
    assert "MLflow has everything" in synced(f"tracking.uri=sqlite:///{storage}/mlflow.db")[2]
    other = f"tracking.uri=sqlite:///{tmp_path}/other.db"
    shutil.copyfile(storage / "mlflow.db", tmp_path / "other.db")
    assert synced(other)[1] == {"a": "sent"}
    assert "MLflow has everything" in synced(other)[2]
    with pytest.raises(ConfigError, match=r"tracking.uri: is 'nonsense', which names no MLflow"):
        synced("tracking.uri=nonsense")


def test_a_password_comes_from_the_command_or_the_environment(storage, dead, monkeypatch):
    host = dead.removeprefix("http://")
    made(storage, "tiny", complete=False, uri=f"http://me:***@{host}")
    _, _, said = synced("tiny")
    assert "tracking.uri: is not kept in" in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{host}")
    _, _, said = synced("tiny")
    assert f"MLflow at http://me:***@{host} has not got everything" in said
    assert "secret" not in said


def test_the_log_of_a_run_in_an_object_store_is_in_this_machines_spool(storage, tmp_path):
    from orchestrator.survey import look
    from orchestrator.sync import _entry

    uri = f"sqlite:///{storage}/mlflow.db"
    root = made(object_store(tmp_path), "tiny", complete=False, uri=uri)
    assert "sync on the machine where the run's driver was" in _entry(look(root), None)["message"]
    write_log(spool_of(root) / "events.jsonl", "finished", 20)
    entry = _entry(look(root), None)
    assert entry["status"] == "sent"
    assert steps(storage / "mlflow.db", entry["run_id"]) == list(range(1, 21))
    assert read_record(root).mlflow["complete"]


def test_a_run_that_is_not_there_and_a_setting_that_is_none(storage):
    with pytest.raises(ConfigError, match="no run 'tiny'"):
        sync_runs(["tiny"])
    with pytest.raises(ConfigError, match=r"storage_path and tracking\.uri can be given"):
        sync_runs(["steps=2"])
