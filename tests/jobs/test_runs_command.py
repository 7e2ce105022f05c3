"""jobs/runs.py and jobs/sync.py as processes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from commands import Ended

from jem.files import Location
from jem.settings import digest
from jobs import sync as job
from orchestrator.config import load_run_config
from orchestrator.events import EventLog
from orchestrator.result import Result
from orchestrator.runs import RunRecord, write_config

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "ray", "mlflow", "sklearn", "torchvision", "matplotlib"}


def call(folder, *words, flags=()):
    """A command, ended."""
    command = [sys.executable, *flags, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=170, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def made(folder, name, *settings):
    """A run that was stopped at step 3 and that MLflow knows nothing of."""
    config = load_run_config("digits", [f"name={name}", "steps=9", *settings])
    root = Location.of(folder) / "runs" / name
    write_config(root, config)
    record = RunRecord(name, config.science, digest(config.science), "stopped")
    record.mlflow = {"uri": config.tracking.uri or f"sqlite:///{root.parent.local}/mlflow.db"}
    record.attempts = [{"number": 1, "host": "here", "pid": 7, "started": 1.0, "workers": 2, "status": "stopped"}]
    record.result = asdict(Result(name=name, step=3, status="stopped", message="stopped on request"))
    record.save(root)
    log = EventLog(root.local / "events.jsonl")
    log.append("attempt", attempt=1, step=0)
    for step in (1, 2, 3):
        log.append("metrics", step=step, metrics={"train/loss": 1.0})
    log.append("end", status="stopped")
    log.close()


@pytest.mark.parametrize("command", ["runs.py", "sync.py"])
def test_help_is_instant(tmp_path, command):
    ended = call(tmp_path, ROOT / "jobs" / command, "--help", flags=("-X", "importtime"))
    assert ended.code == 0
    assert not (HEAVY | {"pyarrow", "numpy"}) & modules(ended)
    assert "exit codes: 0 done" in ended.out


def modules(ended):
    return {line.rsplit("|", 1)[1].strip() for line in ended.err.splitlines() if line.startswith("import time:")}


def test_runs_are_listed_without_torch_ray_or_mlflow(tmp_path):
    made(tmp_path, "one")
    for name in ((), ("one",), ("runs/one",), ("one", f"storage_path={tmp_path}/runs")):
        ended = call(tmp_path, ROOT / "jobs" / "runs.py", *name, flags=("-X", "importtime"))
        assert ended.code == 0
        assert not HEAVY & modules(ended)
        assert "pyarrow" in modules(ended), "the imports are seen"
        assert ended.result["status"] == "listed"
        assert [run["name"] for run in ended.result["runs"]] == ["one"]
    assert ended.result["step"] == 3


def test_a_run_that_is_not_there_ends_with_2(tmp_path):
    made(tmp_path, "one")
    for command in ("runs.py", "sync.py"):
        ended = call(tmp_path, ROOT / "jobs" / command, "two")
        assert (ended.code, ended.result["status"]) == (2, "bad configuration")


def test_the_next_command_is_accepted_as_it_is_printed(tmp_path):
    made(tmp_path, "one", "sgld.steps=3", "sgld.clamp=1.5")
    listed = call(tmp_path, os.path.relpath(ROOT / "jobs" / "runs.py", tmp_path)).result["runs"][0]
    python, *words = shlex.split(listed["next"])
    assert python == "python"
    planned = call(tmp_path, *words, "--dry-run")
    assert planned.code == 0, planned.err
    assert planned.result["name"] == "one"
    assert f"{tmp_path}/runs/one" in planned.out
    assert "clamp: 1.5" in planned.out


def test_sync_sends_a_run_and_says_which_it_cannot(migrated, tmp_path, here):
    made(tmp_path, "one")
    made(tmp_path, "two", "tracking.uri=http://127.0.0.1:9")
    shutil.copyfile(migrated, tmp_path / "runs" / "mlflow.db")
    ended = call(tmp_path, ROOT / "jobs" / "sync.py")
    assert ended.code == 1
    assert {run["name"]: run["status"] for run in ended.result["runs"]} == {"one": "sent", "two": "failed"}
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as connection:
        points = connection.execute("SELECT key, step FROM metrics ORDER BY step").fetchall()
    assert points == [("train/loss", 1), ("train/loss", 2), ("train/loss", 3)]
    assert json.loads((tmp_path / "runs" / "one" / "run.json").read_text())["mlflow"]["complete"]
    assert here(job.sync, "one").code == 0
