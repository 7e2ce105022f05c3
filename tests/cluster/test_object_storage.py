"""Checkpoints, data, models and MLflow's artifacts on an S3-compatible server."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
from ports import free_port
from ray_faults import ROOT, TINY, Command, bring

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
PLAIN = [a for a in TINY if not a.startswith("model.")]
RUNS = "s3://bucket/runs"


def job(name, folder, *arguments):
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]), ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def server(folder, gate):
    """MLflow's, whose artifacts go into the bucket."""
    port, log = free_port(), folder / "server.log"
    command = [Path(sys.executable).with_name("mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    command += ["--artifacts-destination", "s3://bucket/mlflow"]
    with log.open("w") as file:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=file, start_new_session=True, env=environment
        )
    deadline = time.monotonic() + 300
    while "Application startup complete" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, 15)
    process.wait(20)


def keys(prefix=""):
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def objects(prefix=""):
    """The bucket's keys and their bytes."""
    client = boto3.client("s3")
    return {key: client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys(prefix)}


def test_everything_of_a_run_may_be_in_a_bucket_and_no_secret_is(folder, server):
    prepared, out = job("prepare", folder, "digits", "s3://bucket/digits")
    data = ("data.name=parquet", "data.root=s3://bucket/digits")
    settings = [*PLAIN[:-1], *data, f"storage_path={RUNS}", f"tracking.uri={server}"]
    command = Command(folder, *settings, "evaluate.suite=fast", "name=one", "steps=20", "workers=1")
    trained = command.end()
    assert trained.code == 0, trained.err
    result = trained.result
    assert result["checkpoint"] == f"{RUNS}/one/checkpoints/20"
    assert result["curves"] == f"{RUNS}/one/curves.png"
    evaluated, more = job("evaluate", folder, f"{RUNS}/one", "evaluate.suite=fast", f"tracking.uri={server}")
    assert evaluated["run_id"] == result["run_id"]
    assert evaluated["report"].startswith(f"{RUNS}/one/evaluations/fast-")
    drawn, _ = job("sample", folder, f"{RUNS}/one", "count=4", "steps=2")
    scored, _ = job("score", folder, f"{RUNS}/one", "s3://bucket/digits", "s3://bucket/scores")
    assert scored["rows"] == prepared["metrics"]["train_images"] + 143 + 360
    there = objects()
    assert json.loads(there[evaluated["report"].removeprefix("s3://bucket/")])["metrics"] == evaluated["metrics"]
    assert there[f"{drawn['folder'].removeprefix('s3://bucket/')}/grid.png"][1:4] == b"PNG"
    models = [key for key in there if key.startswith("runs/one/models/") and key.endswith("model.safetensors")]
    assert len(models) == 1
    artifacts = [key for key in there if key.startswith("mlflow/") and "/artifacts/" in key]
    assert {"recipe.yaml", "curves.png"} <= {key.rpartition("/")[2] for key in artifacts}, "through MLflow's server"
    assert any(key.endswith("model.safetensors") and there[key] == there[models[0]] for key in artifacts)
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    for name, content in (there | written).items():
        assert secret.encode() not in content, name
    assert secret not in out + more + trained.out + trained.err


def test_an_evaluation_of_elsewhere_is_found_in_the_bucket(folder, server, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # another machine, which has nothing of the run
    again, _ = job("evaluate", tmp_path, f"{RUNS}/one", "evaluate.suite=fast", f"tracking.uri={server}")
    assert again["cached"]
    assert [p.name for p in tmp_path.iterdir() if p.name != ".mlflow"] in ([".cache"], [".cache", ".ray"])


SWEEP = """
base: digits_uniform
objective: val/nll
searcher: random
budget: {trials: 2, steps: 30}
finalists: 0
space: {sgld.step_size: {uniform: [0.5, 1.0]}}
settings: {workers: 1, model.name: "slow_net:slow", model.options.pause: 0.3, model.channels: [4], batch_size: 8,
  optimizer.warmup_steps: 2, sgld.steps: 2, replay.capacity: 200, checkpoint.every: 10, tracking.every: 5}
"""


def test_a_sweep_in_a_bucket_that_is_stopped_goes_on_on_another_machine(folder, gate, tmp_path, monkeypatch):
    (folder / "small.yaml").write_text(SWEEP)
    command = [sys.executable, str(ROOT / "jobs" / "sweep.py"), "small.yaml", "name=small", f"storage_path={RUNS}"]
    command += [f"tracking.uri=sqlite:///{folder}/sweep.db"]
    with (folder / "first.out").open("w") as out, (folder / "first.err").open("w") as err:
        first = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)
    deadline = time.monotonic() + 300
    while not any("checkpoints/10/manifest.json" in key for key in keys("runs/small/trials/")):
        assert first.poll() is None, (folder / "first.err").read_text()
        assert time.monotonic() < deadline, (folder / "first.err").read_text()
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    assert first.wait(40) == 143, (folder / "first.err").read_text()
    bring(tmp_path, "slow_net.py")
    monkeypatch.setenv("HOME", str(tmp_path))  # another machine, which has nothing of the sweep
    second = subprocess.run([*command[:2], str(folder / "small.yaml"), *command[3:]], cwd=tmp_path, capture_output=True)
    assert second.returncode == 0, second.stderr.decode()
    result = json.loads(second.stdout.splitlines()[-1])
    assert result["trials"] == {"finished": 2}
    assert result["recipe"] == f"{RUNS}/small/recipe.yaml"
    there = objects("runs/small/")
    names = {key.removeprefix("runs/small/") for key in there}
    assert {"sweep.yaml", "sweep.json", "trials.csv", "summary.md", "recipe.yaml", "decision.json"} <= names
    stopped = json.loads(there["runs/small/trials/t000/run.json"])["attempts"]
    assert [attempt["status"] for attempt in stopped][:2] == ["stopped", "finished"], "a third is the winner's"
    with sqlite3.connect(folder / "sweep.db") as db:
        runs = sorted(db.execute("SELECT name, status FROM runs").fetchall())
        query = "SELECT r.name, m.step FROM metrics m JOIN runs r USING (run_uuid) WHERE key = 'train/loss'"
        steps = sorted(db.execute(query).fetchall())
    assert runs == [(name, "FINISHED") for name in ("small", "t000", "t001")]
    expected = [(name, step) for name in ("t000", "t001") for step in range(5, 31, 5)]
    assert [point for point in steps if point[0] != "small"] == expected, "each point once"
