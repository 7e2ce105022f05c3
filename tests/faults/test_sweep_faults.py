"""A sweep whose machines go away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_faults import Cluster, log_of

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

SWEEP = """
base: digits_uniform
searcher: grid
budget: {trials: 4, steps: 600}
finalists: 0
settings: {workers: 1, sgld.steps: 5, replay.capacity: 500, checkpoint.every: 50, recovery.max: 0}
space:
  optimizer.learning_rate: {grid: [0.0005, 0.0015, 0.002]}
"""


@pytest.fixture
def cluster():
    cluster = Cluster()
    cluster.head()
    yield cluster
    cluster.close()


def attempts(folder):
    """Trial -> (steps at which its attempts began, status)."""
    found = {}
    for path in folder.glob("runs/small-*/trials/*/run.json"):
        began = [event["step"] for event in log_of(path.parent, "attempt")]
        newest = max((event["step"] for event in log_of(path.parent, "checkpoint")), default=0)
        found[path.parent.name] = (began, newest, json.loads(path.read_text())["status"])
    return found


def test_a_lost_nodes_trial_goes_on_elsewhere_from_its_checkpoint(tmp_path, cluster):
    (tmp_path / "small.yaml").write_text(SWEEP)
    second = cluster.node()
    environment = os.environ | cluster.environment | {"RAY_ADDRESS": cluster.address}
    command = [sys.executable, ROOT / "jobs" / "sweep.py", "small.yaml", "storage_path=runs"]
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    deadline = time.monotonic() + 300
    while sum(newest >= 100 and status == "running" for _, newest, status in attempts(tmp_path).values()) < 2:
        assert time.monotonic() < deadline, driver.stderr.read()
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.1)
    cluster.kill(second)
    out, err = driver.communicate(timeout=600)
    assert driver.returncode == 0, err[-3000:]
    result = json.loads(out.splitlines()[-1])
    assert result["trials"]["finished"] == 4
    ended = attempts(tmp_path)
    again = [began for began, _, _ in ended.values() if len(began) > 1 and began != [0, 600]]
    assert len(again) == 1, "the trials of the node that is there go on"
    assert again[0][1] >= 100, "from its newest checkpoint"
