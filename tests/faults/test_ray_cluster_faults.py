"""Nodes that come and go, other numbers of workers, a damaged file of Ray's, and signals while Ray starts."""

from __future__ import annotations

import signal
import time

import psutil
import pytest
from ray_faults import (
    CHAINS,
    TINY,
    Cluster,
    Command,
    attempts,
    bring,
    chains_kept,
    log_of,
    seconds_until_back,
    tracked_once,
    train,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("typed")
    bring(folder, "slow_net.py")
    return folder


@pytest.fixture
def start(folder):
    """Start a command; afterwards none of its processes may be left."""
    commands = []

    def begin(*arguments):
        commands.append(Command(folder, *TINY, *arguments))
        return commands[-1]

    yield begin
    left = [process for command in commands for process in command.left()]
    for command in commands:
        command.kill()
    assert left == [], "processes were left behind"


@pytest.fixture
def cluster(monkeypatch):
    cluster = Cluster()
    for key, value in cluster.environment.items():
        monkeypatch.setenv(key, value)
    cluster.head()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.close()


def test_a_run_takes_in_a_node_that_comes_and_goes_on_without_one_that_is_lost(folder, start, cluster):
    run, steps = folder / "runs" / "elastic", 200
    command = start("name=elastic", f"steps={steps}", "workers=1..2", "model.options.pause=0.4")
    command.wait_until(lambda: [e for e in log_of(run, "checkpoint") if e["step"] >= 10])
    second = cluster.node()
    command.wait_until(lambda: len(attempts(run)) == 2)
    command.wait_until(lambda: log_of(run, "checkpoint")[-1]["step"] >= attempts(run)[1][0] + 20)
    cluster.kill(second)
    lost = time.time()
    command.wait_until(lambda: len(attempts(run)) == 3)
    assert seconds_until_back(run, lost) < 180
    ended = command.end()
    assert ended.code == 0, ended.err
    began = attempts(run)
    assert [workers for _, workers in began] == [1, 2, 1]
    for step, _ in began[1:]:
        drawn = 10 * 8
        assert chains_kept(run, step, step + 10) >= CHAINS - drawn, "the chains are those of before, in their places"
    assert tracked_once(folder, ended.result, steps) == (True, "FINISHED")


def test_a_torn_file_of_rays_and_another_number_of_workers_do_not_keep_a_run_from_going_on(folder, start):
    run = folder / "runs" / "torn"
    first = train(folder, *TINY, "name=torn", "steps=20", "workers=2")
    assert first.code == 0, first.err
    assert not list((run / "ray").rglob("checkpoint_manager_snapshot.json")), "Ray is given no checkpoint to write down"
    (run / "ray" / "attempt-1" / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.60.0", "late')
    ended = start("name=torn", "steps=30", "workers=1").end()
    assert ended.code == 0, ended.err
    assert attempts(run) == [(0, 2), (20, 1)]
    assert chains_kept(run, 20, 30) >= CHAINS - 10 * 8
    assert ended.result["run_id"] == first.result["run_id"]
    assert tracked_once(folder, ended.result, 30) == (True, "FINISHED")


@pytest.mark.parametrize("phase", ["raylet", "ray::RayTrainWorker"])
def test_sigterm_while_ray_or_the_workers_start_ends_the_command_within_30_s(folder, start, phase):
    name = phase.replace(":", "")
    command = start(f"name={name}", "steps=1000", "workers=2", "model.options.pause=0.2")
    command.wait_until(lambda: [p for p in command.descendants if is_called(p, phase)])
    asked = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    ended = command.end()
    assert time.monotonic() - asked < 30
    assert ended.code == 143, ended.err
    assert ended.result["status"] == "stopped"
    assert tracked_once(folder, ended.result, 0) == (True, "KILLED")


def is_called(process, name):
    try:
        return name in " ".join(process.cmdline()[:1])
    except psutil.Error:  # it is gone
        return False
