"""Three nodes of one CPU: a training and a sweep, with a node lost in mid-run and one that comes later."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest
from ray.cluster_utils import Cluster
from ray_faults import CHAINS, ROOT, TINY, Command, attempts, chains_kept, log_of, tracked_once

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def nodes(monkeypatch):
    """A cluster of Ray's own making: a head and two more nodes, with a CPU each."""
    # A node that is killed is noticed in 5 s instead of a minute.
    quick = {"health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 5}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": quick},
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def test_a_training_loses_a_node_and_takes_in_another(folder, nodes):
    run, steps = folder / "runs" / "three", 150
    command = Command(folder, *TINY, "name=three", f"steps={steps}", "workers=1..3", "model.options.pause=0.4")
    try:
        command.wait_until(lambda: [e for e in log_of(run, "checkpoint") if e["step"] >= 20])
        assert attempts(run)[0][1] == 3
        lost = next(node for node in nodes.list_all_nodes() if not node.head)
        nodes.remove_node(lost, allow_graceful=False)
        command.wait_until(lambda: len(attempts(run)) >= 2)
        assert attempts(run)[1][1] == 2
        since = attempts(run)[1][0]
        command.wait_until(lambda: log_of(run, "checkpoint")[-1]["step"] >= since + 10)
        nodes.add_node(num_cpus=1)
        command.wait_until(lambda: attempts(run)[-1][1] == 3)
        ended = command.end()
    finally:
        command.kill()
    assert ended.code == 0, ended.err
    for step, _ in attempts(run)[1:]:
        assert chains_kept(run, step, step + 10) >= CHAINS - 10 * 8, "the chains are those of before, in their places"
    assert tracked_once(folder, ended.result, steps) == (True, "FINISHED")


def test_a_sweep_ends_with_every_trial_though_a_node_is_lost_and_another_comes(folder, nodes):
    settings = {a.partition("=")[0]: a.partition("=")[2] for a in TINY if "=" in a}
    settings |= {"workers": "1", "model.options.pause": "0.3", "recovery.max_failures": "3"}
    told = "base: digits_uniform\nobjective: val/nll\nsearcher: random\n"
    told += "budget: {trials: 5, minutes: 6, steps: 60}\nfinalists: 0"
    lines = [told, "settings:", *(f"  {key}: {value}" for key, value in settings.items())]
    (folder / "space.yaml").write_text("\n".join([*lines, "space: {sgld.step_size: {uniform: [0.5, 1.0]}}"]))
    sweep = folder / "runs" / "nodes"
    command = [sys.executable, str(ROOT / "jobs" / "sweep.py"), "space.yaml", "name=nodes", "concurrency=3"]
    out, err = folder / "sweep.out", folder / "sweep.err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, cwd=folder, stdout=stdout, stderr=stderr, env=os.environ)
    try:

        def begun():
            return [p for p in (sweep / "trials").glob("*") if log_of(p, "checkpoint")]

        deadline = time.monotonic() + 300
        while len(begun()) < 3:
            assert process.poll() is None, err.read_text()
            assert time.monotonic() < deadline, err.read_text()
            time.sleep(0.3)
        time.sleep(4)
        lost = [node for node in nodes.list_all_nodes() if not node.head][-1]
        nodes.remove_node(lost, allow_graceful=False)
        time.sleep(5)
        nodes.add_node(num_cpus=1)
        assert process.wait(600) == 0, err.read_text()
    finally:
        process.kill()
    result = json.loads(out.read_text().splitlines()[-1])
    assert result["status"] == "finished"
    records = [json.loads(path.read_text()) for path in (sweep / "trials").glob("*/run.json")]
    assert [record["status"] for record in records] == ["finished"] * 5
    assert {record["result"]["step"] for record in records} == {60}
    again = [path for path in (sweep / "trials").glob("*") if len(log_of(path, "attempt")) > 1]
    assert again, "the trial whose node was lost began again"
    with sqlite3.connect(folder / "runs" / "mlflow.db") as db:
        statuses = db.execute("SELECT status FROM runs WHERE name != 'three'").fetchall()
    assert statuses == [("FINISHED",)] * 6, "five trials and their parent"
