"""The upload of a run's log to MLflow, step by step and without a thread.

What was sent is remembered in `uploaded.json` in the run's directory. Losing it, or crashing before it is
written, does no harm: the same rows are sent again and MLflow drops them (see outbox.py).
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jem.errors import ConfigError, JEMError, Problem
from jem.files import Location
from orchestrator import events
from orchestrator.config import shown
from orchestrator.mlflow_run import MLflowRun, Registered, RunSpec
from orchestrator.outbox import EVALUATED, Outbox, Tags, legal_name

log = logging.getLogger(__name__)

STATE_NAME = "uploaded.json"
PARENT_TAG = "mlflow.parentRunId"
_CHUNK = 256 * 1024  # bytes of log that are sent before it is remembered

# How a run, or a trial of a sweep, ends in the log's words -> MLflow's. Anything else is a failure.
_KILLED = ("stopped", "waiting", "killed", "pruned", "out of time")
_TERMINAL = {"finished": "FINISHED"} | dict.fromkeys(_KILLED, "KILLED")


def sync(run_dir: Path, uri: str | None = None) -> str:
    """Send what is left of a run's log to MLflow, and return the run's id.

    A run whose log does not end is sent up to its last checkpoint, and left open. `uri` is needed only where it
    holds a password, which is not kept on disk, or has changed.
    """
    spec, log_path = kept_spec(run_dir)
    return send_rest(replace(spec, uri=uri or spec.uri), log_path, run_dir)


def kept_spec(run_dir: Path) -> tuple[RunSpec, Path]:
    """What uploaded.json remembers of the MLflow run, and the log. Raises ConfigError if there is none."""
    state_path = Path(run_dir) / STATE_NAME
    try:
        kept = json.loads(state_path.read_text())
        return RunSpec(**kept["spec"]), Path(run_dir) / kept["log"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{state_path}: not the state of an upload ({error}): is this a run's directory?") from error


def child_of(parent: str, spec: RunSpec) -> RunSpec:
    """The MLflow run below the run `parent`."""
    return replace(spec, tags={**spec.tags, PARENT_TAG: parent})


def is_whole(run_dir: Path) -> bool:
    """Whether MLflow has all of a run's log and has ended the run, as far as uploaded.json knows."""
    try:
        kept = json.loads((Path(run_dir) / STATE_NAME).read_text())
        return bool(kept["state"]["closed"] == (Path(run_dir) / kept["log"]).stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def newest_model(run_dir: Path) -> Registered | None:
    """What became of the last final model of a run that was sent, as far as uploaded.json knows."""
    try:
        models = json.loads((Path(run_dir) / STATE_NAME).read_text())["state"]["models"]
        return Registered(**list(models.values())[-1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def send_rest(spec: RunSpec, log_path: Path, run_dir: Path, run_id: str | None = None) -> str:
    """As `sync`, to an MLflow run that the caller describes."""
    if not spec.uri:
        kept = Path(run_dir) / STATE_NAME
        raise ConfigError([Problem("tracking.uri", f"is not kept in {kept} (it has a password): give it again")])
    upload = Upload(spec, log_path, Path(run_dir), run_id, live=False)
    try:
        upload.catch_up()
        upload.close()
    except Exception as error:  # MLflow raises whatever its store, driver or server does
        raise JEMError(f"{upload.what_is_left()} ({reason(error, spec.uri)})") from error
    assert upload.run_id is not None
    return upload.run_id


@dataclass
class _State:
    """What uploaded.json remembers.

    `floor`: what the MLflow run has from elsewhere (see Outbox), None while that is not known; `token` finds a run
    whose creation was not answered; `closed`: where the log ended when the run was ended, -1 while it is open.
    """

    run_id: str | None = None
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    offset: int = 0
    floor: dict[str, int] | None = None
    rewritten: list[tuple[int, int]] = field(default_factory=list)
    models: dict[str, dict[str, str]] = field(default_factory=dict)  # Registered, by digest
    closed: int = -1

    def outbox(self) -> Outbox:
        return Outbox(self.floor or {}, rewritten=[(first, last) for first, last in self.rewritten])


class Upload:
    """Where a method raises, call `disconnect` and try again: nothing is lost and nothing is sent twice.

    `live`: the run is going on, so it is set to RUNNING again.
    """

    def __init__(
        self,
        spec: RunSpec,
        log_path: Path,
        run_dir: Path,
        run_id: str | None = None,
        on_run: Callable[[str], None] | None = None,
        live: bool = True,
    ) -> None:
        self.spec, self.log_path, self.run_dir = spec, log_path, run_dir
        self._on_run, self._announced, self._live = on_run, run_id, live
        self._state = self._remembered(run_id)
        self._run: MLflowRun | None = None
        self._outbox = Outbox()
        self._position = 0

    @property
    def run_id(self) -> str | None:
        return self._state.run_id

    def registered(self, digest: str) -> Registered | None:
        """What became of the final model with these weights, as far as it is known."""
        known = self._state.models.get(digest)
        return Registered(**known) if known else None

    def catch_up(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Connect where necessary, and send all that may be sent; `hurry` says to leave off."""
        run = self._run or self._connect()
        while not hurry():
            found, position = events.read(self.log_path, self._position, _CHUNK)
            if position == self._position:
                return
            items = [item for event in found for item in self._outbox.feed(event)]
            run.send(items, self.run_dir)
            self._state.models |= {digest: asdict(found) for digest, found in run.registered.items()}
            self._position = position
            if items:  # what sends nothing need not be remembered: it is read again
                self._state.offset = position
                self._remember()

    def close(self, status: str | None = None) -> None:
        """End the run as `status` (MLflow's word), else as its log says; where neither does it stays open."""
        assert self._run is not None, "catch_up comes first"
        if self._outbox.rewritten:
            self._run.log_file_as(self.log_path, "timeline.jsonl")
        if status is None and self._outbox.ended:
            status = terminal_status(str(self._outbox.status))
        if status is not None:
            self._run.terminate(status)
            self._state.closed = self._position
            self._remember()

    def disconnect(self) -> None:
        self._run = None

    @property
    def connected(self) -> bool:
        """Whether the run has been found or made in MLflow, so that `run_id` is known to be there."""
        return self._run is not None

    def reserve(self) -> None:
        """Write down what the MLflow run is to be, for `sync`, in case that this process never gets so far."""
        if not (self.run_dir / STATE_NAME).exists():
            self._remember()

    def left(self) -> int:
        """Points and files that are not known to be in MLflow."""
        outbox = self._replay()
        ready = [item for event in events.read(self.log_path, self._state.offset)[0] for item in outbox.feed(event)]
        return sum(not isinstance(item, Tags) for item in ready) + len(outbox.waiting)

    def what_is_left(self) -> str:
        left = self.left()
        what = f"{left} points and files are" if left else "the run's end is"
        return (
            f"MLflow at {shown(self.spec.uri)} has not got everything: {what} still only in {self.log_path}; "
            "starting or synchronising the same run again sends what is missing"
        )

    def _connect(self) -> MLflowRun:
        self._remember()  # the token must be on disk before a run can carry it
        run = MLflowRun(self.spec, self._state.run_id, self._state.token, resume=self._live)
        self._state.run_id = run.run_id
        if run.created:
            self._state.offset, self._state.floor, self._state.rewritten = 0, {}, []
        elif self._state.floor is None:
            self._adopt(run)
        if self._live or run.created:
            self._state.closed = -1
        self._remember()
        if self._on_run is not None and run.run_id != self._announced:
            self._on_run(run.run_id)
        self._announced = run.run_id
        self._outbox = self._replay()
        self._position = self._state.offset
        self._run = run
        return run

    def _adopt(self, run: MLflowRun) -> None:
        """Learn what the run has already: it was sent from another machine, or what was sent is forgotten."""
        has = run.history()
        self._state.offset, self._state.floor = 0, {}
        for point in has:
            self._state.floor[point.key] = max(point.step, self._state.floor.get(point.key, -1))
        here = {
            (legal_name(key), event["time"], event["step"])
            for event in events.read(self.log_path)[0]
            if event["kind"] == "metrics"
            for key in event["metrics"]
        }
        # what jobs/evaluate.py sends, too, was not lost with a log
        of_training = [point for point in has if not point.key.startswith(EVALUATED)]
        elsewhere = [point.step for point in of_training if (point.key, point.time, point.step) not in here]
        if elsewhere:  # sent without a checkpoint and lost with the other machine's log: run again here
            self._state.rewritten = [(min(elsewhere), max(elsewhere))]
            run.send([self._state.outbox().rewritten_tag()], self.run_dir)

    def _replay(self) -> Outbox:
        """The outbox as it is when the log is sent as far as it is remembered."""
        outbox = self._state.outbox()
        for event in events.read(self.log_path, 0, self._state.offset)[0]:
            outbox.feed(event)
        return outbox

    def _remembered(self, run_id: str | None) -> _State:
        path = self.run_dir / STATE_NAME
        if not path.exists():
            return _State(run_id)
        try:
            state = _State(**json.loads(path.read_text())["state"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): MLflow is asked what it has", path, error)
            return _State(run_id)
        size = self.log_path.stat().st_size if self.log_path.exists() else 0
        if run_id not in (None, state.run_id) or state.offset > size:  # another run, or another log
            return _State(run_id or state.run_id)
        return state

    def _remember(self) -> None:
        spec = asdict(self.spec) | {"uri": "" if urlsplit(self.spec.uri).password else self.spec.uri}
        kept: dict[str, Any] = {"state": asdict(self._state), "spec": spec}
        kept["log"] = os.path.relpath(self.log_path, self.run_dir)  # a run's directory may be moved
        try:
            Location.of(self.run_dir / STATE_NAME).write(json.dumps(kept, indent=1).encode())
        except OSError as error:  # the next start sends some rows once more; MLflow drops them
            log.warning("%s cannot be written: %s", self.run_dir / STATE_NAME, error)


def terminal_status(status: str) -> str:
    return _TERMINAL.get(status.lower(), "FAILED")


def reason(error: BaseException, uri: str) -> str:
    """The error in a line, without the password that MLflow's messages repeat."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    password = urlsplit(uri).password
    return (text.replace(password, "***") if password else text)[:400]
