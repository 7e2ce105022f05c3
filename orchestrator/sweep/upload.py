"""A sweep in MLflow: one thread on the driver's side sends the log of the sweep and those of all its trials.

The sweep is the parent run, each trial a child that is made with the tag of its parent: never before the parent is
known to be there, so that a crash at any moment leaves no orphan. What makes each run unique and each point sent once
is orchestrator.upload, per log.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jem.errors import ConfigError, JEMError
from jem.files import Location
from orchestrator import events
from orchestrator.config import shown
from orchestrator.mlflow_run import RunSpec
from orchestrator.runs import read_record
from orchestrator.sync import remember_sent
from orchestrator.tracking import Hurry, Sender, end_log
from orchestrator.upload import PARENT_TAG, Upload, child_of, is_whole, kept_spec, terminal_status

log = logging.getLogger(__name__)

_IN_A_ROW = 2
"""Runs that fail one after the other: it is not they but MLflow, and the others need not wait for its time-out, too."""


@dataclass
class _Trial:
    spec: RunSpec  # without its parent
    log_path: Path
    run_dir: Path
    root: Location  # its folder, which is another one where that is on an object store
    upload: Upload | None = None  # while there is something to send
    run_id: str | None = None
    over: str | None = None  # as what it ended
    done: bool = False  # MLflow has everything


class Uploads:
    """It never raises into the driver and never blocks it. What it was told is gone with the process: add all again.

    A trial that is over costs nothing once it is sent; one that was sent whole by an earlier process is not sent again.
    """

    def __init__(
        self,
        parent: RunSpec,
        log_path: Path,
        run_dir: Path,
        run_id: str | None = None,
        on_run: Callable[[str], None] | None = None,
    ) -> None:
        """`run_id`: the parent's, where it is known; `on_run` is called with it, in the thread, as soon as it is."""
        self._parent = Upload(parent, Path(log_path), Path(run_dir), run_id, on_run)
        self._parent.reserve()
        self._parent_id: str | None = None  # once it is known to be in MLflow
        self._status: str | None = None
        self._closed = False
        self._trials: dict[str, _Trial] = {}
        self._lock = threading.Lock()
        self._sender = Sender(self._send, parent.uri, Path(run_dir))

    @property
    def run_id(self) -> str | None:
        """The parent's id in MLflow."""
        return self._parent.run_id

    @property
    def complete(self) -> bool:
        """Whether all that there is has been sent, and all runs closed."""
        return self._sender.complete

    def trial_run_id(self, name: str) -> str | None:
        """A trial's id in MLflow, as far as it is known."""
        upload = self._trials[name].upload  # asked once: the thread takes it away
        return upload.run_id if upload else self._trials[name].run_id

    def start(self) -> None:
        self._sender.start()

    def add(self, name: str, spec: RunSpec, log_path: Path, run_dir: Path, root: Location | None = None) -> None:
        """Send the trial's log from now on; nothing happens if it is known. `spec` says nothing of the parent."""
        with self._lock:
            if name in self._trials:
                return
            upload = Upload(spec, Path(log_path), Path(run_dir))
            upload.reserve()  # so that jobs/sync.py can send it if MLflow is away until the end
            place = root or Location.of(run_dir)
            self._trials[name] = _Trial(spec, Path(log_path), Path(run_dir), place, run_id=upload.run_id)

    def close_trial(self, name: str, status: str, reason: str = "") -> None:
        """The trial is over: nobody writes its log or run.json any more. Raises KeyError if it was never added.

        Its log ends with status and reason, which become tags; its MLflow run ends as what MLflow calls that.
        """
        trial = self._trials[name]
        end_log(trial.log_path, status, {"status": status, "reason": reason})
        trial.over = status

    def reopen(self, name: str) -> None:
        """The trial is worked on again; close it again when that is done."""
        with self._lock:
            trial = self._trials[name]
            trial.over, trial.done = None, False

    def finish(self, status: str, timeout: float) -> str | None:
        """Send everything, close the parent as `status`, and return its id.

        Trials that are not over are closed as what their logs say, or else as stopped. After `timeout` seconds it
        gives up with a warning: the logs keep what is not sent.
        """
        end_log(self._parent.log_path, status)
        for name, trial in self._open():
            trial.over = trial.over or _ending(trial.log_path)
            if trial.over is None:
                self.close_trial(name, "stopped")
        self._status = terminal_status(status)
        if not self._sender.finish(timeout):
            log.warning("%s", self._what_is_left())
        return self.run_id

    def _send(self, hurry: Hurry, last: bool) -> bool:
        """Everything once around: the parent, then each trial. Raises the first error when it has been around."""
        errors: list[Exception] = []
        try:
            self._send_parent(hurry)
        except Exception as error:  # MLflow raises whatever its store, driver or server does
            self._parent.disconnect()
            errors.append(error)
        in_a_row = len(errors)
        for name, trial in self._open() if self._parent_id else []:
            if hurry() or in_a_row >= _IN_A_ROW:
                break
            try:
                self._send_trial(trial, hurry)
                in_a_row = 0
            except Exception as error:
                self._put_last(name)
                errors.append(error)
                in_a_row += 1
        if last and self._parent.connected and not self._closed and not hurry():
            self._parent.close(self._status)
            self._closed = True
        if errors:
            raise errors[0]
        return last and self._closed and not self._open()

    def _send_parent(self, hurry: Hurry) -> None:
        try:
            self._parent.catch_up(hurry)
        finally:  # a file of the parent's that cannot be sent does not keep the trials waiting
            if self._parent.connected and self._parent_id != self._parent.run_id:
                self._parent_id = self._parent.run_id
                with self._lock:  # where somebody deleted the parent, its children get the new one
                    for trial in self._trials.values():
                        trial.upload, trial.done = None, False

    def _send_trial(self, trial: _Trial, hurry: Hurry) -> None:
        assert self._parent_id
        over = trial.over  # asked before the log is read: what made it end is in what is read
        if trial.upload is None:
            spec = child_of(self._parent_id, trial.spec)
            if _has_all(trial.run_dir, spec):  # left alone: opened again, it would end today
                if over:
                    self._done(trial)
                return
            trial.upload = Upload(spec, trial.log_path, trial.run_dir)
        try:
            trial.upload.catch_up(hurry)
            if over and not hurry():
                trial.upload.close(terminal_status(over))
                self._done(trial)
        except Exception:
            if trial.upload is not None:
                trial.upload.disconnect()
            raise

    def _done(self, trial: _Trial) -> None:
        """Everything of it is in MLflow: say so in its run.json, and let go of it."""
        if trial.upload is not None:
            trial.run_id = trial.upload.run_id
        trial.done, trial.upload = True, None
        assert trial.run_id
        root = trial.root
        try:
            record = read_record(root)
            if record is not None:
                remember_sent(root, record, trial.spec, trial.run_id, whole=True)
        except (JEMError, OSError) as error:  # the next jobs/sync.py asks MLflow once more
            log.warning("%s: not noted that MLflow has it: %s", root.uri, error)

    def _open(self) -> list[tuple[str, _Trial]]:
        with self._lock:
            return [(name, trial) for name, trial in self._trials.items() if not trial.done]

    def _put_last(self, name: str) -> None:
        with self._lock:
            self._trials[name] = self._trials.pop(name)

    def _what_is_left(self) -> str:
        trials = [trial for _, trial in self._open() if not is_whole(trial.run_dir)]
        uploads = [trial.upload or Upload(trial.spec, trial.log_path, trial.run_dir) for trial in trials]
        uploads += [] if self._closed else [self._parent]
        folder = self._parent.run_dir
        return (
            f"MLflow at {shown(self._parent.spec.uri)} has not got everything: {sum(map(_left, uploads))} points and "
            f"files, and the ends of {len(uploads)} runs, are still only in {folder}; starting the same sweep again, "
            f"or `python jobs/sync.py {folder}`, sends what is missing"
        )


def _has_all(run_dir: Path, spec: RunSpec) -> bool:
    """Whether this MLflow has all of a trial, below this parent."""
    if not is_whole(run_dir):
        return False
    try:
        kept, _ = kept_spec(run_dir)
    except ConfigError:
        return False
    return kept.uri == spec.uri and kept.tags.get(PARENT_TAG) == spec.tags.get(PARENT_TAG)


def _ending(log_path: Path) -> str | None:
    """The status with which a log ends, None where it does not or cannot be read."""
    try:
        written, _ = events.read(log_path)
    except OSError:
        return None
    return str(written[-1].get("status")) if written and written[-1]["kind"] == "end" else None


def _left(upload: Upload) -> int:
    try:
        return upload.left()
    except OSError:  # it cannot be sent because it cannot be read: that was told
        return 0
