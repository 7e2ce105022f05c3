"""The run's log on the driver's side, where the storage is an object store and rank 0 is on another machine."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from jem import checkpoint
from jem.errors import JEMError
from jem.files import Location
from orchestrator import events
from orchestrator.events import EventLog

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0

TAIL = "events-tail.jsonl"
"""In the run's folder on an object store: the events after the last checkpoint."""


class Mirror:
    """While open, copies the events that committed checkpoints carry into the local log, and their pictures."""

    def __init__(self, root: Location, log_path: Path, needed: bool) -> None:
        self.root, self.log_path = root, log_path
        self.behind = not root.is_local  # a new machine, or one that was stopped between a commit and a look
        self.needed = needed and self.behind
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True, name="log mirror")

    def __enter__(self) -> Mirror:
        if self.behind:
            self.log = EventLog(self.log_path)
            self.done = {_identity(e) for e in events.read(self.log_path)[0] if e["kind"] == "checkpoint"}
            self._copy_or_warn()
        if self.needed:
            (self.root / TAIL).remove()  # of an earlier attempt
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.needed:
            self.stop.set()
            self.thread.join()
            self._copy_or_warn(tail=True)
        if self.behind:
            self.log.close()

    def _copy_or_warn(self, tail: bool = False) -> None:
        """What came of the run does not depend on whether all its events could be fetched."""
        try:
            self.copy()
            if tail and (self.root / TAIL).exists():
                known = set(self.log_path.read_bytes().splitlines())  # a checkpoint may carry some of them, too
                lines = [line for line in (self.root / TAIL).read().splitlines() if line not in known]
                self._take(b"".join(line + b"\n" for line in lines))
        except (JEMError, OSError) as error:
            log.warning("%s: some events could not be fetched (%s)", self.root.uri, error)

    def copy(self) -> None:
        """Take the events of checkpoints that the log does not know, oldest first."""
        for directory in reversed(checkpoint.committed(self.root / "checkpoints")):
            manifest = checkpoint.read_manifest(directory)
            commit = {"step": manifest.step, "rollbacks": manifest.info["rollbacks"]}
            if _identity(commit) not in self.done:
                self._take(manifest.read("events.jsonl"))
                self.log.append("checkpoint", **commit)  # it cannot carry its own commit
                self.done.add(_identity(commit))

    def _take(self, lines: bytes) -> None:
        taken = []
        for line in lines.splitlines(keepends=True):
            event = json.loads(line)
            if event["kind"] == "checkpoint":  # it is known from its directory
                continue
            taken.append(line)
            if event["kind"] == "image":
                target = Location.of(self.log_path.parent / event["path"])
                target.write((self.root / event["path"]).read())
        self.log.extend(b"".join(taken))

    def _work(self) -> None:
        while not self.stop.wait(LOOK_EVERY_S):
            try:
                self.copy()
            except (JEMError, OSError):
                continue  # pruned or unreachable meanwhile: the next look tries again


def _identity(commit: dict[str, Any]) -> tuple[int, int]:
    """After a rollback the same step is reached again."""
    return commit["step"], commit.get("rollbacks", 0)
