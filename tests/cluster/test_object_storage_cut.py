"""A connection to a bucket that is cut in the middle of writing checkpoints."""

from __future__ import annotations

import json

import pytest
from ray_faults import TINY, Command, attempts

from jem import checkpoint
from jem.files import Location
from orchestrator.runs import spool_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
RUNS = "s3://bucket/runs"


@pytest.fixture(autouse=True)
def opened(gate):
    yield
    gate.reopen()


def checkpoints_of(name):
    """The steps of all checkpoints that a run has, each of them whole, and of those that are not."""
    folder = Location.of(RUNS) / name / "checkpoints"
    whole = checkpoint.committed(folder)
    for directory in whole:
        checkpoint.read_manifest(directory).verify()
    return {int(d.name) for d in whole}, {int(d.name) for d in folder.children()} - {int(d.name) for d in whole}


class Cut:
    """A training whose connection is cut in the middle of writing checkpoints: {step: for how many seconds}."""

    def __init__(self, folder, gate, name, cuts, *settings):
        slow = ("model.options.pause=0.2", f"storage_path={RUNS}", f"tracking.uri=sqlite:///{folder}/own.db")
        self.folder, self.root = folder, Location.of(RUNS) / name
        self.arguments = (*TINY, f"name={name}", "workers=1", *slow, *settings)
        for step, for_s in cuts.items():
            gate.shut_at(f"PUT /bucket/runs/{name}/checkpoints/{step}/optimizer".encode(), for_s)
        self.ended = self.again()

    def again(self):
        return Command(self.folder, *self.arguments).end()

    def log(self, kind):
        lines = (spool_of(self.root) / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def steps(self, kind):
        return [event["step"] for event in self.log(kind)]


def test_a_connection_cut_for_3_s_costs_nothing_and_for_14_s_checkpoints_that_are_told_and_not_half_there(folder, gate):
    run = Cut(folder, gate, "cut", {20: 3, 40: 14}, "steps=90")
    assert run.ended.code == 0, run.ended.err
    assert run.steps("checkpoint")[:3] == [0, 10, 20]
    failed = run.log("failed_checkpoint")
    assert failed[0]["step"] == 40
    assert "NETWORK_CONNECTION" in failed[0]["reason"], "it says what it was"
    assert "CHECKPOINT of step 40 NOT WRITTEN" in run.ended.err
    whole, half = checkpoints_of("cut")
    assert {10, 20, 90} <= whole
    assert not whole & {event["step"] for event in failed}
    assert not half


def test_a_store_that_stays_away_ends_the_run_with_the_reason_and_the_same_command_goes_on(folder, gate):
    run = Cut(folder, gate, "away", {20: None}, "steps=50", "checkpoint.max_failures=2")
    assert run.ended.code == 1
    assert "2 checkpoints in a row could not be written" in run.ended.result["message"]
    assert "Traceback" not in run.ended.err
    assert run.steps("checkpoint") == [0, 10]
    gate.reopen()
    again = run.again()
    assert again.code == 0, again.err
    assert again.result["step"] == 50
    assert [step for step, _ in attempts(spool_of(run.root))] == [0, 10]
    whole, half = checkpoints_of("away")
    assert 50 in whole
    assert not half
