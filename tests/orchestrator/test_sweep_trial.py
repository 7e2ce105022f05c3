"""A trial's work, without Ray: what Ray Tune is told of it."""

import json
from types import SimpleNamespace

import pytest
import torch

from jem.errors import JEMError
from jem.files import Location
from orchestrator.config import load_run_config
from orchestrator.ray_cluster import Cluster
from orchestrator.runs import read_record
from orchestrator.sweep.config import load_sweep
from orchestrator.sweep.trial import CLOSING, Setting, Trial, Work, train_here

SWEEP = """
base: digits
budget: {trials: 4, steps: 30}
settings: {workers: 1, model.channels: [4], sgld.steps: 1, replay.capacity: 64, batch_size: 16, recovery.max: 0}
space:
  optimizer.learning_rate: {loguniform: [0.0001, 1000000]}
  sgld.step_size: {loguniform: [0.1, 10]}
"""


@pytest.fixture
def work(tmp_path):
    def begin(point, name="t001", **settings):
        (tmp_path / "small.yaml").write_text(SWEEP)
        arguments = [f"storage_path={tmp_path}", *(f"{k}={v}" for k, v in settings.items())]
        sweep = load_sweep(str(tmp_path / "small.yaml"), arguments)
        root = Location.of(tmp_path / "sweep")
        setting = Setting(sweep, root, Cluster(True, 2, 0), 1.0)
        return Work(setting, Trial(name, "search", 1, name, point, 0))

    return begin


def told(work):
    results = [work.next()]
    while not results[-1]["done"]:
        results.append(work.next())
    return results


def test_a_trial_reports_each_measurement_and_then_its_end(work):
    one = work({"sgld.step_size": 0.5})
    results = told(one)
    assert [result["step"] for result in results] == [*range(3, 30, 3), 30]
    assert {"val/accuracy", "val/nll", "val/ece", "val/ood/interp/log_px/auroc"} <= results[0].keys()
    record = read_record(one.root)
    assert results[-1]["status"] == record.status == "finished"
    assert results[-1]["val/nll"] == record.result["metrics"]["val/nll"]
    assert json.loads((one.root / "trial.json").read())["point"] == {"sgld.step_size": 0.5}
    assert record.science["sgld.step_size"] == 0.5


def test_a_finished_trial_is_not_run_again(work):
    first = told(work({"sgld.step_size": 0.5}))
    again = work({"sgld.step_size": 0.5})
    assert told(again)[-1]["val/nll"] == first[-1]["val/nll"]
    assert len(read_record(again.root).attempts) == 1


def test_a_diverged_trial_counts_as_the_worst_there_is(work):
    one = work({"optimizer.learning_rate": 1000000}, **{"optimizer.warmup_steps": 0})
    last = told(one)[-1]
    assert last["status"] == "diverged"
    assert last["val/nll"] == 100
    assert last["val/accuracy"] == 0
    assert read_record(one.root).result["message"]


def test_a_trial_that_crashes_counts_as_the_worst_and_says_why(work):
    one = work({}, **{"model.name": "no_such_package:network"})
    last = told(one)[-1]
    assert last["status"] not in ("finished", "running")
    assert last["val/nll"] == 100
    assert "no_such_package" in read_record(one.root).result["message"]


def test_a_trial_that_is_left_is_pruned_with_what_it_has_reached(work):
    one = work({}, steps=100000, **{"evaluate.every": 5, "checkpoint.every": 1000})
    reached = one.next()["step"]
    one.leave("pruned")
    record = read_record(one.root)
    assert record.status == "pruned"
    assert reached <= record.result["step"] < 100000
    assert told(one)[-1]["status"] == "pruned"


def test_when_the_budget_is_spent_no_further_trial_begins(work, tmp_path):
    Location.of(tmp_path / "sweep" / CLOSING).write(b"1")
    one = work({})
    assert told(one)[-1]["status"] == "out of time"
    assert not one.root.exists()


@pytest.mark.parametrize(("device", "gpu", "there", "used"), [
    ("auto", False, True, "cpu"),  # every GPU of a machine is visible to a process that was given none
    ("auto", True, True, "cuda"),
    ("auto", True, False, "cpu"),
    ("cuda", False, True, "cuda"),
    ("cpu", True, True, "cpu"),
])  # fmt: skip
def test_a_trial_computes_on_a_gpu_that_ray_has_given_it(tmp_path, monkeypatch, device, gpu, there, used):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr("orchestrator.worker.run", lambda _job, _world, found: {"on": found.type})
    assert here(tmp_path, gpu, f"device={device}") == {"on": used}


def test_what_a_trial_is_given_is_what_its_process_uses(work, monkeypatch):
    given = []
    monkeypatch.setattr("orchestrator.sweep.trial.train_here", lambda *a: given.append(a[5]) or {"status": "stopped"})
    for resources in ({}, {"resources.gpu": 0.5}):
        work({}, f"t{len(given)}", **resources).thread.join()
    assert given == [False, True]


def test_a_process_that_has_lost_its_gpu_ends_so_that_the_next_trial_has_another(tmp_path, monkeypatch):
    class Ended(BaseException):
        pass

    def fail(*_):
        raise RuntimeError("an illegal memory access was encountered")

    def end(code):
        raise Ended(code)

    monkeypatch.setattr("orchestrator.worker.run", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr("orchestrator.sweep.trial.os._exit", end)
    with pytest.raises(Ended, match="1"):
        here(tmp_path, True, "device=cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    with pytest.raises(JEMError, match="illegal"):
        here(tmp_path, True, "device=cuda", "recovery.max_failures=0")


def test_deterministic_kernels_are_of_the_trial_that_asks_for_them(tmp_path, monkeypatch):
    seen = []

    def setup(*_):
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise JEMError("enough")

    monkeypatch.setattr("orchestrator.worker.setup", setup)
    for wanted in ("true", "false"):
        here(tmp_path, False, f"deterministic={wanted}")
    assert seen == [True, False]


def here(folder, gpu, *settings):
    config = load_run_config("digits", ["workers=1", *settings])
    attempt = SimpleNamespace(log_path=folder / "events.jsonl", number=1)
    return train_here(config, Location.of(folder), attempt, None, 1.0, gpu)
