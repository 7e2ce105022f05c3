"""The run in MLflow: one uploader on the driver's side sends the run's log there, aside from training."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jem.errors import ConfigError, Problem
from jem.files import Location
from orchestrator import events
from orchestrator.config import shown
from orchestrator.mlflow_run import Registered, RunSpec
from orchestrator.runs import under_ray_job
from orchestrator.upload import Upload, reason, sync, terminal_status

__all__ = ["Hurry", "Sender", "Uploader", "default_uri", "end_log", "sync"]

log = logging.getLogger(__name__)

Hurry = Callable[[], bool]

_POLL_S = 1.0
_MAX_BACKOFF_S = 60.0


def default_uri(storage: Location, configured: str | None) -> tuple[str, str | None]:
    """The tracking URI and, where MLflow's server does not decide it, the root of the artifacts.

    `configured`, else MLFLOW_TRACKING_URI, else SQLite inside a local `storage`.
    """
    check_uri(configured)
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and not storage.is_local:
        message = (
            f"MLflow's SQLite file cannot live in the object store {storage.uri}: set tracking.uri, or "
            "MLFLOW_TRACKING_URI, to an MLflow server (http://HOST:PORT) or a database on a local disk"
        )
        raise ConfigError([Problem("tracking.uri", message)])
    if uri and under_ray_job() and _absolute(uri) != uri:
        reason = "is relative, but a submitted job's directory is thrown away when it ends"
        raise ConfigError([Problem("tracking.uri", f"{uri!r} {reason}; give an absolute path: sqlite:////...")])
    uri = _absolute(uri or f"sqlite:///{(storage / 'mlflow.db').local}")
    if uri.startswith(("http://", "https://", "databricks")):
        return uri, None  # the server decides
    if uri.startswith("sqlite:///"):  # beside the file: an object store would need a client of its own in MLflow
        return uri, str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
    return uri, (storage / "mlartifacts").uri


def check_uri(configured: str | None) -> None:
    """Raises ConfigError for a tracking URI that names no MLflow, which training would hear of again and again."""
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI") or ""
    scheme, _, rest = uri.partition("://")
    files = scheme == "file" or (not rest and "://" not in uri)
    if not uri or uri.startswith("databricks") or (files and os.environ.get("MLFLOW_ALLOW_FILE_STORE")):
        return
    if files or not rest or (scheme == "sqlite" and not rest.startswith("/")):
        if re.fullmatch(r"[\w.-]+:\d+/?", uri):
            meant = f"http://{uri}"
        elif uri.startswith("sqlite:"):
            meant = f"sqlite:///{os.path.abspath(uri.removeprefix('sqlite:').lstrip('/') or 'mlflow.db')}"
        else:  # a folder, as MLflow's file store had it
            path = f"/{uri.removeprefix('file:').lstrip('/')}" if uri.startswith("file:") else uri
            meant = f"sqlite:///{os.path.abspath(os.path.expanduser(path))}/mlflow.db"
        message = f"is {uri!r}, which names no MLflow: a server is http://HOST:PORT, a file sqlite:///PATH, as {meant}"
        raise ConfigError([Problem("tracking.uri", message)])


class Sender:
    """The daemon thread that calls `send` again and again: it never raises into the driver and never blocks it.

    `send(hurry, last)` sends what there is, and ends all when it is the `last` time, of which it says whether that
    is done; `hurry()` says to leave off. It may raise whatever MLflow raises: that is told once, and tried again at
    longer and longer intervals.
    """

    def __init__(self, send: Callable[[Hurry, bool], bool], uri: str, kept: Path) -> None:
        """`uri` and `kept`, where everything is until it is sent, are told when MLflow is away."""
        self._send, self._uri, self._kept = send, uri, kept
        self._thread = threading.Thread(target=self._work, name="mlflow-uploader", daemon=True)
        self._stop = threading.Event()
        self._deadline = float("inf")
        self._done = False
        self._down = False

    @property
    def complete(self) -> bool:
        """Whether all has been sent and ended."""
        return self._done

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout: float) -> bool:
        """Send for the last time, until it succeeds or `timeout` seconds are over; whether it did."""
        self._deadline = time.monotonic() + timeout
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return self._done

    def _work(self) -> None:
        backoff = _POLL_S
        while not self._done and not self._hurry():
            try:
                self._done = self._send(self._hurry, self._stop.is_set())
                backoff, self._down = _POLL_S, False
            except Exception as error:  # MLflow raises whatever its store, driver or server does
                self._warn_once(error)
                backoff = min(2 * backoff, _MAX_BACKOFF_S)
            self._pause(backoff)

    def _hurry(self) -> bool:
        return time.monotonic() >= self._deadline

    def _pause(self, backoff: float) -> None:
        stopping = self._stop.wait(backoff if self._down else _POLL_S)
        if stopping and self._down:  # the driver is waiting for the end: try more often
            time.sleep(max(0.0, min(_POLL_S, self._deadline - time.monotonic())))

    def _warn_once(self, error: Exception) -> None:
        if not self._down:
            log.warning(
                "MLflow at %s cannot be written (%s): the run goes on, everything is kept in %s and sent later",
                shown(self._uri),
                reason(error, self._uri),
                self._kept,
            )
        self._down = True


class Uploader:
    """Sends a run's log to MLflow from a daemon thread: it never raises into the driver and never blocks it."""

    def __init__(
        self,
        *,
        log_path: Path,
        run_dir: Path,
        uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None = None,
        artifact_root: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        on_run: Callable[[str], None] | None = None,
    ) -> None:
        """`on_run` is called, in the uploader's thread, with the id of a run as soon as it is known."""
        spec = RunSpec(uri, experiment, run_name, artifact_root, _texts(params), _texts(tags))
        self._upload = Upload(spec, Path(log_path), Path(run_dir), run_id, on_run)
        self._sender = Sender(self._send, uri, Path(log_path))
        self._status: str | None = None

    @property
    def run_id(self) -> str | None:
        return self._upload.run_id

    def registered(self, digest: str) -> Registered | None:
        """What became of the final model with these weights, as far as it is known."""
        return self._upload.registered(digest)

    @property
    def complete(self) -> bool:
        """Whether all that there is has been sent, and the run closed."""
        return self._sender.complete

    def start(self) -> None:
        self._sender.start()

    def finish(self, status: str, timeout: float) -> str | None:
        """Send everything, close the run as `status` (finished, stopped, failed, ...), and return its id.

        After `timeout` seconds it gives up with a warning: the log keeps what is not sent.
        """
        end_log(self._upload.log_path, status)
        self._status = terminal_status(status)
        if not self._sender.finish(timeout):
            log.warning("%s", self._upload.what_is_left())
        return self.run_id

    def _send(self, hurry: Hurry, last: bool) -> bool:
        try:
            self._upload.catch_up(hurry)
            if not last or hurry():
                return False
            self._upload.close(self._status)
            return True
        except Exception:
            self._upload.disconnect()
            raise


def end_log(log_path: Path, status: str, tags: Mapping[str, str] | None = None) -> None:
    """Whether points were sent without a checkpoint must be readable in the log: `end` says so.

    With `tags` the log says these, too, and ends anew where it ended otherwise.
    """
    try:
        written, _ = events.read(log_path)
        if written and written[-1]["kind"] == "end" and (tags is None or _says(written, status, tags)):
            return
        ending = events.EventLog(log_path)
        if tags is not None:
            ending.append("tags", tags=dict(tags))
        ending.append("end", status=status)
        ending.close()
    except OSError as error:
        log.warning("%s cannot be ended (%s)", log_path, error)


def _says(written: list[events.Event], status: str, tags: Mapping[str, str]) -> bool:
    told = [event["tags"] for event in written if event["kind"] == "tags"]
    return written[-1].get("status") == status and any(tags.items() <= known.items() for known in told[-1:])


def _texts(values: Mapping[str, Any] | None) -> dict[str, str]:
    return {key: str(value) for key, value in (values or {}).items()}


def _absolute(uri: str) -> str:
    """A relative SQLite path is relative to a directory that a submitted job throws away."""
    prefix, path = "sqlite:///", uri.removeprefix("sqlite:///")
    return prefix + os.path.abspath(path) if uri.startswith(prefix) and path else uri
