"""jobs/train.py with several seeds, on a real Ray: the driver is killed, goes on, and a seed is added later."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from mlflow import MlflowClient
from scipy import stats

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)

SMALL = (
    *("model.channels=[4]", "sgld.steps=1", "replay.capacity=64", "batch_size=16", "steps=60", "workers=1"),
    *("evaluate.every=20", "checkpoint.every=20"),
)


def start(folder, *settings):
    command = [sys.executable, ROOT / "jobs" / "train.py", "digits_uniform", *SMALL, *settings]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=folder)


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err[-3000:]
    return json.loads(out.splitlines()[-1]), out


def records(folder):
    """Name -> run.json of every seed's run."""
    found = folder.glob("runs/digits_uniform-*-seeds/trials/*/run.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def finished(folder):
    return {name: record for name, record in records(folder).items() if record["status"] == "finished"}


def wait(driver, until):
    deadline = time.monotonic() + 300
    while not until():
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.05)


def check_means(result, names):
    """The parent's figures are numpy's means and scipy's t-intervals of those that its children have in MLflow."""
    client = MlflowClient(result["tracking_uri"])
    runs = client.search_runs(["1"], max_results=100)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == result["run_id"]]
    assert sorted(run.info.run_name for run in children) == names
    assert len(runs) == len(children) + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.data.params["seed"] for run in children}) == len(names)
    parent = client.get_run(result["run_id"])
    assert {"test/accuracy", "test/nll", "test/ece", "val/nll", "ood/interp/log_px/auroc"} <= result["metrics"].keys()
    for key, mean in result["metrics"].items():
        values = [run.data.metrics[key] for run in children]
        told, expected = [mean, *result["intervals"][key]], [np.mean(values)] * 3
        if np.ptp(values):
            expected[1:] = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert told == pytest.approx(expected, rel=1e-9, abs=1e-12), key
        assert [parent.data.metrics[key + end] for end in ("", "/low", "/high")] == told
    assert parent.data.tags["seeds"] == f"{len(names)} of {len(names)} seeds finished"
    assert parent.data.tags["kind"] == "seeds"
    assert "test/accuracy" in parent.data.tags["mlflow.note.content"]
    files = {file.path for file in client.list_artifacts(result["run_id"])}
    assert files >= {"summary.md", "trials.csv", "trials.parquet", "seeds.json", "recipe.yaml"}
    versions = client.search_model_versions("name = 'jem-digits'")
    assert {version.run_id for version in versions} == {run.info.run_id for run in children}


def test_three_seeds_survive_their_driver_and_a_fourth_is_added(tmp_path):
    driver = start(tmp_path, "seeds=3")
    wait(driver, lambda: finished(tmp_path))
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = finished(tmp_path)
    assert len(before) < 3
    result, out = finish(start(tmp_path, "seeds=3"))
    after = records(tmp_path)
    assert sorted(after) == ["s0", "s1", "s2"]
    assert {name: after[name]["attempts"] for name in before} == {n: r["attempts"] for n, r in before.items()}
    assert result["seeds"] == {"all": 3, "finished": 3}
    assert result["name"].endswith("-seeds")
    assert (result["status"], result["step"]) == ("finished", 60)
    check_means(result, ["s0", "s1", "s2"])
    assert "95 % t-interval" in out
    assert finish(start(tmp_path, "seeds=3"))[0] == result  # read out
    more, _ = finish(start(tmp_path, "seeds=4"))
    assert more["run_id"] == result["run_id"]
    assert more["seeds"] == {"all": 4, "finished": 4}
    kept = records(tmp_path)
    assert {name: kept[name]["attempts"] for name in after} == {n: r["attempts"] for n, r in after.items()}
    check_means(more, ["s0", "s1", "s2", "s3"])
    (folder,) = tmp_path.glob("runs/*-seeds")
    assert pyarrow.parquet.read_table(folder / "trials.parquet")["seed"].to_pylist() == [0, 1, 2, 3]
    single = json.loads((folder / "trials" / "s3" / "run.json").read_text())
    assert single["science"]["seed"] == 3
