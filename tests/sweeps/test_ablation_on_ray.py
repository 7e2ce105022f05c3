"""jobs/sweep.py with arms, on a real Ray: the driver is killed halfway, goes on, and compares the arms."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from scipy import stats

from orchestrator.config import load_run_config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)

ARMS = """\
base: digits_uniform
name: arms
seeds: 2
settings:
  model.channels: [4]
  sgld.steps: 1
  replay.capacity: 64
  batch_size: 16
  workers: 1
  evaluate: {every: 20, suite: fast}
  checkpoint.every: 20
  tracking.every: 20
resources: {cpu: 1}
budget: {steps: 60}
arms:
  jem: {}
  classifier: {objective.p_x_weight: 0, steps: 40}
"""
NAMES = ["classifier-s0", "classifier-s1", "jem-s0", "jem-s1"]


def start(folder):
    (folder / "arms.yaml").write_text(ARMS)
    command = [sys.executable, ROOT / "jobs" / "sweep.py", "arms.yaml"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=folder)


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err[-3000:]
    return json.loads(out.splitlines()[-1]), out


def records(folder):
    """Name -> run.json of every trial."""
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/arms/trials/*/run.json")}


def finished(folder):
    return {name: record for name, record in records(folder).items() if record["status"] == "finished"}


def wait(driver, until):
    deadline = time.monotonic() + 300
    while not until():
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.05)


def check_arms(found, kept):
    """Figures and differences are numpy's means and scipy's intervals of what each trial measured."""
    for arm in ("jem", "classifier"):
        for key, told in found[arm]["figures"].items():
            values = [kept[f"{arm}-s{seed}"]["metrics"][key] for seed in (0, 1)]
            check(told, values)
    assert {"test/accuracy", "test/nll", "test/ece", "ood/interp/log_px/auroc"} <= found["jem"]["figures"].keys()
    assert found["classifier"]["difference"].keys() == found["jem"]["figures"].keys()
    for key, told in found["classifier"]["difference"].items():
        pairs = [[kept[f"{arm}-s{seed}"]["metrics"][key] for seed in (0, 1)] for arm in ("classifier", "jem")]
        check(told, np.subtract(*pairs))


def check(told, values):
    expected = [np.mean(values)] * 3
    if np.ptp(values):
        expected[1:] = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert [told[key] for key in ("mean", "low", "high")] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert told["n"] == 2


def test_an_ablation_survives_its_driver_and_compares_its_arms(tmp_path):
    driver = start(tmp_path)
    wait(driver, lambda: finished(tmp_path))
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = finished(tmp_path)
    assert len(before) < 4
    result, out = finish(start(tmp_path))
    after = records(tmp_path)
    assert sorted(after) == NAMES
    assert {name: after[name]["attempts"] for name in before} == {n: r["attempts"] for n, r in before.items()}
    assert {name: record["result"]["step"] for name, record in after.items()} == {
        **{"jem-s0": 60, "jem-s1": 60, "classifier-s0": 40, "classifier-s1": 40},
    }
    assert (result["status"], result["trials"]) == ("finished", {"all": 4, "finished": 4})
    assert "4 of 4 trials finished. Differs from jem, paired by seed: " in out
    folder = tmp_path / "runs" / "arms"
    kept = {path.stem: json.loads(path.read_text()) for path in folder.glob("arms/*.json")}
    assert sorted(kept) == NAMES
    found = json.loads((folder / "arms.json").read_text())
    check_arms(found, kept)
    for name, told in kept.items():
        attempts = after[name]["attempts"]
        lasted = sum(attempt["ended"] - attempt["started"] for attempt in attempts if "ended" in attempt)
        assert 0 < told["seconds"] < lasted
        assert told["hardware"].startswith("1 thread; ")
        _, _, *typed = shlex.split(told["command"])
        again = load_run_config(typed[0], typed[1:])
        assert json.loads(json.dumps(again.science)) == after[name]["science"]
    client = MlflowClient(result["tracking_uri"])
    runs = client.search_runs(["1"], max_results=100)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == result["run_id"]]
    assert sorted(run.info.run_name for run in children) == NAMES
    assert len(runs) == 5
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.info.run_name: run.data.tags["candidate"] for run in children} == {n: n[:-3] for n in NAMES}
    for run in children:
        measured = {key: run.data.metrics[key] for key in found["jem"]["figures"]}
        assert measured == {key: kept[run.info.run_name]["metrics"][key] for key in measured}
    parent = client.get_run(result["run_id"])
    assert parent.data.metrics["jem/test/nll"] == found["jem"]["figures"]["test/nll"]["mean"]
    files = {file.path for file in client.list_artifacts(result["run_id"])}
    assert files >= {"summary.md", "trials.csv", "trials.parquet", "arms.json", "sweep.yaml"}
    assert client.search_model_versions("name = 'jem-digits'") == []
    assert finish(start(tmp_path))[0] == result  # read out
