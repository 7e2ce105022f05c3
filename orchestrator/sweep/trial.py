"""A trial while it is worked on: its run, in a thread, and its log, read as it grows. No Ray Tune in here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from jem.errors import ConfigError, JEMError
from jem.files import Location
from orchestrator import events
from orchestrator.attempt import Attempt, failed
from orchestrator.config import RunConfig
from orchestrator.control import request_stop
from orchestrator.ray_cluster import Cluster, train_on_ray
from orchestrator.result import Result
from orchestrator.runs import RunRecord, lock, open_record, read_record, write_config
from orchestrator.sweep.config import OBJECTIVES, Sweep, trial_config

TRIALS, TRIAL, CLOSING = "trials", "trial.json", "closing"
"""Of a sweep's folder: its trials, what each is, and the word that no further one may begin."""

POLL_S = 0.1
LOCK_S = 60.0
"""How long a trial waits for an earlier process of its own to end."""


@dataclass(frozen=True)
class Trial:
    """Settings that are tried once; as JSON it is what Ray Tune hands to an actor."""

    name: str
    stage: str  # search, finalists
    number: int
    candidate: str
    point: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Setting:
    """What all trials of a sweep have in common."""

    sweep: Sweep
    root: Location  # the sweep's folder
    cluster: Cluster
    cpus: float  # a worker's
    init_from: str | None = None


class Work:
    """One process's work on a trial. `next` gives what Ray Tune is told, `leave` ends it early."""

    def __init__(self, setting: Setting, trial: Trial) -> None:
        self.setting, self.trial = setting, trial
        self.root = setting.root / TRIALS / trial.name
        self.result: Result | None = None
        self.leaving: str | None = None
        self.log_path = self.root.local / "events.jsonl"
        self.offset = self.log_path.stat().st_size if self.log_path.exists() else 0
        self.unread: list[events.Event] = []
        self.thread = threading.Thread(target=self._run, daemon=True, name="trial")
        self.thread.start()

    def next(self) -> dict[str, Any]:
        """Wait for the next measurement, or for the end; the last one has `done`, and is never `stopped`."""
        while True:
            over = not self.thread.is_alive()
            found, self.offset = events.read(self.log_path, self.offset)
            self.unread += found
            while self.unread:
                event = self.unread.pop(0)
                metrics = event.get("metrics", {})
                if event["kind"] == "metrics" and "val/nll" in metrics and event["step"] < self.setting.sweep.run.steps:
                    measured = {key: value for key, value in metrics.items() if key.startswith("val/")}
                    return measured | {"step": event["step"], "status": "running", "done": False}
            if over and (self.result is None or self.result.status != "stopped" or self.leaving):
                return self._last()
            time.sleep(POLL_S)  # where all are asked to stop, it waits for its process to be ended

    def leave(self, status: str) -> None:
        """End the run, as `status`; what it has done is kept."""
        if self.thread.is_alive():
            self.leaving = status
            request_stop(self.root)
            self.thread.join()

    def _last(self) -> dict[str, Any]:
        """What came of it; a trial that did not finish counts as the worst there is."""
        result = self.result or Result(status="failed", message="it ended without a word")
        worst = {key: objective.worst for key, objective in OBJECTIVES.items()}
        measured = {key: value for key, value in result.metrics.items() if key.startswith("val/")}
        shown = worst | measured if result.status == "finished" else measured | worst
        return shown | {"step": result.step or 0, "status": result.status, "done": True}

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:  # whatever it is, it is this trial's result and not the sweep's end
            self.result = Result(name=self.trial.name, status="failed", message=f"{type(error).__name__}: {error}")

    def _work(self) -> Result:
        root, name = self.root, self.trial.name
        if (self.setting.root / CLOSING).exists() and read_record(root) is None:
            return Result(name=name, status="out of time")
        config = self._config()
        with _patiently(root):
            record = open_record(root, config, fresh=False)
            if _over(record):
                assert record.result is not None
                return Result(**record.result)
            sweep = {"sweep": self.setting.sweep.name}
            (root / TRIAL).write(json.dumps(sweep | asdict(self.trial), indent=1).encode())
            write_config(root, config)
            attempt = Attempt(config, root, record)
            attempt.begin()
            try:
                outcome = self._train(config, attempt)
            except Exception as error:
                outcome = failed(error)
            if outcome["status"] == "stopped" and self.leaving:
                outcome |= {"status": self.leaving, "message": f"ended early at step {outcome.get('step')}"}
            return attempt.close(outcome)

    def _config(self) -> RunConfig:
        sweep, trial = self.setting.sweep, self.trial
        place = {"name": trial.name, "seed": trial.seed, "storage_path": (self.setting.root / TRIALS).uri}
        return trial_config(sweep, trial.point, **place)

    def _train(self, config: RunConfig, attempt: Attempt) -> dict[str, Any]:
        number, init_from = attempt.number, self.setting.init_from
        if config.max_workers > 1:
            return train_on_ray(config, self.root, attempt.log_path, number, init_from, self.setting.cluster)
        return train_here(config, self.root, attempt, init_from, self.setting.cpus)


def search_trial(sweep: Sweep, number: int, point: dict[str, Any]) -> Trial:
    candidate = f"t{number:03}" if number else "base"
    return Trial(f"t{number:03}", "search", number, candidate, point, sweep.config.seed)


def train_here(
    config: RunConfig, root: Location, attempt: Attempt, init_from: str | None, cpus: float
) -> dict[str, Any]:
    """What Ray Train does with one worker, in this process: the worker function, again after an exception."""
    import torch

    from jem.world import World
    from orchestrator.facts import facts
    from orchestrator.training import Job
    from orchestrator.worker import run

    torch.set_num_threads(max(1, int(cpus)))
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    job = Job(config, root, attempt.log_path, attempt.number, init_from, facts())
    while True:
        try:
            return run(job, World(), device)
        except Exception as error:  # counted by the worker function, which gives up in the end with a JEMError
            if not config.recovery.max_failures:
                raise JEMError(f"{type(error).__name__}: {error}") from error


def _over(record: RunRecord) -> bool:
    return record.result is not None and record.status not in ("running", "stopped")


@contextmanager
def _patiently(root: Location) -> Iterator[None]:
    deadline = time.monotonic() + LOCK_S
    while True:
        held = lock(root)
        try:
            held.__enter__()
            break
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    try:
        yield
    finally:
        held.__exit__(None, None, None)
