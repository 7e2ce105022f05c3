"""What a storage holds: each run as its folder tells it, damaged or not, while a driver may be working on it.

Nothing is written and no lock is kept. What cannot be read is a fault of that run, never an exception.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pyarrow import fs as pafs

from jem.errors import ConfigError, Problem
from jem.files import Location
from orchestrator import events, runs
from orchestrator.events import Event

K = TypeVar("K")
D = TypeVar("D")

MARKS = ("run.json", "recipe.yaml", "events.jsonl", "checkpoints")
"""A folder that holds one of them is a run's."""

_TAIL = 256 * 1024  # bytes at the end of the log in which the newest step and scores are looked for

SCORES = ("val/accuracy", "val/nll")
"""By which runs are compared at a glance."""


@dataclass
class Run:
    """A run as its folder tells it."""

    root: Location
    record: dict[str, Any] = field(default_factory=dict)  # run.json
    recipe: dict[str, Any] = field(default_factory=dict)  # recipe.yaml
    rollbacks: list[dict[str, Any]] = field(default_factory=list)  # recovery.json
    faults: list[str] = field(default_factory=list)  # what should be there and cannot be read
    holder: str | None = None  # who is working on it
    step: int | None = None
    scores: dict[str, float] = field(default_factory=dict)  # the newest of each of SCORES
    seen: float | None = None  # when it last gave a sign, in seconds since the epoch
    bytes: int | None = None
    log_path: Path | None = None  # of events.jsonl, where it is on this machine

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def status(self) -> str:
        if self.holder:
            return "running"
        if not self.record:
            return "damaged"
        status = str(self.record.get("status"))
        return "interrupted" if status in ("new", "running") else status

    @property
    def steps(self) -> int | None:
        return as_kind(int, self.recipe.get("steps"), None)

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return [entry for entry in as_kind(list, self.record.get("attempts"), []) if isinstance(entry, dict)]

    @property
    def begun(self) -> float:
        """When somebody last began to work on it."""
        times = [as_kind(float, entry.get("started"), 0.0) for entry in self.attempts[-1:]]
        return times[0] if times else self.seen or 0.0

    @property
    def mlflow(self) -> dict[str, Any]:
        return as_kind(dict, self.record.get("mlflow"), {})

    @property
    def sent(self) -> bool:
        """Whether MLflow has everything; of an attempt before this one it says nothing."""
        return bool(self.mlflow.get("complete")) and self.status not in ("running", "interrupted")

    @property
    def result(self) -> dict[str, Any]:
        return as_kind(dict, self.record.get("result"), {})

    @property
    def remedies(self) -> list[str]:
        """What the run tried against divergence, in order."""
        tried = [str(remedy) for rollback in self.rollbacks for remedy in as_kind(list, rollback.get("remedies"), [])]
        return list(dict.fromkeys(tried))

    @property
    def setting(self) -> dict[str, Any]:
        """The recipe's settings by their dotted paths."""
        return dict(_dotted(self.recipe, ""))


def find(storage: Location) -> list[Location]:
    """The folders of all runs."""
    return [child for child in storage.children() if not child.name.startswith(".") and _is_run(child)]


def look(root: Location) -> Run:
    """The run in a folder."""
    run = Run(root, holder=holder(root))
    try:
        run.record = _record(root)
        run.recipe = mapping(root / "recipe.yaml")
    except ValueError as error:
        run.faults.append(str(error))
        run.recipe = run.recipe or _mapping_or_none(root / "recipe.yaml")
    try:
        found = mapping(root / "recovery.json").get("rollbacks", []) if (root / "recovery.json").exists() else []
        run.rollbacks = [entry for entry in as_kind(list, found, []) if isinstance(entry, dict)]
        run.log_path = log_of(root)
        run.bytes = bytes_below(root)
        told = _end_of(run.log_path)
        newest = newest_event(told)
        run.scores = _scores([*told, run.result] if run.status == "finished" else [run.result, *told])
        run.step = _newest_step(run, newest)
        run.seen = newest["time"] / 1000 if newest else _modified(root / "run.json")
    except (OSError, ValueError) as error:
        run.faults.append(str(error))
    if run.holder and not (root / "run.json").exists():
        run.faults = []  # it is about to be written
    return run


def holder(root: Location) -> str | None:
    """Who is working on a run, found out without keeping anybody from it."""
    path = root.parent / f".{root.name}.lock"
    try:
        text = path.read().decode()
        who = json.loads(text)
        if root.is_local:
            here = who["host"] == socket.gethostname()
            alive = _locks(path.local, who["pid"]) if here else _locked(path.local)
        else:
            alive = runs.alive(text)
        return f"pid {who['pid']} on {who['host']}" if alive else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def log_of(root: Location) -> Path:
    if root.is_local:
        return root.local / "events.jsonl"
    return runs.spool_of(root) / "events.jsonl"


def newest_event(told: list[Event]) -> Event | None:
    """The last event that has a step, or else the last one."""
    found = [event for event in told if event["kind"] != "damaged"]
    with_step = [event for event in found if isinstance(event.get("step"), int)]
    if not found:
        return None
    return found[-1] | ({"step": with_step[-1]["step"]} if with_step else {})


def bytes_below(root: Location) -> int:
    """What all files of a folder hold; files may come and go meanwhile."""
    if not root.is_local:
        infos = root.fs.get_file_info(pafs.FileSelector(root.path, recursive=True, allow_not_found=True))
        return sum(info.size or 0 for info in infos)
    total = 0
    for folder, _, names in os.walk(root.local):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def choose(arguments: list[str], allowed: tuple[str, ...]) -> tuple[Location, list[Location], dict[str, str]]:
    """The storage, the runs that are named (as NAME or by their folder), and the `key=value` settings."""
    settings, names, problems = {}, [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            names.append(argument)
        elif key in allowed:
            settings[key] = value
        else:
            problems.append(Problem(key, f"is no setting of this command; {' and '.join(allowed)} can be given"))
    if problems:
        raise ConfigError(problems)
    try:
        storage = Location.of(settings.get("storage_path", "./runs"))
        if "storage_path" in settings and not storage.is_dir():
            raise ValueError(f"{storage.uri}: no such folder")
        return storage, [_named(storage, name) for name in names], settings
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("storage_path", str(error))]) from error


def _named(storage: Location, name: str) -> Location:
    root = Location.of(name.rstrip("/")) if "/" in name else storage / name
    if root.is_dir() and _is_run(root):
        return root
    import difflib

    close = difflib.get_close_matches(root.name, [run.name for run in find(root.parent)], 1, 0.3)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"no run {root.name!r} in {root.parent.uri}{hint}")


def _is_run(root: Location) -> bool:
    infos = root.fs.get_file_info([(root / mark).path for mark in MARKS])
    return any(info.type != pafs.FileType.NotFound for info in infos)


def _record(root: Location) -> dict[str, Any]:
    record = mapping(root / "run.json")
    if "status" not in record:
        raise ValueError(f"{(root / 'run.json').uri}: damaged (it has no status)")
    return record


def mapping(path: Location) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping. Raises ValueError that says why it cannot be had."""
    try:
        content = path.read()
        found = json.loads(content) if path.name.endswith(".json") else yaml.safe_load(content)
    except FileNotFoundError:
        raise ValueError(f"{path.uri}: is missing") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path.uri}: damaged ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.uri}: damaged (it holds no mapping)")
    return found


def _mapping_or_none(path: Location) -> dict[str, Any]:
    try:
        return mapping(path)
    except ValueError:
        return {}


def _end_of(path: Path) -> list[Event]:
    """The last events of a log, of which only the end is read."""
    try:
        return events.read(path, max(0, path.stat().st_size - _TAIL))[0]
    except OSError:
        return []


def _scores(told: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in told:
        metrics = as_kind(dict, one.get("metrics"), {})
        found |= {key: metrics[key] for key in SCORES if isinstance(metrics.get(key), int | float)}
    return found


def _newest_step(run: Run, newest: Event | None) -> int | None:
    ended = run.status not in ("running", "interrupted", "damaged")
    if ended and isinstance(run.result.get("step"), int):
        return int(run.result["step"])
    if newest and "step" in newest:
        return int(newest["step"])
    steps = [int(child.name) for child in (run.root / "checkpoints").children() if child.name.isdecimal()]
    return max(steps, default=None)


def _locks(path: Path, pid: int) -> bool:
    """Whether a process of this host holds the lock. The file still names one that lives on and has let go of it."""
    try:
        held = Path("/proc/locks").read_text().splitlines()
    except OSError:  # not Linux
        return _locked(path)
    inode = str(path.stat().st_ino)
    fields = (line.split() for line in held if "FLOCK" in line)
    return any(f[-4] == str(pid) and f[-3].rpartition(":")[2] == inode for f in fields)


def _locked(path: Path) -> bool:
    """Whether anybody holds the lock, asked by trying: one that is free is held for some microseconds."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
        return False


def _modified(path: Location) -> float | None:
    modified = path.fs.get_file_info(path.path).mtime_ns
    return modified / 1e9 if modified else None


def _dotted(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and key != "options":
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_kind(kind: type[K], value: Any, otherwise: D) -> K | D:
    """`value` where it is of that kind: a damaged file may hold anything."""
    if kind is float and type(value) is int:
        value = float(value)
    return value if isinstance(value, kind) else otherwise
