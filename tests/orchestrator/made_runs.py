"""Runs as their folders, made without training."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from jem.files import Location
from jem.settings import digest
from orchestrator.config import load_run_config
from orchestrator.events import EventLog
from orchestrator.result import Result
from orchestrator.runs import RunRecord, write_config

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys
from jem.files import Location
from orchestrator.runs import lock
with lock(Location.of(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


class Driver:
    """Another process that works on a run, as far as its lock says."""

    def __init__(self, root):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
        )
        assert self.process.stdout.readline() == "held\n"

    def kill(self):
        self.process.kill()
        self.process.wait(20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


def made(storage, name, status="finished", *settings, step=20, message="", complete=True, age=0.0, uri=None, log=True):
    """A run's folder as a driver leaves it; `age` is in seconds."""
    storage = storage if isinstance(storage, Location) else Location.of(storage)
    root, now = storage / name, time.time() - age
    config = load_run_config("digits", [f"name={name}", f"storage_path={storage.uri}", "steps=100", *settings])
    write_config(root, config)
    attempt = {"number": 1, "host": "here", "pid": 7, "started": now - 60, "workers": 2}
    uri = uri or f"sqlite:///{storage.path}/mlflow.db"
    record = RunRecord(name, config.science, digest(config.science), status)
    record.mlflow = {"uri": uri, "experiment": "jem", "run_id": None, "complete": complete}
    record.attempts = [attempt]
    if status != "running":
        attempt |= {"ended": now, "status": status, "step": step}
        record.result = asdict(Result(name=name, step=step, status=status, message=message, tracking_uri=uri))
    record.save(root)
    if log and root.is_local:
        write_log(root.local / "events.jsonl", status, step)
    return root


def write_log(path, status, step, first=1):
    log = EventLog(path)
    log.append("attempt", attempt=1, step=first - 1, workers=2)
    for number in range(first, step + 1):
        log.append("metrics", step=number, metrics={"train/loss": 1.0 / number})
        if number % 10 == 0:
            log.append("checkpoint", step=number)
    if status != "running":
        log.append("end", status=status)
    log.close()


def rolled_back(root, *remedies):
    """recovery.json: one rollback after the other, each with one remedy more."""
    entries = [
        {"number": n, "diverged_at": 230 + n, "to": 150, "reason": "energy gap 1.2e+06", "level": n, "time": 0}
        | {"remedies": list(remedies[:n])}
        for n in range(1, len(remedies) + 1)
    ]
    (root / "recovery.json").write(json.dumps({"rollbacks": entries}).encode())
