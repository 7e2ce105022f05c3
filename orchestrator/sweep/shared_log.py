"""A trial's log where the storage is an object store, which knows no appending.

The trial's process keeps its log on its own machine's disk and shares the whole of it every few seconds, as
TRIAL/events.jsonl; the sweep's driver follows with a copy, from which tables, pictures and MLflow are made.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import TracebackType

from jem.files import Location
from orchestrator import events
from orchestrator.events import EventLog
from orchestrator.published import fetch, workbench
from orchestrator.runs import spool_of

log = logging.getLogger(__name__)

LOG = "events.jsonl"
SHARE_EVERY_S = 3.0


def desk(root: Location) -> Path:
    """Where a trial's process makes its files: not where the driver, perhaps on the same machine, keeps its copies."""
    return root.local if root.is_local else spool_of(root) / "of-the-trial"


def told_by(root: Location) -> list[events.Event]:
    """What a trial's log says, wherever it lies; nothing where there is none, or its store is away."""
    if root.is_local:
        return events.read(root.local / LOG)[0]
    try:
        return events.parse((root / LOG).read().splitlines()) if (root / LOG).exists() else []
    except OSError as error:
        log.warning("%s cannot be read: %s", (root / LOG).uri, error)
        return []


class Sharing:
    """While open, the trial's log is shared; it goes on from what was shared, wherever that was written."""

    def __init__(self, root: Location) -> None:
        self.root, self.path = root, desk(root) / LOG
        self.shared = -1  # bytes
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True, name="share the log")

    def __enter__(self) -> Sharing:
        if not self.root.is_local:
            shared = (self.root / LOG).read() if (self.root / LOG).exists() else b""
            here = self.path.read_bytes() if self.path.exists() else b""
            more = bool(shared) and here.startswith(shared)  # a process that died here had not shared all
            if (shared or here) and not more:
                Location.of(self.path).write(shared)
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self.root.is_local:
            self.stop.set()
            self.thread.join()
            self._share(last=True)

    def _work(self) -> None:
        while not self.stop.wait(SHARE_EVERY_S):
            self._share()

    def _share(self, last: bool = False) -> None:
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            content = content[: content.rfind(b"\n") + 1]  # a line may be under way
            if len(content) != self.shared and content:
                (self.root / LOG).write(content)
                self.shared = len(content)
        except OSError as error:  # a store that is away: the next time tries again
            if last:
                log.warning("%s cannot be written (%s): the end of the log is in %s", self.root.uri, error, self.path)


class Following:
    """The driver's copies of its trials' logs."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}  # bytes of each log as it was shared

    def catch_up(self, trial: Location) -> None:
        """Append what is new in a trial's log to its copy, once the files that it tells of are here. Raises OSError."""
        shared = trial / LOG
        if trial.is_local or not shared.exists() or (size := shared.size()) == self.seen.get(trial.uri):
            return
        copy = workbench(trial) / LOG
        known = set(copy.read_bytes().splitlines()) if copy.exists() else set()
        new = [line for line in shared.read().splitlines() if line not in known]
        for event in events.parse(new):
            if event["kind"] in ("image", "artifact", "model"):
                fetch(trial, event["path"])
        written = EventLog(copy)
        written.extend(b"".join(line + b"\n" for line in new))
        written.close()
        self.seen[trial.uri] = size
