"""Workers and driver killed and stopped, with jobs/train.py and Ray Train real; each ends as if nothing had been."""

from __future__ import annotations

import random
import time

import pytest
from ray_faults import (
    TINY,
    Command,
    Tracked,
    attempts,
    bring,
    log_of,
    rank_1,
    seconds_until_back,
    state_at,
    tracked_once,
    train,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
STEPS = 40
SLOW = "model.options.pause=0.3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("typed")
    bring(folder, "slow_net.py")
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    ended = train(folder, *TINY, "name=undisturbed", f"steps={STEPS}", "workers=2")
    assert ended.code == 0, ended.err
    return state_at(folder / "runs" / "undisturbed", STEPS)


@pytest.fixture
def start(folder):
    """Start a run of 40 steps; afterwards none of its processes may be left."""
    commands = []

    def begin(name, *arguments):
        command = Command(folder, *TINY, f"name={name}", f"steps={STEPS}", SLOW, "workers=2", *arguments)
        commands.append(command)
        return command

    yield begin
    left = [process for command in commands for process in command.left(patience=90)]
    for command in commands:
        command.kill()
    assert left == [], "processes were left behind"


def test_after_kill_9_of_rank_1_the_run_is_back_within_a_minute_and_ends_with_the_same_bits(folder, start, undisturbed):
    run = folder / "runs" / "killed"
    command = start("killed")
    command.wait_until(lambda: [e for e in log_of(run, "checkpoint") if e["step"] >= 10])
    time.sleep(random.Random(0).uniform(0, 3))  # at any step
    committed = log_of(run, "checkpoint")[-1]["step"]
    at = time.time()
    rank_1(command, run).kill()
    ended = command.end()
    assert ended.code == 0, ended.err
    (_, (again, workers)) = attempts(run)
    assert seconds_until_back(run, at) < 120, "a minute, where nothing else is going on"
    assert again >= committed, "no more than what came after the last checkpoint is done again"
    assert workers == 2
    assert state_at(run, STEPS) == undisturbed
    assert tracked_once(folder, ended.result, STEPS) == (True, "FINISHED")


def test_after_kill_9_of_the_driver_the_same_command_goes_on_at_once_in_the_same_mlflow_run(folder, start, undisturbed):
    """Ray's other processes end within 3 s of their driver, two idle agents a minute later."""
    run = folder / "runs" / "driverless"
    command = start("driverless")
    command.wait_until(lambda: [e for e in log_of(run, "checkpoint") if e["step"] >= 10])
    workers = command.train_workers()
    command.process.kill()
    command.process.wait(20)
    ended = start("driverless").end()
    assert ended.code == 0, ended.err
    assert not [w for w in workers if w.is_running() and w.status() != "zombie"]
    (_, (again, _)) = attempts(run)
    assert again >= 10
    assert [e["attempt"] for e in log_of(run, "attempt")] == [1, 2]
    assert state_at(run, STEPS) == undisturbed
    assert tracked_once(folder, ended.result, STEPS) == (True, "FINISHED")


@pytest.mark.parametrize("workers", [2, 1])
def test_a_stopped_worker_is_found_and_replaced_and_nothing_of_it_stays(folder, start, undisturbed, workers):
    """Of two, the other finds out that nobody answers; of one, Ray does."""
    run, hang_timeout = folder / "runs" / f"stopped-{workers}", 20
    command = start(f"stopped-{workers}", f"workers={workers}", f"recovery.hang_timeout={hang_timeout}")
    command.wait_until(lambda: [e for e in log_of(run, "checkpoint") if e["step"] >= 10])
    at = time.time()
    stopped = rank_1(command, run) if workers == 2 else command.train_workers()[0]
    stopped.suspend()
    command.wait_until(lambda: len(attempts(run)) == 2)
    assert seconds_until_back(run, at) < hang_timeout + 180, "an idle machine takes 16 s more than the timeout, not 180"
    assert not stopped.is_running(), "Ray has killed it before others took its place"
    ended = command.end()
    assert ended.code == 0, ended.err
    assert attempts(run)[1][0] >= 10
    assert workers == 1 or state_at(run, STEPS) == undisturbed
    assert tracked_once(folder, ended.result, STEPS) == (True, "FINISHED")


def test_a_run_that_diverges_by_itself_goes_back_and_on_without_a_restart_of_ray(folder):
    """The recipe's settings are what makes it diverge; docs/results/divergence_recovered.json has ten seeds."""
    ended = train(folder, "digits_unstable", "name=unstable", "seed=5")
    assert ended.code == 0, ended.err
    run = folder / "runs" / "unstable"
    rollbacks = log_of(run, "rollback")
    assert rollbacks
    assert attempts(run) == [(0, 2)], "the workers were never started again"
    assert ended.result["metrics"]["val/accuracy"] >= 0.97
    tracked = Tracked(folder / "runs" / "mlflow.db", ended.result["run_id"])
    assert tracked.tags["recoveries"].startswith(
        f"1: step {rollbacks[0]['from_step']} to {rollbacks[0]['step']}, seed ("
    )
    assert tracked.tags["rewritten"].split(",")[0].startswith(f"{rollbacks[0]['step'] + 1}-")
    places = [(key, step) for key, step, _ in tracked.points]
    assert len(places) == len(set(places)), "a step that was run again was sent again"
    assert {step for key, step in places if key == "train/loss"} == set(range(50, 1201, 50))
