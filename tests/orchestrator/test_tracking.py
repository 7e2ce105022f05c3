"""Against a real MLflow on SQLite. The database is read with sqlite3, not through the code under test."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from made_models import portable
from made_stores import Store
from PIL import Image
from ports import free_port

from jem.errors import ConfigError, JEMError
from jem.files import Location
from orchestrator import mlflow_run
from orchestrator.events import EventLog, read
from orchestrator.mlflow_run import TOKEN_TAG, RunSpec
from orchestrator.tracking import Uploader, default_uri, sync
from orchestrator.upload import Upload

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(migrated, tmp_path):
    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    return Store(tmp_path)


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def log(run_dir):
    return EventLog(run_dir / "events.jsonl")


def train(log, first, last, **more):
    for step in range(first, last + 1):
        log.append("metrics", step=step, metrics={"train/loss": 1.0 / step, **more})


def uploader(store, run_dir, **changes):
    arguments = {
        "log_path": run_dir / "events.jsonl",
        "run_dir": run_dir,
        "uri": store.uri,
        "experiment": "jem",
        "run_name": "digits",
        "artifact_root": str(store.artifacts),
    }
    return Uploader(**arguments | changes)


def upload(store, run_dir, run_id=None, **spec):
    fields = {"experiment": "jem", "run_name": "digits", "artifact_root": str(store.artifacts)} | spec
    return Upload(RunSpec(store.uri, **fields), run_dir / "events.jsonl", run_dir, run_id)


def test_a_run_is_in_mlflow_whole(store, run_dir, log, capfd):
    known = []
    sender = uploader(
        store, run_dir, params={"seed": 1, "data.name": "digits"}, tags={"workers": 2}, on_run=known.append
    )
    assert sender.run_id is None
    sender.start()
    log.append("attempt", attempt=1, step=0, workers=2)
    train(log, 1, 20, **{"train/nan": math.nan, "train/inf": math.inf})
    for step in (10, 20):
        (run_dir / "samples").mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(run_dir / "samples" / f"{step}.png")
        log.append("image", step=step, key="samples/grid", path=f"samples/{step}.png")
    (run_dir / "tables").mkdir()
    (run_dir / "tables" / "results.csv").write_text("a,b")
    log.append("artifact", path="tables/results.csv")
    log.append("artifact", path="tables")
    log.append("tags", tags={"device": "cpu"})
    log.append("checkpoint", step=20)
    log.append("metrics", step=20, metrics={"test/accuracy": 0.98})
    run_id = sender.finish("finished", 60)

    assert [run_id] == known == store.runs()
    points = store.points(run_id)
    assert store.steps(run_id) == list(range(1, 21))
    assert ("test/accuracy", 20, 0.98, 0) in points
    assert ("train/nan", 3, 0.0, 1) in points
    assert ("train/inf", 3, 1.7976931348623157e308, 0) in points
    assert store.params(run_id) == {"seed": "1", "data.name": "digits"}
    expected = {"workers": "2", "device": "cpu", "attempts": "1: from step 0 workers=2", "mlflow.runName": "digits"}
    assert expected.items() <= store.tags(run_id).items()
    files = store.files(run_id)
    assert [f.partition("+timestamp")[0] for f in files if f.endswith(".png")] == [
        "images/samples~grid+step+10",
        "images/samples~grid+step+20",
    ]
    assert "tables/results.csv" in files
    assert "timeline.jsonl" not in files
    assert store.status(run_id) == "FINISHED"
    assert read(run_dir / "events.jsonl")[0][-1]["kind"] == "end"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("status", "expected"), [("stopped", "KILLED"), ("diverged", "FAILED")])
def test_a_run_ends_as_what_it_is(store, run_dir, log, status, expected):
    sender = uploader(store, run_dir)
    sender.start()
    assert store.status(sender.finish(status, 60)) == expected


def test_while_a_run_goes_on_only_committed_points_are_sent(store, run_dir, log):
    train(log, 1, 10)
    log.append("checkpoint", step=10)
    train(log, 11, 15)
    sender = upload(store, run_dir)
    sender.catch_up()
    assert store.steps(sender.run_id) == list(range(1, 11))
    assert store.status(sender.run_id) == "RUNNING"
    log.append("checkpoint", step=15)
    sender.catch_up()
    assert store.steps(sender.run_id) == list(range(1, 16))


@pytest.mark.parametrize("lost", ["the last write", "the file", "half of the file"])
def test_a_crash_between_sending_and_remembering_sends_nothing_twice(store, run_dir, log, lost, caplog):
    remembered = run_dir / "uploaded.json"
    log.append("attempt", attempt=1, step=0)
    train(log, 1, 5, **{"train/nan": math.nan, "train/inf": -math.inf})
    log.append("checkpoint", step=5)
    first = upload(store, run_dir)
    first.catch_up()
    before = remembered.read_bytes()
    train(log, 6, 9, **{"train/nan": math.nan, "train/inf": -math.inf})
    Image.new("L", (8, 8)).save(run_dir / "9.png")
    log.append("image", step=9, key="samples", path="9.png")
    log.append("checkpoint", step=9)
    first.catch_up()
    points, files = store.points(first.run_id), store.files(first.run_id)
    assert len(points) == 27
    if lost == "the file":
        remembered.unlink()
    else:
        remembered.write_bytes(before if lost == "the last write" else before[: len(before) // 2])

    log.append("attempt", attempt=2, step=9)
    again = upload(store, run_dir, first.run_id)
    again.catch_up()
    assert store.points(first.run_id) == points
    assert store.files(first.run_id) == files
    train(log, 10, 11)
    log.append("checkpoint", step=11)
    again.catch_up()
    assert store.steps(first.run_id) == list(range(1, 12))
    assert "rewritten" not in store.tags(first.run_id)
    assert len(store.runs()) == 1


def test_points_that_a_crash_left_uncommitted_are_sent_only_as_run_again(store, run_dir, log):
    train(log, 1, 5)
    log.append("checkpoint", step=5)
    train(log, 6, 8, **{"train/first": 1.0})
    upload(store, run_dir).catch_up()
    log.append("attempt", attempt=2, step=5)
    train(log, 6, 10, **{"train/second": 1.0})
    sender = uploader(store, run_dir)
    sender.start()
    run_id = sender.finish("finished", 60)
    assert store.steps(run_id) == list(range(1, 11))
    assert store.steps(run_id, "train/first") == []
    assert store.steps(run_id, "train/second") == list(range(6, 11))
    assert "rewritten" not in store.tags(run_id)


def test_a_restart_remembers_what_waits_and_what_was_sent(store, run_dir, log):
    train(log, 1, 10)
    log.append("checkpoint", step=8)
    first = upload(store, run_dir)
    first.catch_up()
    assert store.steps(first.run_id) == list(range(1, 9))
    log.append("checkpoint", step=10)
    second = upload(store, run_dir)
    second.catch_up()
    assert store.steps(first.run_id) == list(range(1, 11))
    log.append("attempt", attempt=2, step=3)
    train(log, 4, 12)
    log.append("checkpoint", step=12)
    third = upload(store, run_dir)
    third.catch_up()
    assert store.steps(first.run_id) == list(range(1, 13))
    assert store.tags(first.run_id)["rewritten"] == "4-10"


def test_a_rollback_behind_sent_points_leaves_them_and_says_so(store, run_dir, log):
    train(log, 1, 10)
    log.append("checkpoint", step=10)
    sender = upload(store, run_dir)
    sender.catch_up()
    sent = store.points(sender.run_id)
    log.append("attempt", attempt=1, step=4, reason="diverged")
    for step in range(5, 13):
        log.append("metrics", step=step, metrics={"train/loss": 99.0})
    log.append("checkpoint", step=12)
    log.append("end", status="finished")
    sender.catch_up()
    sender.close()
    points = store.points(sender.run_id)
    assert points[:10] == sent
    assert [(step, value) for _, step, value, _ in points[10:]] == [(11, 99.0), (12, 99.0)]
    assert store.tags(sender.run_id)["rewritten"] == "5-10"
    timeline = store.artifacts / sender.run_id / "artifacts" / "timeline.jsonl"
    assert timeline.read_bytes() == log.path.read_bytes()


def test_another_machine_that_knows_only_checkpoints_sends_nothing_twice(store, tmp_path, run_dir, log):
    """The first machine sent steps 11 to 13 when its attempt failed; no checkpoint carries them."""
    train(log, 1, 10)
    log.append("checkpoint", step=10)
    carried = log.since(0)
    train(log, 11, 13)
    sender = uploader(store, run_dir)
    sender.start()
    run_id = sender.finish("failed", 60)

    other = tmp_path / "other"
    elsewhere = EventLog(other / "events.jsonl")
    elsewhere.extend(carried)
    elsewhere.append("attempt", attempt=2, step=10)
    train(elsewhere, 11, 15)
    second = uploader(store, other, run_id=run_id)
    second.start()
    assert second.finish("finished", 60) == run_id
    assert store.steps(run_id) == list(range(1, 16))
    assert store.tags(run_id)["rewritten"] == "11-13"
    assert "timeline.jsonl" in store.files(run_id)


def test_a_dead_server_slows_and_fails_nothing_and_nothing_is_lost(store, run_dir, log, caplog):
    sender = uploader(store, run_dir, uri=f"http://127.0.0.1:{free_port()}")
    start = time.monotonic()
    sender.start()
    assert time.monotonic() - start < 2, "the thread starts aside"
    slowest = 0.0
    for step in range(1, 101):
        start = time.perf_counter()
        log.append("metrics", step=step, metrics={"train/loss": 1.0 / step})
        slowest = max(slowest, time.perf_counter() - start)
        time.sleep(0.005)
    assert slowest < 2, "an append does not wait for a connection"
    start = time.monotonic()
    assert sender.finish("finished", 3) is None
    assert time.monotonic() - start < 20
    assert "100 points and files are still only in" in caplog.text
    assert str(log.path) in caplog.text
    assert caplog.text.count("cannot be written") == 1

    sender = uploader(store, run_dir)
    sender.start()
    assert store.steps(sender.finish("finished", 60)) == list(range(1, 101))


def test_a_store_that_comes_back_is_sent_everything_by_the_run_itself(migrated, tmp_path, run_dir, log):
    (tmp_path / "later").write_text("a file where the store's directory should be")
    store = Store(tmp_path / "later")
    sender = uploader(store, run_dir)
    sender.start()
    train(log, 1, 5)
    log.append("checkpoint", step=5)
    time.sleep(0.5)
    assert sender.run_id is None
    store.db.parent.unlink()
    store.db.parent.mkdir()
    shutil.copyfile(migrated, store.db)
    deadline = time.monotonic() + 30
    while sender.run_id is None or store.steps(sender.run_id) != [1, 2, 3, 4, 5]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    train(log, 6, 7)
    run_id = sender.finish("finished", 30)
    assert store.steps(run_id) == list(range(1, 8))
    assert len(store.runs()) == 1


def test_a_store_that_fails_in_the_middle_gets_the_rest_later(store, run_dir, log):
    train(log, 1, 5)
    log.append("checkpoint", step=5)
    sender = upload(store, run_dir)
    sender.catch_up()
    train(log, 6, 9)
    log.append("checkpoint", step=9)
    store.rows("ALTER TABLE metrics RENAME TO gone")
    with pytest.raises(Exception, match="metrics"):
        sender.catch_up()
    sender.disconnect()
    store.rows("ALTER TABLE gone RENAME TO metrics")
    sender.catch_up()
    assert store.steps(sender.run_id) == list(range(1, 10))


def test_a_resumed_run_is_running_again_and_keeps_its_first_parameters(store, run_dir, log, caplog):
    params = {"seed": "1", "long": "x" * 7000}
    first = upload(store, run_dir, params=params)
    first.catch_up()
    first.close("FAILED")
    upload(store, run_dir, first.run_id, params=params, tags={"t": "y" * 9000}).catch_up()
    assert store.status(first.run_id) == "RUNNING"
    assert not caplog.records
    upload(store, run_dir, first.run_id, params=params | {"seed": "2", "new": "3"}).catch_up()
    assert "seed (was 1, is 2)" in caplog.text
    assert store.params(first.run_id) == {"seed": "1", "long": "x" * 6000, "new": "3"}
    assert len(store.tags(first.run_id)["t"]) == 8000


@pytest.mark.parametrize("how", ["deleted", "never there"])
def test_a_run_that_mlflow_has_no_more_is_made_anew_from_the_start(store, run_dir, log, how, caplog):
    train(log, 1, 5)
    log.append("checkpoint", step=5)
    first = upload(store, run_dir)
    first.catch_up()
    gone = first.run_id
    if how == "deleted":
        store.rows("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", gone)
    else:
        for table in ("metrics", "latest_metrics", "tags", "runs"):
            store.rows(f"DELETE FROM {table}")
    known = []
    sender = uploader(store, run_dir, run_id=gone, on_run=known.append)
    sender.start()
    run_id = sender.finish("finished", 60)
    assert run_id != gone
    assert known == [run_id]
    assert store.steps(run_id) == [1, 2, 3, 4, 5]
    assert f"no run {gone} any more" in caplog.text


def test_a_run_whose_creation_was_not_answered_is_found_again(store, run_dir, log):
    upload(store, run_dir).catch_up()
    kept = json.loads((run_dir / "uploaded.json").read_text())
    kept["state"]["run_id"] = None
    (run_dir / "uploaded.json").write_text(json.dumps(kept))
    known = []
    sender = uploader(store, run_dir, on_run=known.append)
    sender.start()
    assert [sender.finish("finished", 60)] == store.runs() == known
    assert store.tags(known[0])[TOKEN_TAG] == kept["state"]["token"]


def test_drivers_that_come_first_at_once_make_one_database_and_one_that_is_killed_spoils_none(
    migrated, tmp_path, monkeypatch
):
    uri, made = f"sqlite:///{tmp_path}/s/mlflow.db", []

    def half(apart, _):
        apart.write_bytes(b"half")
        raise KeyboardInterrupt

    def slow(apart, path):
        made.append(path)
        shutil.copyfile(migrated, apart)
        time.sleep(0.5)
        apart.replace(path)

    monkeypatch.setattr(mlflow_run, "_make_database", half)
    with pytest.raises(KeyboardInterrupt):
        mlflow_run.prepared(uri)
    assert not (tmp_path / "s" / "mlflow.db").exists()
    monkeypatch.setattr(mlflow_run, "_make_database", slow)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(mlflow_run.prepared, [uri] * 4)) == [uri] * 4
    assert len(made) == 1
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["mlflow.db"]


def test_drivers_that_start_at_once_share_one_experiment(store, tmp_path):
    barrier = threading.Barrier(4)

    def start(number):
        folder = tmp_path / f"run{number}"
        EventLog(folder / "events.jsonl").append("note", text="")
        sender = upload(store, folder)
        barrier.wait()
        sender.catch_up()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(start, range(4)))
    assert len(store.runs()) == 4
    assert len(store.rows("SELECT * FROM experiments WHERE name = 'jem'")) == 1


def test_an_experiment_that_was_deleted_is_named_with_the_remedy(store, run_dir, log, caplog):
    upload(store, run_dir).catch_up()
    store.rows("UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'jem'")
    (run_dir / "uploaded.json").unlink()
    with pytest.raises(RuntimeError, match=r"'jem' was deleted.*restore"):
        upload(store, run_dir).catch_up()


def test_a_file_that_is_missing_or_no_image_does_not_hold_back_the_rest(store, run_dir, log, caplog):
    log.append("artifact", path="missing.csv")
    log.append("image", step=1, key="samples", path="missing.png")
    log.append("image", step=2, key="samples", path="events.jsonl")
    train(log, 1, 2)
    sender = uploader(store, run_dir)
    sender.start()
    assert store.steps(sender.finish("finished", 60)) == [1, 2]
    assert caplog.text.count("not sent to MLflow") == 3


def test_a_long_backlog_goes_out_in_batches(store, run_dir, log):
    for step in range(1, 1201):
        log.append("metrics", step=step, metrics={f"train/{name}": float(step) for name in "abc"})
    sender = uploader(store, run_dir)
    sender.start()
    run_id = sender.finish("finished", 60)
    assert [len(store.steps(run_id, f"train/{name}")) for name in "abc"] == [1200] * 3


def model_event(run_dir, seed=0, **figures):
    card = portable(run_dir / "models" / str(seed), seed, **figures)
    return {"step": 3, "path": f"models/{seed}", "digest": card.digest, "name": "jem-toys", "champion": "nll"}


def versions(store):
    return store.rows("SELECT version, run_id FROM model_versions WHERE name = 'jem-toys' ORDER BY version")


def test_a_final_model_is_registered_once_and_remembered(store, run_dir, log):
    train(log, 1, 3, **{"test/nll": 0.5})
    event = model_event(run_dir)
    log.append("model", **event)
    log.append("end", status="finished")
    sender = uploader(store, run_dir)
    sender.start()
    run_id = sender.finish("finished", timeout=60)
    assert sender.complete
    found = sender.registered(event["digest"])
    assert (found.model, found.champion) == ("models:/jem-toys/1", "yes: the first one (validation nll 0.5)")
    assert uploader(store, run_dir).registered(event["digest"]) == found, "the next driver knows it, too"
    assert store.status(run_id) == "FINISHED"
    assert store.steps(run_id, "test/nll") == [1, 2, 3]
    assert store.rows("SELECT metric_name, metric_value, metric_step FROM logged_model_metrics") == [
        ("test/nll", 0.5, 3)
    ]
    (run_dir / "uploaded.json").unlink()  # as another machine sees it
    assert sync_again(store, run_dir, run_id) == run_id
    assert versions(store) == [(1, run_id)]
    assert store.steps(run_id, "test/nll") == [1, 2, 3]


def sync_again(store, run_dir, run_id):
    again = upload(store, run_dir, run_id)
    again.catch_up()
    again.close()
    return again.run_id


def test_a_model_that_mlflow_was_away_for_is_sent_by_sync(store, run_dir, log):
    train(log, 1, 3)
    event = model_event(run_dir)
    log.append("model", **event)
    sender = uploader(store, run_dir, uri=f"http://127.0.0.1:{free_port()}")
    sender.start()
    assert sender.finish("finished", timeout=3) is None
    assert sender.registered(event["digest"]) is None
    run_id = sync(run_dir, store.uri)
    assert versions(store) == [(1, run_id)]
    assert uploader(store, run_dir).registered(event["digest"]).model == "models:/jem-toys/1"
    assert sync(run_dir, store.uri) == run_id
    assert versions(store) == [(1, run_id)]


def test_a_registry_that_is_away_for_a_moment_gets_the_model_and_one_that_refuses_holds_nothing_back(
    store, run_dir, log, caplog, monkeypatch
):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import FEATURE_DISABLED

    from orchestrator import register

    whole, errors = register.register, [ConnectionError("away")]

    def failing(*arguments):
        if errors:
            raise errors.pop()
        return whole(*arguments)

    monkeypatch.setattr(register, "register", failing)
    train(log, 1, 3)
    log.append("model", **model_event(run_dir))
    log.append("end", status="finished")
    sender = upload(store, run_dir)
    with pytest.raises(ConnectionError):
        sender.catch_up()
    sender.disconnect()
    sender.catch_up()
    assert versions(store) == [(1, sender.run_id)]
    refused = model_event(run_dir, seed=1)
    errors.append(MlflowException("no registry here", error_code=FEATURE_DISABLED))
    log.append("model", **refused)
    log.append("metrics", step=4, metrics={"train/loss": 0.1})
    log.append("model", **refused | {"path": "models/gone"})
    log.append("end", status="finished")
    sender.catch_up()
    assert sender.registered(refused["digest"]) is None
    assert store.steps(sender.run_id) == [1, 2, 3, 4]
    assert f"MLflow refuses the model jem-toys, which stays in {run_dir}/models/1: no registry here" in caplog.text
    assert f"{run_dir}/models/gone: holds no model" in caplog.text


def test_sync_sends_what_a_dead_server_did_not_take(store, run_dir, log):
    train(log, 1, 5)
    sender = uploader(store, run_dir, uri=f"http://127.0.0.1:{free_port()}")
    sender.start()
    sender.finish("stopped", 1)
    with pytest.raises(JEMError, match="5 points and files are still only in"):
        sync(run_dir)
    moved = run_dir.rename(run_dir.with_name("run.1"))
    run_id = sync(moved, store.uri)
    assert store.steps(run_id) == [1, 2, 3, 4, 5]
    assert store.status(run_id) == "KILLED"
    assert sync(moved) == run_id
    assert len(store.runs()) == 1


def test_sync_leaves_a_run_open_whose_log_does_not_end(store, run_dir, log):
    upload(store, run_dir).catch_up()
    train(log, 1, 5)
    log.append("checkpoint", step=3)
    run_id = sync(run_dir)
    assert store.steps(run_id) == [1, 2, 3]
    assert store.status(run_id) == "RUNNING"


def test_sync_of_a_directory_that_is_no_run_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"uploaded\.json: not the state of an upload"):
        sync(tmp_path)


def test_a_password_is_neither_kept_nor_shown(run_dir, log, caplog):
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    sender = uploader(Store(run_dir), run_dir, uri=uri)
    sender.start()
    sender.finish("finished", 2)
    assert "user:***@127.0.0.1" in caplog.text
    assert "secret" not in caplog.text + (run_dir / "uploaded.json").read_text()
    with pytest.raises(ConfigError, match=r"tracking\.uri.*has a password"):
        sync(run_dir)


def test_the_uri_is_the_configured_one_else_the_environments_else_sqlite_in_the_storage(tmp_path, monkeypatch):
    storage = Location.of(tmp_path)
    root = f"{tmp_path}/mlartifacts"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri(storage, None) == (f"sqlite:///{tmp_path}/mlflow.db", root)
    monkeypatch.chdir(tmp_path)
    assert default_uri(storage, "sqlite:///mine.db") == (f"sqlite:///{tmp_path}/mine.db", root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert default_uri(storage, None) == ("http://there:5000", None)
    assert default_uri(storage, "https://here") == ("https://here", None)


def test_an_object_store_needs_a_tracking_uri(monkeypatch):
    from pyarrow import fs

    storage = Location(fs.LocalFileSystem(), "bucket/runs", "s3")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"s3://bucket/runs: set tracking\.uri, or MLFLOW_TRACKING_URI") as caught:
        default_uri(storage, None)
    assert caught.value.problems[0].key == "tracking.uri"
    assert default_uri(storage, "postgresql://db/mlflow")[1] == "s3://bucket/runs/mlartifacts"
    assert default_uri(storage, "sqlite:////disk/a.db")[1] == "/disk/mlartifacts", "no S3 client is needed for it"


DRIVER = """
import sys, time
from pathlib import Path
from orchestrator.events import EventLog
from orchestrator.tracking import Uploader

run_dir, uri, artifacts, last = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
assert "mlflow" not in sys.modules, "importing mlflow takes seconds: that is the thread's part"
log = EventLog(run_dir / "events.jsonl")
begin = max([int(p.name) for p in run_dir.glob("[0-9]*")], default=0)  # checkpoints
known = run_dir / "run_id"
sender = Uploader(
    log_path=log.path, run_dir=run_dir, uri=uri, experiment="jem", run_name="digits", artifact_root=artifacts,
    run_id=known.read_text() if known.exists() else None, on_run=known.write_text,
)
sender.start()
log.append("attempt", attempt=1, step=begin)
for step in range(begin + 1, last + 1):
    log.append("metrics", step=step, metrics={"train/loss": 1.0 / step, "train/gap": step})
    time.sleep(0.004)
    if step % 25 == 0:
        (run_dir / str(step)).touch()
        log.append("checkpoint", step=step)
print(sender.finish("finished", float(sys.argv[5])))
"""


def driver(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, arguments)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )


def test_a_driver_that_is_killed_at_any_time_leaves_one_run_with_every_step_once(store, run_dir):
    for number in range(3):
        process = driver(run_dir, store.uri, store.artifacts, 100_000, 60)
        deadline = time.monotonic() + 30
        seen = len(store.rows("SELECT * FROM metrics"))
        while len(store.rows("SELECT * FROM metrics")) == seen and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.35 * number)
        process.kill()
        process.wait()
        process.stdout.close()
    last = max(int(path.name) for path in run_dir.glob("[0-9]*")) + 10
    process = driver(run_dir, store.uri, store.artifacts, last, 60)
    run_id = process.communicate(timeout=60)[0].strip()
    assert store.runs() == [run_id]
    assert store.steps(run_id) == store.steps(run_id, "train/gap") == list(range(1, last + 1))
    assert store.status(run_id) == "FINISHED"


def test_a_server_that_accepts_and_never_answers_does_not_hold_up_the_driver(run_dir):
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        process = driver(run_dir, f"http://127.0.0.1:{server.getsockname()[1]}", run_dir, 50, 3)
        assert process.communicate(timeout=30)[0] == "None\n"
        assert process.returncode == 0
        assert time.monotonic() - start < 10
