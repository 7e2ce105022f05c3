"""The append-only log of a run, `events.jsonl`: what happened, one JSON object a line. It is the truth.

MLflow, the progress bar and checkpoints are fed from it. Every event has `time` (ms since the epoch) and `kind`:

    metrics     step, metrics {"train/loss": 1.2, ...}
    image       step, key, path (relative to the run's directory)
    artifact    path (likewise; a file or a directory)
    model       step, path (likewise: its folder), digest, name, champion: the final model, to be registered as `name`
    checkpoint  step, rollbacks: everything up to this step is committed; how many rollbacks came before
    failed_checkpoint  step, reason, newest: this one could not be written; the newest is still there
    attempt     attempt, step, workers, why: the run goes on from this step; what came after it is run again
    rollback    number, from_step, step, reason, remedy, level: likewise, as training had diverged
    tags        tags {...}
    note        text
    end         status: finished | stopped | failed | ...
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Event = dict[str, Any]

_LOCK_PATIENCE_S = 0.01  # a stopped (SIGSTOP) writer may hold the lock for ever: append must not wait for it


class EventLog:
    """Appends events to a log that several processes may write and read at once.

    A disk that is full, or a lock that is busy, costs the caller no event and no exception: the lines wait in
    memory and go out with the next append.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""
        self._thread_lock = threading.Lock()
        self._warned = False
        self._repair()

    def append(self, kind: str, **fields: Any) -> None:
        event = {"time": time.time_ns() // 1_000_000, "kind": kind, **fields}
        self.extend((json.dumps(event, default=_plain) + "\n").encode())

    def extend(self, lines: bytes) -> None:
        """Append events in their raw form, as `since` gave them."""
        with self._thread_lock:
            self._waiting += lines
            self._flush(_LOCK_PATIENCE_S)

    def since(self, offset: int) -> bytes:
        """The whole lines after `offset`, raw: what a checkpoint carries."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return _whole_lines(file.read())

    @property
    def size(self) -> int:
        """The offset behind the last event that is on disk."""
        return os.fstat(self._file).st_size

    def close(self) -> None:
        with self._thread_lock:
            if self._waiting:
                self._flush(patience=1.0)
            if self._waiting:
                log.warning("%s: %d bytes of events could not be written and are lost", self.path, len(self._waiting))
            os.close(self._file)

    def _flush(self, patience: float) -> None:
        if not _lock(self._file, patience):
            return
        try:
            before = os.fstat(self._file).st_size
            written = os.write(self._file, self._waiting)
            if written == len(self._waiting):
                self._waiting, self._warned = b"", False
            else:  # the disk is full: leave no half line for another writer to continue
                os.ftruncate(self._file, before)
                self._warn("the disk is full")
        except OSError as error:
            self._warn(str(error))
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _repair(self) -> None:
        """Cut off the torn line that a crash in mid-write has left."""
        if not _lock(self._file, patience=1.0):
            return
        try:
            size = os.fstat(self._file).st_size
            position, tail = size, b""
            while position > 0 and b"\n" not in tail:
                position = max(0, position - 65536)
                tail = os.pread(self._file, size - position, position)
            whole = position + tail.rfind(b"\n") + 1
            if whole < size:
                os.ftruncate(self._file, whole)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            log.warning("%s cannot be written (%s): events wait in memory until it can", self.path, reason)
        self._warned = True


def read(path: Path, offset: int = 0, limit: int = -1) -> tuple[list[Event], int]:
    """The events after `offset` and the offset behind them; a torn last line is left for the next call.

    `limit`: stop at the end of the line in which that many bytes are reached. A line that is no event (a damaged
    disk) is given as kind `damaged`: it must not hide what comes after it.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(limit)
            if limit > 0 and not data.endswith(b"\n"):
                data += file.readline()
            data = _whole_lines(data)
    except FileNotFoundError:
        return [], offset
    return parse(data.splitlines()), offset + len(data)


def parse(lines: Iterable[bytes]) -> list[Event]:
    """Lines of a log as events; one that is none is of the kind `damaged`."""
    return [_parse(line) for line in lines]


def _parse(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict) or "kind" not in event or "time" not in event:
        return {"time": 0, "kind": "damaged", "text": line.decode(errors="replace")}
    return event


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _lock(file: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.0005)


def _plain(value: Any) -> Any:
    """NumPy scalars and one-element tensors as numbers, paths as text."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be put into the event log: numbers, text, lists and mappings can")
