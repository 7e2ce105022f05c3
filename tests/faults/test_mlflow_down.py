"""A real `mlflow server` that is down, hangs, is killed and comes back, while a run logs to it.

Training appends in a process of its own, as a worker does; the uploader sends from this one, as a driver does.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest
from ports import free_port

from jem.files import Location
from orchestrator.config import load_run_config
from orchestrator.runs import RunRecord, write_config
from orchestrator.tracking import Uploader

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
SLOWEST_S = 0.05
"""How long one append to the log may take, whatever the server does."""

TRAINING = """
import contextlib, json, os, sys, time
from pathlib import Path
from orchestrator.events import EventLog

with contextlib.suppress(OSError):
    os.nice(-10)  # what is measured is the append, not who else wants this machine
run_dir, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
log, slowest, step = EventLog(run_dir / "events.jsonl"), 0.0, first - 1
log.append("attempt", attempt=1, step=step)
while step < last and not (run_dir / "enough").exists():
    step += 1
    start = time.perf_counter()
    log.append("metrics", step=step, metrics={"train/loss": 1.0 / step, "train/energy_gap": step / 7})
    slowest = max(slowest, time.perf_counter() - start)
    if step % 25 == 0:
        start = time.perf_counter()
        log.append("checkpoint", step=step)
        slowest = max(slowest, time.perf_counter() - start)
    time.sleep(0.01)
print(json.dumps({"step": step, "slowest": slowest}))
"""


class Server:
    """`mlflow server` on a port and a store that stay the same from start to start."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.db = folder, folder / "mlflow.db"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.process is not None:
            return
        places = ("--backend-store-uri", f"sqlite:///{self.db}", "--artifacts-destination", self.folder / "artifacts")
        command = [sys.executable, "-m", "mlflow", "server", *places, "--port", self.port, "--workers", 1]
        # the workers that run jobs for its pages are not needed, and take half of the start
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as out:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=out, stderr=out, env=environment, start_new_session=True
            )
        until(self.answers, 120)

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200)
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """To the server and its workers."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait(20)
            self.process = None

    def points(self, run_id: str) -> list[tuple[str, int]]:
        """(metric, step) of every row, read past the server."""
        query = "SELECT key, step FROM metrics WHERE run_uuid = ? ORDER BY key, step"
        with sqlite3.connect(self.db, timeout=30) as connection:
            return connection.execute(query, (run_id,)).fetchall()

    def runs(self, name: str) -> list[tuple[str, str]]:
        with sqlite3.connect(self.db, timeout=30) as connection:
            return connection.execute("SELECT run_uuid, status FROM runs WHERE name = ?", (name,)).fetchall()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Not yet started: each test brings it up or down as its story begins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")  # else 15 s pass before a server that hangs is given up
        server = Server(tmp_path_factory.mktemp("server"))
        yield server
        server.kill()


class Run:
    """A run in its folder: a training process and an uploader."""

    def __init__(self, folder: Path, server: Server, name: str) -> None:
        self.folder, self.server, self.name = folder / name, server, name
        self.folder.mkdir(parents=True)
        self.log_path = self.folder / "events.jsonl"
        self.uploader = Uploader(
            log_path=self.log_path, run_dir=self.folder, uri=server.uri, experiment="jem", run_name=name
        )
        self.uploader.start()

    def train(self, first: int, last: int) -> subprocess.Popen[str]:
        """Log these steps, in a process of its own."""
        command = [sys.executable, "-c", TRAINING, str(self.folder), str(first), str(last)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)

    def trained(self, process: subprocess.Popen[str]) -> int:
        """Wait for it; the last step. No append was slow."""
        told = json.loads(process.communicate(timeout=120)[0])
        assert told["slowest"] < SLOWEST_S, f"an append took {told['slowest']:.3f} s"
        return int(told["step"])

    def sent(self) -> int:
        """Points that the store has."""
        run_id = self.uploader.run_id
        return len(self.server.points(run_id)) if run_id else 0

    def is_whole(self, last: int, status: str = "FINISHED") -> None:
        """One run, ended, with one point per metric and step."""
        ((run_id, ending),) = self.server.runs(self.name)
        assert ending == status
        steps = range(1, last + 1)
        assert self.server.points(run_id) == [(f"train/{key}", s) for key in ("energy_gap", "loss") for s in steps]


def until(condition, timeout=60.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def test_a_server_that_comes_up_after_the_run_began_gets_everything_from_the_run_itself(server, tmp_path):
    server.kill()
    run = Run(tmp_path, server, "late")
    run.trained(run.train(1, 200))
    time.sleep(2)
    assert run.uploader.run_id is None
    server.start()
    until(lambda: run.sent() == 2 * 200)
    assert run.trained(run.train(201, 230)) == 230
    assert run.uploader.finish("finished", 60)
    run.is_whole(230)


def test_a_server_that_hangs_and_is_killed_and_started_again_slows_nothing_and_gets_each_point_once(
    server, tmp_path, caplog
):
    server.start()
    run = Run(tmp_path, server, "struck")
    process = run.train(1, 100_000)
    until(lambda: run.sent() > 0)
    server.signal(signal.SIGSTOP)
    time.sleep(8)  # two requests are given up meanwhile, and yet carried out when it wakes
    hung_at = run.sent()
    server.signal(signal.SIGCONT)
    until(lambda: run.sent() > hung_at + 100)
    server.kill()
    killed_at = run.sent()
    time.sleep(3)
    server.start()
    until(lambda: run.sent() > killed_at + 100)
    (run.folder / "enough").touch()
    last = run.trained(process)
    assert run.uploader.finish("stopped", 60)
    assert "cannot be written" in caplog.text, "it was noticed"
    run.is_whole(last, "KILLED")


def test_a_server_that_is_down_until_after_the_end_is_sent_all_by_sync(server, tmp_path):
    server.kill()
    run = Run(tmp_path / "runs", server, "told-later")
    assert run.trained(run.train(1, 60)) == 60
    assert run.uploader.finish("finished", 2) is None
    left_by_a_driver(run)
    assert sync(tmp_path)["runs"][0]["status"] == "failed"
    server.start()
    ended = sync(tmp_path)
    assert (ended["status"], ended["runs"][0]["status"]) == ("finished", "sent")
    run.is_whole(60)
    record = json.loads((run.folder / "run.json").read_text())
    assert record["mlflow"]["complete"]
    assert record["mlflow"]["run_id"] == ended["run_id"] == server.runs("told-later")[0][0]
    assert sync(tmp_path)["runs"] == [], "there is nothing left to do"


def left_by_a_driver(run: Run) -> None:
    """run.json and recipe.yaml of the run as it ended."""
    config = load_run_config("digits", [f"name={run.name}", f"tracking.uri={run.server.uri}"])
    record = RunRecord(run.name, config.science, "", "finished")
    record.mlflow = {"uri": run.server.uri, "experiment": "jem", "run_id": None, "complete": False}
    write_config(Location.of(run.folder), config)
    (run.folder / "run.json").write_text(json.dumps(asdict(record)))


def sync(folder: Path) -> dict:
    """`python jobs/sync.py` in a folder, its result."""
    command = [sys.executable, str(ROOT / "jobs" / "sync.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return json.loads(done.stdout.splitlines()[-1])
