"""A run in an object store: its driver's log is filled from what the workers leave there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from worker_runs import HOOKED, Death, die, fit, object_store, poison, state_of, tiny

from jem.files import Location
from orchestrator import events, mirror
from orchestrator.launch import Launch
from orchestrator.mirror import Mirror
from orchestrator.runs import open_record, spool_of

SETTINGS = (HOOKED, "tracking.images_every=6", "evaluate.suite=fast", "checkpoint.keep=10")


@pytest.fixture
def store(tmp_path):
    return object_store(tmp_path)


@pytest.fixture
def root(store):
    return store / "run"


@pytest.fixture
def driver(tmp_path):
    """The driver's log."""
    return tmp_path / "driver" / "events.jsonl"


@pytest.fixture
def worker(tmp_path):
    """Where rank 0's log is, on another machine."""
    return tmp_path / "machine of rank 0" / "events.jsonl"


def told(path):
    """All events in order, and the commits, which may be seen at another time, and after later steps."""
    found = events.read(path)[0]
    commits = [(e["step"], e["rollbacks"]) for e in found if e["kind"] == "checkpoint"]
    return [e for e in found if e["kind"] != "checkpoint"], commits


def test_every_event_of_a_run_reaches_the_driver_once_and_in_order(root, driver, worker):
    with Mirror(root, driver, needed=True):
        assert fit(root, *SETTINGS, log_path=worker)["status"] == "finished"
    assert told(driver) == told(worker)
    kinds = [event["kind"] for event in events.read(driver)[0]]
    assert kinds.count("checkpoint") == 4
    assert kinds[-1] == "metrics", "the last evaluation comes after the last checkpoint"
    for event in events.read(driver)[0]:
        if event["kind"] == "image":
            assert (driver.parent / event["path"]).read_bytes() == (root / event["path"]).read()


def test_a_second_attempt_adds_its_events_and_repeats_none(root, driver, worker):
    with Mirror(root, driver, needed=True), pytest.raises(Death):
        fit(root, *SETTINGS, log_path=worker, hooks={7: die})
    with Mirror(root, driver, needed=True):
        fit(root, *SETTINGS, log_path=worker, attempt=2)
    assert told(driver)[0] == told(worker)[0]
    assert told(driver)[1] == [(0, 0), (4, 0), (8, 0), (12, 0)], "also the one whose commit the worker did not see"


def test_an_attempt_that_ends_before_the_workers_start_adds_nothing(root, driver, worker):
    with Mirror(root, driver, needed=True):
        fit(root, *SETTINGS, log_path=worker)
    before = driver.read_bytes()
    with Mirror(root, driver, needed=True):
        pass
    assert driver.read_bytes() == before


def test_what_a_run_did_before_it_diverged_reaches_the_driver(root, driver, worker):
    with Mirror(root, driver, needed=True):
        outcome = fit(
            root,
            *SETTINGS,
            "evaluate.every=100",
            "recovery.max=0",
            "recovery.every=3",
            log_path=worker,
            hooks={5: poison},
        )
    assert outcome["status"] == "diverged"
    assert {event["step"] for event in events.read(driver)[0] if event["kind"] == "metrics"} == {3}
    assert told(driver) == told(worker)


def test_events_come_while_the_run_goes_on(root, driver, worker, monkeypatch):
    monkeypatch.setattr(mirror, "LOOK_EVERY_S", 0.05)
    seen = []

    def look(*_):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and len(seen) < 1:
            if events.read(driver)[0]:
                seen.append(events.read(driver)[0][-1]["step"])
            time.sleep(0.02)

    with Mirror(root, driver, needed=True):
        fit(root, *SETTINGS, log_path=worker, report=look)
    assert seen[0] <= 4
    assert told(driver) == told(worker), "what was seen in mid-run came again at the end"


def test_on_a_local_disk_it_does_nothing(driver, tmp_path):
    place = Location.of(tmp_path / "disk")
    with Mirror(place, driver, needed=True):
        fit(place, "steps=4", log_path=tmp_path / "shared" / "events.jsonl")
    assert not driver.exists()


def test_with_a_private_ray_it_leaves_the_log_to_the_workers(root, driver):
    with Mirror(root, driver, needed=False):
        fit(root, *SETTINGS, log_path=driver)
    kinds = [event["kind"] for event in events.read(driver)[0]]
    assert kinds.count("attempt") == 1
    assert kinds.count("checkpoint") == 4


@pytest.mark.parametrize("needed", [True, False])
def test_a_driver_on_a_new_machine_first_takes_what_checkpoints_carry(root, driver, worker, needed):
    """Also one that was stopped between a commit and its look."""
    with pytest.raises(Death):
        fit(root, *SETTINGS, log_path=worker, hooks={10: die})
    with Mirror(root, driver, needed=needed):
        pass
    assert [e["step"] for e in events.read(driver)[0] if e["kind"] == "checkpoint"] == [0, 4, 8]
    assert [e["step"] for e in events.read(driver)[0] if "train/loss" in e.get("metrics", {})] == [3, 6]
    with Mirror(root, driver, needed=needed):
        pass
    assert [e["step"] for e in events.read(driver)[0] if e["kind"] == "checkpoint"] == [0, 4, 8], "once each"


def test_a_run_in_an_object_store_is_killed_and_goes_on_elsewhere_as_on_a_disk(root, tmp_path, worker):
    with pytest.raises(Death):
        fit(root, *SETTINGS, log_path=worker, hooks={6: die})
    assert fit(root, *SETTINGS, log_path=tmp_path / "a third machine" / "events.jsonl")["status"] == "finished"
    fit(tmp_path / "disk", *SETTINGS)
    assert state_of(root) == state_of(tmp_path / "disk")


def test_a_run_that_fresh_has_moved_away_leaves_no_log_to_the_new_one(store, tmp_path, monkeypatch):
    """Else the new run's events would follow the old one's, and go to its MLflow run."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config, root = tiny(), store / "tiny"
    spool = spool_of(root)
    for number in (1, 2):
        record = open_record(root, config, fresh=True)
        attempt = Launch(config, root, record, f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "artifacts"))
        assert attempt.folder == spool
        assert not spool.exists()
        assert attempt.uploader.run_id is None
        record.attempts.append({"number": 1})
        record.save(root)
        events.EventLog(attempt.log_path).append("note", text=f"run {number}")
        (spool / "uploaded.json").write_text(json.dumps({"state": {"run_id": f"mlflow run {number}"}}))
        again = Launch(config, root, record, f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "artifacts"))
        assert again.uploader.run_id == f"mlflow run {number}"
    assert events.read(Path(f"{spool}.1") / "events.jsonl")[0][0]["text"] == "run 1"
