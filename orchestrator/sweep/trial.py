"""A trial while it is worked on: its run, in a thread, and its log, read as it grows. No Ray Tune in here."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from jem.errors import CheckpointError, ConfigError, DivergedError, JEMError
from jem.files import Location
from orchestrator import events
from orchestrator.attempt import Attempt, failed
from orchestrator.config import RunConfig
from orchestrator.control import request_stop
from orchestrator.events import EventLog
from orchestrator.mirror import Mirror
from orchestrator.ray_cluster import Cluster, train_on_ray
from orchestrator.result import Result
from orchestrator.runs import RunRecord, lock, open_record, read_record, write_config
from orchestrator.sweep.config import OBJECTIVES, Sweep, trial_config
from orchestrator.sweep.fork import go_over, prepare, read_forks, write_trial
from orchestrator.sweep.resources import gpus_a_worker, worker_resources
from orchestrator.sweep.shared_log import Sharing, desk
from orchestrator.sweep.table import FIXED, GOING_ON

if TYPE_CHECKING:
    import torch

TRIALS, CLOSING, STOPPING = "trials", "closing", "stopping"
"""Of a sweep's folder: its trials, and the words that no new one may begin, and none at all."""

POLL_S = 0.1
LOCK_S = 60.0
"""How long a trial waits for an earlier process of its own to end."""


@dataclass(frozen=True)
class Trial:
    """Settings that are tried once; as JSON it is what Ray Tune hands to an actor."""

    name: str
    stage: str  # search, seeds, ablation, finalists
    number: int
    candidate: str
    point: dict[str, Any]
    seed: int
    until: int | None = None  # the step at which it waits to be compared; None: it trains to its end
    measure: dict[str, Any] | None = None  # settings of an evaluation that is made now of what has finished


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
        self.log_path = desk(self.root) / "events.jsonl"
        self.offset = 0
        self.begun = threading.Event()  # from then on, what follows `offset` in the log is of this attempt
        self.unread: list[events.Event] = []
        self.last_step = trial.until or setting.sweep.steps_at(trial.point)
        self.thread = threading.Thread(target=self._run, daemon=True, name="trial")
        self.thread.start()

    def next(self) -> dict[str, Any]:
        """Wait for the next measurement, or for the end; the last one has `done`, and is never `stopped`."""
        while True:
            over = not self.thread.is_alive()
            if self.begun.is_set():
                found, self.offset = events.read(self.log_path, self.offset)
                self.unread += found
            while self.unread:
                event = self.unread.pop(0)
                metrics = event.get("metrics", {})
                if event["kind"] == "metrics" and "val/nll" in metrics and event["step"] < self.last_step:
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
            traceback.print_exception(error)
            self.result = Result(name=self.trial.name, status="failed", message=f"{type(error).__name__}: {error}")

    def _work(self) -> Result:
        root, name = self.root, self.trial.name
        if (self.setting.root / CLOSING).exists() and read_record(root) is None:
            return Result(name=name, status="out of time")
        if (self.setting.root / STOPPING).exists():
            return Result(name=name, status="stopped")
        with _patiently(root), Sharing(root):
            self.offset = self.log_path.stat().st_size if self.log_path.exists() else 0
            self.begun.set()
            self._go_over()
            config = self._config()
            record = open_record(root, config, fresh=False)
            if self.trial.measure is None and over(record, config.steps, self.trial.stage in FIXED):
                assert record.result is not None
                return Result(**record.result)
            write_trial(root, self.content, read_forks(root))
            write_config(root, config)
            attempt = Attempt(config, root, record, desk(root))
            attempt.begin()
            try:
                outcome = self._train(config, attempt)
            except Exception as error:
                outcome = failed(error)
            step, until = outcome.get("step", 0), self.trial.until
            if outcome["status"] == "stopped" and self.leaving:
                outcome |= {"status": self.leaving, "message": f"ended early at step {step}"}
            elif outcome["status"] == "stopped" and until is not None and step >= until:
                outcome |= {"status": "waiting", "message": f"waits at step {step} for the others"}
            return attempt.close(outcome)

    @property
    def content(self) -> dict[str, Any]:
        """Of trial.json, but for what the trial has gone on from."""
        return {"sweep": self.setting.sweep.name, **asdict(replace(self.trial, measure=None))}

    def _go_over(self) -> None:
        """Do what is written down that the trial goes on from, which is also what tells its settings."""
        forks, record = read_forks(self.root), read_record(self.root)
        if record is None:
            return
        if forks and not forks[-1].done and not over(record, self.setting.sweep.run.steps):
            fork = forks.pop()
            config, log = self._config(fork.point), EventLog(self.log_path)
            try:
                made = prepare(self.root, fork, config)
            except (CheckpointError, OSError) as error:
                log.append("note", text=f"cannot go on {fork}, goes on by itself: {error}")
            else:
                go_over(self.root, made, config, record)
                forks.append(replace(fork, done=True))
                log.append("tags", tags={"forks": "; ".join(map(str, forks)), "point": json.dumps(fork.point)})
            log.close()
            write_trial(self.root, self.content, forks)
        done = [fork for fork in forks if fork.done]
        if done:
            self.trial = replace(self.trial, point=done[-1].point, candidate=self.trial.name)

    def _config(self, point: dict[str, Any] | None = None) -> RunConfig:
        sweep, trial = self.setting.sweep, self.trial
        place = {"name": trial.name, "seed": trial.seed, "storage_path": (self.setting.root / TRIALS).uri}
        return trial_config(sweep, trial.point if point is None else point, **place, **(trial.measure or {}))

    def _train(self, config: RunConfig, attempt: Attempt) -> dict[str, Any]:
        setting, until = self.setting, self.trial.until
        number, init_from, cluster = attempt.number, setting.init_from, setting.cluster
        several = config.max_workers > 1
        with Mirror(self.root, attempt.log_path, needed=several and not cluster.private):
            if several:
                place = worker_resources(setting.sweep, cluster.gpus)
                return train_on_ray(config, self.root, attempt.log_path, number, init_from, cluster, until, place)
            gpu = gpus_a_worker(setting.sweep, cluster.gpus) > 0
            return train_here(config, self.root, attempt, init_from, setting.cpus, gpu, until)


def search_trial(sweep: Sweep, number: int, point: dict[str, Any]) -> Trial:
    candidate = f"t{number:03}" if number else "base"
    return Trial(f"t{number:03}", "search", number, candidate, point, sweep.config.seed)


def train_here(
    config: RunConfig,
    root: Location,
    attempt: Attempt,
    init_from: str | None,
    cpus: float,
    gpu: bool = False,
    until: int | None = None,
) -> dict[str, Any]:
    """What Ray Train does with one worker, in this process: the worker function, again after an exception.

    `gpu`: Ray has given this process one. Where it has not, all of the machine's are visible, and are others'.
    """
    import torch

    from jem.world import World
    from orchestrator.facts import facts
    from orchestrator.training import Job
    from orchestrator.worker import run

    torch.set_num_threads(max(1, int(cpus)))
    given = config.device == "auto" and gpu and torch.cuda.is_available()
    device = torch.device("cuda" if given or config.device == "cuda" else "cpu")
    job = Job(config, root, attempt.log_path, attempt.number, init_from, facts(), until)
    while True:
        try:
            return run(job, World(), device)
        except Exception as error:  # counted by the worker function, which gives up in the end with a JEMError
            if device.type == "cuda" and lost(device):
                traceback.print_exception(error)
                os._exit(1)  # Tune starts another process; in this one each later trial would fail, too
            if not config.recovery.max_failures:
                raise JEMError(f"{type(error).__name__}: {error}") from error
        finally:
            if device.type == "cuda":  # the next trial of this process begins with nothing, as does its neighbour's
                gc.collect()
                torch.cuda.empty_cache()


def lost(device: torch.device) -> bool:
    """Whether this process can do nothing more on its GPU, as after an illegal access or a fault of the hardware."""
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def over(record: RunRecord, steps: int, again: bool = False) -> bool:
    """Whether a trial is not worked on any more: it ended, and if it finished it did so with as many steps.

    `again`: one that failed, or was not evaluated, is no end, as of a single run; a search goes on without it.
    """
    if record.result is None or record.status in GOING_ON:
        return False
    unmeasured = record.status == "finished" and record.result.get("message")  # trained, and its evaluation failed
    if again and (unmeasured or record.status not in ("finished", DivergedError.status)):
        return False
    return record.status != "finished" or record.result["step"] >= steps


@contextmanager
def _patiently(root: Location) -> Iterator[None]:
    deadline = time.monotonic() + LOCK_S
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(lock(root))
                break
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        yield
