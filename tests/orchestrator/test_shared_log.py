"""A trial's log on an object store: shared by its process, followed by the driver; and files that are published."""

from __future__ import annotations

import json
import pickle

import pytest
from worker_runs import object_store

from jem.files import Location
from orchestrator import events
from orchestrator.events import EventLog
from orchestrator.published import bring, clear_workbench, fetch, publish, workbench
from orchestrator.sweep import shared_log
from orchestrator.sweep.shared_log import Following, Sharing, desk


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return object_store(tmp_path) / "sweep" / "trials" / "t000"


def steps(path):
    return [event["step"] for event in events.read(path)[0] if event["kind"] == "metrics"]


def log_steps(trial, *numbers):
    log = EventLog(desk(trial) / "events.jsonl")
    for step in numbers:
        log.append("metrics", step=step, metrics={"loss": 1.0})
    log.close()


def test_the_driver_has_what_a_trial_logged_and_keeps_what_it_added_itself(trial):
    following, copy = Following(), workbench(trial) / "events.jsonl"
    following.catch_up(trial)
    assert not copy.exists(), "nothing was shared yet"
    with Sharing(trial):
        log_steps(trial, 1, 2)
    following.catch_up(trial)
    assert steps(copy) == [1, 2]
    own = EventLog(copy)
    own.append("end", status="finished")
    own.close()
    with Sharing(trial):
        log_steps(trial, 3)
    Following().catch_up(trial)  # another driver, which has the copy
    assert steps(copy) == [1, 2, 3], "each once"
    assert [event["kind"] for event in events.read(copy)[0]] == ["metrics", "metrics", "end", "metrics"]


def test_a_log_is_shared_while_the_trial_runs(trial, monkeypatch):
    monkeypatch.setattr(shared_log, "SHARE_EVERY_S", 0.01)
    with Sharing(trial) as sharing:
        log_steps(trial, 1)
        for _ in range(500):
            if (trial / "events.jsonl").exists() and (trial / "events.jsonl").size():  # this store shows half a file
                break
            sharing.stop.wait(0.01)
        assert steps(workbench(trial) / "events.jsonl") == []
        Following().catch_up(trial)
        assert steps(workbench(trial) / "events.jsonl") == [1]


def test_a_trial_that_begins_again_elsewhere_goes_on_in_its_log(trial, tmp_path, monkeypatch):
    with Sharing(trial):
        log_steps(trial, 1, 2)
    monkeypatch.setenv("HOME", str(tmp_path / "other machine"))
    with Sharing(trial):
        log_steps(trial, 3)
    assert [json.loads(line)["step"] for line in (trial / "events.jsonl").read().splitlines()] == [1, 2, 3]


def test_what_a_process_that_died_had_not_shared_yet_is_kept_and_what_is_of_a_run_before_is_not(trial):
    with Sharing(trial):
        log_steps(trial, 1)
    log_steps(trial, 2)  # and then it is killed
    with Sharing(trial):
        assert steps(desk(trial) / "events.jsonl") == [1, 2]
    (trial / "events.jsonl").remove()  # --fresh has moved it away
    with Sharing(trial):
        assert steps(desk(trial) / "events.jsonl") == []


def test_what_was_made_for_a_run_before_is_kept_beside(trial, tmp_path):
    workbench(trial).mkdir(parents=True)
    (workbench(trial) / "events.jsonl").write_text("old")
    clear_workbench(trial)
    assert not workbench(trial).exists()
    (kept,) = workbench(trial).parent.glob("t000-*.1")
    assert (kept / "events.jsonl").read_text() == "old"
    local = Location.of(tmp_path / "run")
    local.mkdir()
    clear_workbench(local)
    assert local.exists(), "on a disk the folder is the run's own"


def test_the_copy_tells_of_no_file_that_is_not_there_yet(trial):
    with Sharing(trial):
        log = EventLog(desk(trial) / "events.jsonl")
        log.append("artifact", path="curves.png")
        log.close()
    following, copy = Following(), workbench(trial) / "events.jsonl"
    with pytest.raises(OSError, match=r"curves\.png"):
        following.catch_up(trial)
    assert not copy.exists()
    (trial / "curves.png").write(b"png")
    following.catch_up(trial)
    assert (workbench(trial) / "curves.png").read_bytes() == b"png"
    assert [event["path"] for event in events.read(copy)[0]] == ["curves.png"]


def test_on_a_disk_nothing_is_copied(tmp_path):
    trial = Location.of(tmp_path / "t000")
    with Sharing(trial):
        log_steps(trial, 1)
    Following().catch_up(trial)
    assert desk(trial) == workbench(trial) == tmp_path / "t000"
    assert [path.name for path in (tmp_path / "t000").iterdir()] == ["events.jsonl"]


def test_what_is_published_is_found_by_another_machine_and_fetched_once(trial, tmp_path, monkeypatch):
    made = workbench(trial) / "models" / "abc"
    made.mkdir(parents=True)
    for name in ("model.json", "model.safetensors"):
        (made / name).write_text(name)
    publish(trial, "models/abc")
    assert (trial / "models" / "abc" / "model.json").read() == b"model.json"
    monkeypatch.setenv("HOME", str(tmp_path / "other machine"))
    bring(trial, "models/none")
    bring(trial, "models/abc")
    here = workbench(trial) / "models" / "abc"
    assert sorted(path.name for path in here.iterdir()) == ["model.json", "model.safetensors"]
    (here / "model.json").write_text("ours")
    bring(trial, "models/abc")
    assert (here / "model.json").read_text() == "ours", "what is here is not fetched"
    fetch(trial, "models/abc")
    assert (here / "model.json").read_text() == "model.json"


def test_a_location_of_another_process_is_opened_by_its_uri(monkeypatch):
    """A pyarrow filesystem that is unpickled retries less than one that is opened by its URI."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    opened = []
    original = Location.of.__func__
    monkeypatch.setattr(Location, "of", classmethod(lambda cls, uri: opened.append(uri) or original(cls, uri)))
    there = Location.of("s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http") / "one" / "checkpoints"
    again = pickle.loads(pickle.dumps(there))
    assert opened[1] == f"{opened[0]}&region=us-east-1", "the region need not be asked for again"
    assert (again.uri, again.path) == (there.uri, "bucket/runs/one/checkpoints")
