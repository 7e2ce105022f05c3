"""jobs/train.py with Ray Train, MLflow and signals, all real. Each fit costs 10 to 30 s: there are six."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from commands import Command, Tracked, bring, log_of, train
from PIL import Image

from jem import checkpoint
from jem.config import DataConfig
from jem.data.sources import load
from jem.files import Location

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TINY = (
    *("digits", "workers=2", "batch_size=8", "model.name=slow_net:slow", "model.channels=[4]"),
    "model.options.pause=0.2",  # a run can be met on its way; it costs no CPU
    *("optimizer.warmup_steps=2", "optimizer.ema_decay=0.9", "sgld.steps=2", "replay.capacity=24"),
    *("checkpoint.every=10", "tracking.every=5", "tracking.images_every=10", "evaluate.every=10"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are typed."""
    folder = tmp_path_factory.mktemp("typed")
    bring(folder, "slow_net.py")
    return folder


@pytest.fixture
def start(folder):
    """Start a command; afterwards none of its processes may be left."""
    commands = []

    def begin(*arguments):
        commands.append(Command(folder, *TINY, *arguments))
        return commands[-1]

    yield begin
    left = [process for command in commands for process in command.left()]
    for command in commands:
        command.kill()
    assert left == [], "processes were left behind"


def manifests(run):
    return [checkpoint.read_manifest(d) for d in checkpoint.committed(Location.of(run) / "checkpoints")]


def state_at(run, step):
    """Digests of weights, average, moments, chains and generators."""
    manifest = next(m for m in manifests(run) if m.step == step)
    return {name: entry["sha256"] for name, entry in manifest.files.items() if name != "events.jsonl"}


def once_each(points):
    places = [(key, step) for key, step, _ in points]
    return len(places) == len(set(places))


@pytest.fixture(scope="module")
def first(folder):
    """The first fit: 20 steps."""
    return train(folder, *TINY, "name=first", "steps=20")


def test_a_run_ends_with_its_result_its_folder_and_its_mlflow_run(folder, first):
    assert first.code == 0, first.err
    run, result = folder / "runs" / "first", first.result
    assert (result["name"], result["status"], result["step"]) == ("first", "finished", 20)
    assert result["checkpoint"] == f"{run}/checkpoints/20"
    wanted = {"test/accuracy", "ood/uniform/log_px/auroc", "val/ece", "train/energy_gap", "train/images_per_s"}
    assert wanted <= result["metrics"].keys()
    assert "first: finished at step 20" in first.out, "a table for people comes before the JSON"

    record = json.loads((run / "run.json").read_text())
    assert (record["name"], record["status"]) == ("first", "finished")
    assert record["mlflow"]["run_id"] == result["run_id"]
    assert [a["number"] for a in record["attempts"]] == [1]
    assert not (run / "same-folder").exists()
    assert (run / "ray" / "attempt-1").is_dir(), "each attempt has its own Ray run"
    assert [m.step for m in manifests(run)] == [20, 10, 0]
    assert manifests(run)[0].world_size == 2
    with Image.open(result["samples"]) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.size == (498, 498)

    tracked = Tracked(folder / "runs" / "mlflow.db", result["run_id"])
    assert tracked.status == "FINISHED"
    assert tracked.params == {key: str(value) for key, value in record["science"].items()} | {
        key: str(tuple(value)) for key, value in record["science"].items() if isinstance(value, list)
    }
    tags = tracked.tags
    assert {"host", "git.commit", "version.torch", "version.ray", "steps", "attempts"} <= tags.keys()
    assert "workers=2" in tags["attempts"]
    points = tracked.points
    assert once_each(points)
    assert {step for key, step, _ in points if key == "train/loss"} == {5, 10, 15, 20}
    assert {step for key, step, _ in points if key == "val/accuracy"} == {10, 20}
    assert {(key, value) for key, step, value in points if step == 20 and key.startswith(("test/", "ood/"))} == {
        (key, value) for key, value in result["metrics"].items() if key.startswith(("test/", "ood/"))
    }
    images = folder / "runs" / "mlartifacts" / result["run_id"] / "artifacts" / "images"
    assert {p.name.split("+")[2] for p in images.glob("samples+step+*.png")} == {"10", "20"}


def test_a_run_ends_with_a_registered_model_that_answers_as_it_was_measured(folder, first, monkeypatch):
    from mlflow import MlflowClient, pyfunc

    uri = f"sqlite:///{folder}/runs/mlflow.db"
    client = MlflowClient(uri, uri)
    version = client.get_model_version_by_alias("jem-digits", "champion")
    run_id = first.result["run_id"]
    assert (first.result["model"], version.run_id) == ("models:/jem-digits/1", run_id)
    assert first.result["champion"].startswith("yes: the first one (validation nll ")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.syspath_prepend(folder)  # the network is the user's own: slow_net.py
    validation, test = (getattr(load(DataConfig(name="digits")), name) for name in ("validation", "test"))
    model = pyfunc.load_model(version.source)
    table = model.predict(validation.images.permute(0, 2, 3, 1).numpy())
    right = table.label.astype(int).to_numpy() == validation.labels.numpy()
    p = np.array(table.probabilities.tolist())[np.arange(len(right)), validation.labels.numpy()]
    assert float(version.tags["jem.validation.accuracy"]) == pytest.approx(right.mean())
    assert float(version.tags["jem.validation.nll"]) == pytest.approx(-np.log(p).mean())
    assert table.in_distribution.mean() == pytest.approx(0.95, abs=1 / len(right))
    answers = model.predict(test.images.permute(0, 2, 3, 1).numpy())
    accuracy = (answers.label.astype(int).to_numpy() == test.labels.numpy()).mean()
    assert first.result["metrics"]["test/accuracy"] == pytest.approx(accuracy)
    (output,) = client.get_run(run_id).outputs.model_outputs
    linked = {metric.key: metric.value for metric in client.get_logged_model(output.model_id).metrics}
    assert linked["test/accuracy"] == first.result["metrics"]["test/accuracy"]


def test_a_command_for_steps_that_are_done_trains_nothing_and_prints_the_same(folder, first):
    before = len(log_of(folder / "runs" / "first"))
    fewer = train(folder, *TINY, "name=first", "steps=10", "workers=1", "tracking.every=7")
    assert (fewer.code, fewer.result) == (0, first.result)
    assert len(log_of(folder / "runs" / "first")) == before
    with sqlite3.connect(folder / "runs" / "mlflow.db") as db:
        assert db.execute("SELECT version FROM model_versions").fetchall() == [(1,)]


def test_a_run_recovers_by_itself_from_a_killed_worker_and_ends_as_if_nothing_had_been(folder, start, first):
    run = folder / "runs" / "killed"
    command = start("name=killed", "steps=20", "model.options.pause=0.6")
    command.wait_until(lambda: [e for e in log_of(run, "checkpoint") if e["step"] >= 10])
    workers = command.train_workers()
    assert len(workers) == 2
    assert {worker.nice() for worker in workers} == {os.nice(0)}, "training does not stand back for Ray"
    heard = command.heard_by_others()
    assert [name for name in heard if "TrainWorker" not in name] == [], "a private Ray is heard by this machine alone"
    assert len(heard) <= 1, "torch's meeting place of the workers cannot be told where to listen"
    workers[1].kill()
    ended = command.end()
    assert ended.code == 0, ended.err
    assert (ended.result["status"], ended.result["step"]) == ("finished", 20)
    starts = [event["step"] for event in log_of(run, "attempt")]
    assert starts == [0, 10], "at most one interval between checkpoints is run again"
    assert state_at(run, 20) == state_at(folder / "runs" / "first", 20)
    tracked = Tracked(folder / "runs" / "mlflow.db", ended.result["run_id"])
    assert tracked.status == "FINISHED"
    assert once_each(tracked.points)
    assert {step for key, step, _ in tracked.points if key == "train/loss"} == set(range(5, 21, 5))


def test_a_finished_run_trains_more_and_sigterm_gives_a_checkpoint_from_which_the_same_command_goes_on(
    folder, start, first
):
    """Two fits, in the run's one MLflow run; and while the first of them trains, a second driver is turned away."""
    arguments = ("name=first", "steps=60")
    run = folder / "runs" / "first"
    command = start(*arguments)
    command.wait_until(lambda: len(log_of(run, "attempt")) == 2)
    second = train(folder, *TINY, *arguments)
    assert second.code == 2
    assert f"pid {command.process.pid} on {socket.gethostname()} is working on this run" in second.result["message"]

    command.wait_until(lambda: [e for e in log_of(run, "checkpoint") if e["step"] >= 30])
    asked = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    ended = command.end()
    assert ended.code == 143, ended.err
    assert time.monotonic() - asked < 120
    result = ended.result
    assert result["status"] == "stopped"
    assert 30 <= result["step"] < 60
    assert result["checkpoint"] == f"{run}/checkpoints/{result['step']}"
    assert manifests(run)[0].step == result["step"]
    assert result["run_id"] == first.result["run_id"]
    tracked = Tracked(folder / "runs" / "mlflow.db", result["run_id"])
    assert tracked.status == "KILLED"
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["attempts"][-1]["status"]) == ("stopped", "stopped")

    finished = start(*arguments).end()
    assert finished.code == 0, finished.err
    assert (finished.result["step"], finished.result["run_id"]) == (60, first.result["run_id"])
    assert [event["step"] for event in log_of(run, "attempt")] == [0, 20, result["step"]]
    assert [a["number"] for a in json.loads((run / "run.json").read_text())["attempts"]] == [1, 2, 3]
    assert (run / "ray" / "attempt-3").is_dir()
    versions = tracked.rows("SELECT version FROM model_versions WHERE run_id = ? ORDER BY version")
    assert len(versions) == 2, "one when it first finished, and one now"
    assert finished.result["model"] == f"models:/jem-digits/{versions[-1][0]}"
    assert tracked.status == "FINISHED"
    assert once_each(tracked.points)
    assert {step for key, step, _ in tracked.points if key == "train/loss"} == set(range(5, 61, 5))
    assert {step for key, step, _ in tracked.points if key == "test/accuracy"} == {20, 60}


def test_a_run_whose_data_are_missing_ends_at_once_with_the_reason(folder, start):
    ended = start("name=missing", "steps=20", "workers=1", "data.name=slow_net:absent").end()
    assert ended.code == 2, ended.err
    assert (ended.result["status"], ended.result["checkpoint"]) == ("bad data", None)
    assert ended.result["message"] == "the disk with the images is not mounted"
    assert "Traceback" not in ended.err
    assert Tracked(folder / "runs" / "mlflow.db", ended.result["run_id"]).status == "FAILED"


def test_a_diverged_run_ends_with_exit_code_4_and_its_last_good_checkpoint(folder, start):
    give_up = ("recovery.max=0", "recovery.every=5", "recovery.healthy_steps=5")
    ended = start("name=diverged", "steps=40", "workers=1", "model.options.nan_after=12", *give_up).end()
    assert ended.code == 4, ended.err
    assert (ended.result["status"], ended.result["step"]) == ("diverged", 10)
    assert ended.result["checkpoint"] == f"{folder}/runs/diverged/checkpoints/10"
    assert "step 15: 3 of 5 updates were not finite" in ended.result["message"]
    assert "Traceback" not in ended.err
    assert Path(ended.result["checkpoint"], "manifest.json").exists()
