"""One driver's work on a folder of trials, be they a search's, several seeds' or arms': what all have in common.

FOLDER/sweep.json      what it is, its MLflow run, attempts, what came of it
FOLDER/trials/NAME/    a run each
FOLDER/tune/STAGE/     what Ray Tune remembers
FOLDER/events.jsonl    the log of the parent run in MLflow, uploaded.json what of it is there
"""

from __future__ import annotations

import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from jem.errors import ConfigError, Problem
from jem.files import Location
from orchestrator.attempt import failed
from orchestrator.config import shown
from orchestrator.control import request_stop
from orchestrator.events import EventLog
from orchestrator.facts import facts
from orchestrator.mlflow_run import RunSpec
from orchestrator.published import clear_workbench, publish, workbench
from orchestrator.result import Result
from orchestrator.runs import read_record, set_aside
from orchestrator.signals import StopSignals
from orchestrator.survey import holder, log_of
from orchestrator.sweep.config import Sweep
from orchestrator.sweep.ending import close_lost
from orchestrator.sweep.overseer import Overseer
from orchestrator.sweep.resources import Fit
from orchestrator.sweep.table import Row, read_trials
from orchestrator.sweep.trial import CLOSING, STOPPING, TRIALS, Setting, Trial
from orchestrator.sweep.upload import Uploads
from orchestrator.tracking import default_uri
from orchestrator.waiting import wait_for_ray

logger = logging.getLogger(__name__)

RECORD = "sweep.json"
UPLOAD_S = 60.0
"""How long the end waits for MLflow."""

SAVING_S = 2.0
"""Of the time that a signal leaves: for the record and the last line, after MLflow."""

ASK_EVERY_S = 0.5
NOTE = 6000
"""Characters of a summary in MLflow's description, which holds 8,000."""

R = TypeVar("R", bound=Result)


@dataclass
class Record:
    """What sweep.json holds."""

    name: str
    science: dict[str, Any]
    kind: str = "sweep"  # sweep, seeds, ablation
    status: str = "new"
    mlflow: dict[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)  # those that are done
    winner: str | None = None  # the finished trial that is being measured on test data, once that is decided
    asked: dict[str, Any] = field(default_factory=dict)  # what of a search is no science, as it finished with
    result: dict[str, Any] | None = None

    def save(self, root: Location) -> None:
        (root / RECORD).write(json.dumps(asdict(self), indent=1).encode())


def open_folder(root: Location, new: Record, fresh: bool, usual: Mapping[str, Any] | None = None) -> Record:
    """The record of what is there, or `new`; `fresh` first moves what is there to NAME.1.

    `usual`: values of the science that an older record may lack. Raises ConfigError, with the differences, if what is
    there is something else.
    """
    if fresh and root.exists():
        for trial in (root / TRIALS).children():
            clear_workbench(trial)
        set_aside(root)
    remedy = Problem("", "give it another name=, or start it anew with --fresh (what is there is kept as NAME.1)")
    if (root / "run.json").exists():
        raise ConfigError([Problem("name", f"{root.uri} is a single run's folder"), remedy])
    if not (root / RECORD).exists():
        root.mkdir()
        return new
    try:
        record = Record(**json.loads((root / RECORD).read()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{(root / RECORD).uri}: damaged ({error}); start anew with --fresh") from error
    if record.kind != new.kind:
        raise ConfigError([Problem("name", f"{root.uri} is of another kind: {record.kind}, not {new.kind}"), remedy])
    old, ours = (json.loads(json.dumps({**(usual or {}), **science})) for science in (record.science, new.science))
    changed = [key for key in sorted({*old, *ours}) if old.get(key) != ours.get(key)]
    if changed:
        problems = [Problem(k, f"is {ours.get(k)!r}, {root.uri} has {old.get(k)!r}") for k in changed]
        raise ConfigError([*problems, remedy])
    return record


class Session(ABC, Generic[R]):
    """One driver's work: `run` begins it, lets `work` run stages of trials on Ray, and ends with `close`."""

    def __init__(
        self,
        sweep: Sweep,
        storage: Location,
        root: Location,
        record: Record,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
    ) -> None:
        """`params` and `tags` are those of the parent run in MLflow."""
        self.sweep, self.root, self.record = sweep, root, record
        self.uri, self.artifacts = default_uri(storage, sweep.run.tracking.uri)
        self.folder = workbench(root)
        if not record.attempts:
            clear_workbench(root)
        self.log_path = self.folder / "events.jsonl"
        for attempt in record.attempts[-1:]:  # a driver that was killed could not say when
            attempt.setdefault("ended", max(attempt["started"], _last_sign(root)))
        self.spent = sum(a.get("ended", a["started"]) - a["started"] for a in record.attempts)
        self.began = time.time()
        self.overseer: Overseer | None = None  # of the stage that runs
        told = texts(facts() | {"folder": root.uri, "kind": record.kind} | dict(tags))
        experiment = sweep.run.tracking.experiment
        spec = RunSpec(self.uri, experiment, record.name, self.artifacts, texts(params), told)
        known = record.mlflow.get("run_id") if record.mlflow.get("uri") == shown(self.uri) else None
        self.uploads = Uploads(spec, self.log_path, self.folder, known, self._remember_run)

    @abstractmethod
    def recipe(self) -> tuple[str, str]:
        """The name and the content of the file that says what this is."""

    @abstractmethod
    def work(self) -> dict[str, Any]:
        """Everything that needs Ray, in a thread; its outcome, with a `status`."""

    @abstractmethod
    def close(self, outcome: dict[str, Any]) -> R:
        """Files, MLflow and record as they are now; what came of it."""

    def run(self) -> R:
        self.record.attempts.append({"started": self.began})
        self.record.status = "running"
        self.record.save(self.root)
        for word in (CLOSING, STOPPING):
            (self.root / word).remove()
        name, content = self.recipe()
        Location.of(self.folder / name).write(content.encode())
        publish(self.root, name)
        EventLog(self.log_path).close()
        self.uploads.start()
        with StopSignals() as self.signals:
            try:
                outcome = wait_for_ray(self.work, self.signals, self._ask_to_stop, self._all_stopped)
            except BaseException as error:
                outcome = failed(error)
            if self.overseer is not None:  # Tune's thread may go on
                self.overseer.leave(None if math.isinf(self.signals.left) else max(0.0, self.signals.left - SAVING_S))
            return self.close(outcome)

    def run_stage(
        self,
        name: str,
        trials: Sequence[Trial],
        setting: Setting,
        fitting: Fit,
        n: int,
        reserve: int = 0,
        shown: str | None = None,
    ) -> None:
        """All trials of a stage, or what is left of them, on Ray Tune; see Overseer for `n` and `reserve`.

        `shown`: the trials' own stage, where that is another one.
        """
        from orchestrator.sweep.tuning import run_stage

        with self.watching(shown or name.partition("-")[0], n, fitting.at_once, reserve):
            close_lost(self.sweep, self.root, run_stage(name, trials, setting, fitting), trials)

    def watching(self, stage: str, n: int, at_once: int, reserve: int = 0) -> AbstractContextManager[None]:
        """The trials on the screen and in MLflow."""
        self.overseer = Overseer(self.sweep, self.root, self.uploads, self.trial_spec, stage, n, at_once)
        return self.overseer.watching(self.spent, self.began, reserve)

    def trial_spec(self, name: str) -> RunSpec | None:
        """A trial as a run of MLflow; None before its run.json is written, or where that is damaged."""
        record = None
        with suppress(ConfigError):
            record = read_record(self.root / TRIALS / name)
        if record is None:
            return None
        tags = {self.record.kind: self.record.name, "folder": (self.root / TRIALS / name).uri}
        tags |= {"steps": str(self.sweep.run.steps), "digest": record.digest} | facts()
        experiment = self.sweep.run.tracking.experiment
        return RunSpec(self.uri, experiment, name, self.artifacts, texts(record.science), texts(tags))

    def tell(
        self,
        status: str,
        files: Iterable[str],
        note: str,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> str | None:
        """Send what came of it to MLflow, `files` of the folder among it, and end its run there; the run's id."""
        log = EventLog(self.log_path)
        for name in files:
            try:
                publish(self.root, name)
            except OSError as error:  # a store that is away: MLflow gets them from here
                logger.warning("%s has not got %s (%s)", self.root.uri, self.folder / name, error)
            log.append("artifact", path=name)
        log.append("tags", tags={"mlflow.note.content": note, "status": status, **(tags or {})})
        if metrics:
            log.append("metrics", step=step, metrics=dict(metrics))
        log.append("end", status=status)
        log.close()
        return self.uploads.finish(status, max(0.0, min(UPLOAD_S, self.signals.left - SAVING_S)))

    def remember(self, result: R) -> R:
        self.record.status, self.record.result = result.status, asdict(result)
        self.record.attempts[-1] |= {"ended": time.time(), "status": result.status}
        try:
            self.record.save(self.root)
        except OSError as error:  # a full disk, a store that is away: what came of it is printed, and in MLflow
            logger.warning("%s cannot be written: %s", (self.root / RECORD).uri, error)
        return result

    def _remember_run(self, run_id: str) -> None:
        self.record.mlflow = {"uri": shown(self.uri), "run_id": run_id}
        self.record.save(self.root)

    def _running(self) -> list[Row]:
        return [row for row in read_trials(self.root) if row.status == "running"]

    def _ask_to_stop(self) -> None:
        """Again and again: a trial that was about to begin takes no notice of what was asked before."""
        told = False
        while not (told and self._all_stopped()):
            with suppress(OSError):  # a store that is away for a moment
                (self.root / STOPPING).write(b"1")  # first, so that none begins, also where none runs yet
                told = True
                for row in self._running():
                    request_stop(self.root / TRIALS / row.name)
            time.sleep(ASK_EVERY_S)

    def _all_stopped(self) -> bool:
        """A trial that was killed with an earlier driver says that it runs, and nobody holds it."""
        with suppress(OSError):
            return not any(holder(self.root / TRIALS / row.name) for row in self._running())
        return False


def shortened(text: str) -> str:
    """A summary's first lines, as many as go into a description in MLflow."""
    if len(text) <= NOTE:
        return text
    return text[:NOTE].rpartition("\n")[0] + "\n\n(cut off: the whole is in summary.md)"


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}


def _last_sign(root: Location) -> float:
    """When a driver or one of its trials last wrote something down."""
    logs = [log_of(root), *(log_of(trial) for trial in (root / TRIALS).children())]
    return max((log.stat().st_mtime for log in logs if log.exists()), default=0.0)
