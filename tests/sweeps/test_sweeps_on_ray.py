"""Sweeps as people run them, on a real Ray: a crash, a divergence, a killed driver, both of Tune's deadlocks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)

SMALL = """
base: digits_uniform
searcher: {searcher}
scheduler: {scheduler}
budget: {{trials: {trials}, steps: {steps}}}
finalists: 1
seeds: 2
settings:
  {{workers: {workers}, model.channels: [4], sgld.steps: 1, replay.capacity: 64, batch_size: 16, recovery.max: 0,
    recovery.max_failures: 0}}
space:
  sgld.step_size: {{loguniform: [0.1, 10]}}
  optimizer.learning_rate: {rates}
"""


ASHA = "{name: asha, grace_steps: 20}"


def written(folder, more="", **changes):
    usual = {"searcher": "tpe", "scheduler": "{name: none}", "trials": 4, "steps": 40, "workers": 1}
    text = SMALL.format(**usual | {"rates": "{loguniform: [0.0001, 0.01]}"} | changes) + more
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def start(path, *settings):
    command = [sys.executable, ROOT / "jobs" / "sweep.py", path, f"storage_path={path.parent}/runs", *settings]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=path.parent
    )


def wait(driver, until):
    deadline = time.monotonic() + 300
    while not until():
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.05)


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err[-3000:]
    return json.loads(out.splitlines()[-1])


def trials(path):
    """Name -> run.json of every trial, of the one sweep there is."""
    found = {}
    for record in path.parent.glob("runs/small-*/trials/*/run.json"):
        found[record.parent.name] = json.loads(record.read_text())
    return found


def test_eight_trials_with_a_crash_a_divergence_and_a_killed_driver_end_with_a_decision(tmp_path):
    (tmp_path / "crashing.py").write_text("def network(*_, **__):\n    raise RuntimeError('out of luck')\n")
    crashes = "  model.name: {choice: [small_conv, 'crashing:network']}\n"
    path = written(tmp_path, crashes, trials=8, steps=60, rates="{choice: [0.001, 0.003, 1000000000]}")
    driver = start(path)
    wait(driver, lambda: sum(record["status"] == "finished" for record in trials(path).values()) >= 2)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = {name: record for name, record in trials(path).items() if record["status"] == "finished"}
    result = finish(start(path))
    after = trials(path)
    assert result["status"] == "finished"
    assert result["model"] == "models:/jem-digits/1"
    search = {name: record for name, record in after.items() if name.startswith("t")}
    assert len(search) == 8
    for name in before:  # nothing that was finished ran twice; the winner alone is looked at once more
        again = len(after[name]["attempts"]) - 1
        assert again == (name == result["best"]["name"])
    assert {record["status"] for record in search.values()} == {"finished", "diverged", "failed"}
    crashed = [record["result"]["message"] for record in search.values() if record["status"] == "failed"]
    assert all("out of luck" in message for message in crashed)
    finals = {name for name in after if name.startswith("f-")}
    assert len(finals) == 4
    assert {name.split("-")[1] for name in finals} >= {"base"}
    tested = [name for name, record in after.items() if "test/accuracy" in record["result"]["metrics"]]
    assert tested == [result["best"]["name"]]
    client = MlflowClient(result["tracking_uri"])
    runs = client.search_runs(["1"], max_results=100)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == result["run_id"]]
    assert sorted(run.info.run_name for run in children) == sorted(after)
    assert len(runs) == len(children) + 1
    assert client.get_model_version_by_alias("jem-digits", "champion").run_id in {c.info.run_id for c in children}
    assert finish(start(path)) == result  # read out
    recipe = Path(result["recipe"])
    planned = subprocess.run(
        [sys.executable, ROOT / "jobs" / "train.py", recipe, "--dry-run"], capture_output=True, text=True, check=True
    )
    assert json.loads(planned.stdout.splitlines()[-1])["status"] == "planned"


def kill_trials(driver):
    """How many there were."""
    running = psutil.Process(driver.pid).children(recursive=True)
    found = [process for process in running if "ResourceTrainable" in "".join(process.cmdline())]
    for process in found:
        process.kill()
    return len(found)


def test_trials_of_two_workers_that_end_early_leave_room_for_the_next(tmp_path):
    """A driver that takes a CPU would leave its workers none; workers that are left behind, the next trial, and those
    of a trial whose process is killed the same one.
    """
    path = written(tmp_path, workers=2, scheduler=ASHA, searcher="random", trials=4, steps=200)
    driver = start(path, "finalists=0", "sgld.steps=5", "checkpoint.every=20")
    wait(driver, lambda: list(path.parent.glob("runs/small-*/trials/*/checkpoints/20/manifest.json")))
    wait(driver, lambda: kill_trials(driver))
    result = finish(driver)
    assert any(len(record["attempts"]) >= 2 for record in trials(path).values()), "the first, or the next by then"
    statuses = [record["status"] for record in trials(path).values()]
    assert len(statuses) == 4
    assert "pruned" in statuses
    assert result["best"] is not None


def test_a_restored_search_keeps_its_scheduler(tmp_path):
    """The last ones learn nothing and end early, but for a driver that has forgotten to compare them."""
    rates = "{grid: [0.003, 0.002, 0.0015, 0.001, 0.000000001, 0.000000002, 0.000000003]}"
    path = written(tmp_path, scheduler=ASHA, searcher="grid", trials=8, steps=300, rates=rates)
    driver = start(path, "finalists=0", "sgld.steps=12")
    wait(driver, lambda: len(trials(path)) >= 3)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    known = set(trials(path))
    assert known <= {"t000", "t001", "t002", "t003", "t004"}
    finish(start(path, "finalists=0", "sgld.steps=12"))
    later = {name: record["status"] for name, record in trials(path).items() if name not in known}
    assert "pruned" in {later[name] for name in ("t005", "t006", "t007")}


def test_a_population_hands_on_weights_and_chains_and_survives_its_driver(tmp_path):
    path = written(tmp_path, scheduler="{name: pbt, interval_steps: 20}", searcher="random", trials=4, steps=60)
    driver = start(path)
    wait(driver, lambda: forks(path))
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = forks(path)
    result = finish(start(path))
    for name, told in before.items():  # what was done is not done again
        assert all(forks(path)[name][where] == fork for where, fork in told.items())
    assert result["status"] == "finished"
    search = {name: record for name, record in trials(path).items() if name.startswith("t")}
    assert set(search) == {"t000", "t001", "t002", "t003"}
    assert {record["status"] for record in search.values()} <= {"finished", "diverged"}
    for name, told in forks(path).items():
        folder = next(path.parent.glob(f"runs/small-*/trials/{name}"))
        for (_, donor), fork in told.items():
            assert fork["done"]
            assert fork["point"] != trial_json(folder.parent / donor)["point"]
        assert search[name]["science"]["sgld.step_size"] == trial_json(folder)["point"]["sgld.step_size"]
    client = MlflowClient(result["tracking_uri"])
    runs = client.search_runs(["1"], max_results=100)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == result["run_id"]]
    assert sorted(run.info.run_name for run in children) == sorted(trials(path))
    for run in children:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "val/nll")]
        assert len(steps) == len(set(steps))
        assert run.info.status == ("FINISHED" if trials(path)[run.info.run_name]["status"] == "finished" else "FAILED")


def trial_json(folder):
    return json.loads((folder / "trial.json").read_text())


def forks(path):
    """Name -> {(step, donor): fork} of the trials that went on from others."""
    found = {}
    for file in path.parent.glob("runs/small-*/trials/*/trial.json"):
        told = json.loads(file.read_text()).get("forks", [])
        if told:
            found[file.parent.name] = {(fork["step"], fork["donor"]): fork for fork in told if fork["done"]}
    return {name: told for name, told in found.items() if told}


def test_a_stopped_sweep_goes_on(tmp_path):
    path = written(tmp_path, trials=4, steps=400)
    driver = start(path, "finalists=0")
    wait(driver, lambda: any(record["status"] == "running" for record in trials(path).values()))
    time.sleep(1)
    driver.send_signal(signal.SIGTERM)
    assert finish(driver, 143)["status"] == "stopped"
    assert "running" not in {record["status"] for record in trials(path).values()}
    result = finish(start(path, "finalists=0"))
    over = {name: n for name, n in result["trials"].items() if n}
    assert sum(over.values()) == 4
    assert over.keys() <= {"finished", "diverged"}
