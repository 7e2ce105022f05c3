"""A run's folder: who it is, whether somebody is working on it, what came of it.

STORAGE/NAME/run.json        name -> MLflow run -> attempts -> result
STORAGE/NAME/lock            held by the driver that works on the run
STORAGE/NAME/recipe.yaml     the whole configuration
STORAGE/NAME/events.jsonl    the log
STORAGE/NAME/checkpoints/    ours;  STORAGE/NAME/ray/  what Ray Train wants for itself, none of it needed
STORAGE/NAME/recovery.json   its rollbacks
STORAGE/NAME/owner           the group of workers that may write checkpoints;  failure.txt  what the last one died of
STORAGE/NAME/samples/        pictures of the chains
STORAGE/NAME/models/         final models, portable: see final_model.py;  STORAGE/NAME/evaluations/  see evaluation.py
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import psutil

from jem.errors import ConfigError, Problem
from jem.files import SAFE, Location
from orchestrator.config import DEFAULTS, RunConfig, to_yaml

HEARTBEAT_S = 10.0
SETTLE_S = 0.5


@dataclass
class RunRecord:
    """What run.json holds."""

    name: str
    science: dict[str, Any]
    digest: str
    status: str = "new"  # new, running, finished, stopped, failed, diverged, ...
    mlflow: dict[str, Any] = field(default_factory=dict)  # uri, experiment, run_id; complete: nothing is left to send
    attempts: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None

    def save(self, root: Location) -> None:
        (root / "run.json").write(json.dumps(asdict(self), indent=1).encode())


def storage_of(config: RunConfig) -> Location:
    """Where all runs live. Raises ConfigError if it cannot be used from here."""
    path = config.storage_path
    try:
        storage = Location.of(planned_storage(config))
        storage.mkdir()
        probe = storage / f".writable-{socket.gethostname()}-{os.getpid()}"
        probe.write(b"1")
        probe.remove()
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("storage_path", f"{path!r} cannot be written: {error}")]) from error
    return storage


def planned_storage(config: RunConfig) -> str:
    """Where all runs would live. Raises ConfigError for a relative path under a submitted job."""
    path = config.storage_path
    if "://" in path:
        return path
    if not os.path.isabs(os.path.expanduser(path)) and under_ray_job():
        reason = "is relative, but a submitted job's directory is thrown away when it ends"
        raise ConfigError([Problem("storage_path", f"{path!r} {reason}; give an absolute path or a URI such as s3://")])
    return os.path.abspath(os.path.expanduser(path))


def planned_folder(config: RunConfig) -> str:
    """Where the run's folder would be. Raises as `planned_storage`."""
    return below(planned_storage(config), str(config.name))


def below(storage: str, name: str) -> str:
    """The folder `name` in a folder or URI; what a URI says of its store (?endpoint_override=...) stays at its end."""
    if "://" not in storage:
        return os.path.join(storage, name)
    place, mark, query = storage.partition("?")
    return f"{place.rstrip('/')}/{quote(name, safe=SAFE)}{mark}{query}"


def under_ray_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def read_record(root: Location) -> RunRecord | None:
    """The run in a folder, or None. Raises ConfigError if run.json is damaged."""
    path = root / "run.json"
    if not path.exists():
        return None
    try:
        return RunRecord(**json.loads(path.read()))
    except (ValueError, TypeError) as error:
        remedy = "restore it, or start anew with --fresh"
        raise ConfigError(f"{path.uri}: damaged ({error}); {remedy}") from error


def check_kind(root: Location) -> None:
    """Raises ConfigError for the folder of a sweep or of several seeds, which a run would make unreadable."""
    if (root / "sweep.json").exists():
        message = f"{root.uri} is the folder of a sweep, or of several seeds; give another name="
        raise ConfigError([Problem("name", message)])


def open_record(root: Location, config: RunConfig, fresh: bool) -> RunRecord:
    """The record of the run to work on: the one that is there, or a new one.

    `fresh` first moves what is there to NAME.1, or the next number that is free. Raises ConfigError
    with the differences if the run that is there is of another science.
    """
    if fresh and root.exists():
        set_aside(root)
    record = None if fresh else read_record(root)
    if record is None:
        assert config.name
        root.mkdir()
        return RunRecord(config.name, config.science, config.digest)
    old, new = (json.loads(json.dumps(DEFAULTS | science)) for science in (record.science, config.science))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        problems = [Problem(k, f"is {new.get(k)!r}, the run {root.uri} has {old.get(k)!r}") for k in changed]
        remedy = "give the run another name=, or start it anew with --fresh (the old one is kept as NAME.1)"
        raise ConfigError([*problems, Problem("", remedy)])
    return record


def set_aside(root: Location) -> None:
    """Move a run to NAME.1, or the next number that is free; its record says so."""
    target = aside(root)
    root.move_to(target)
    with suppress(ConfigError):  # a damaged record stays as it is
        record = read_record(target)
        if record is not None:
            old, new = (each.uri.partition("?")[0] for each in (root, target))
            moved = _moved(asdict(record), old, new)
            RunRecord(**moved | {"name": target.name}).save(target)


def _moved(value: Any, old: str, new: str) -> Any:
    """JSON with the paths below `old` written as below `new`."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    return new + value[len(old) :] if isinstance(value, str) and value.startswith(f"{old}/") else value


def write_config(root: Location, config: RunConfig) -> None:
    (root / "recipe.yaml").write(to_yaml(config).encode())


@contextmanager
def lock(root: Location, tidy: bool = False) -> Iterator[None]:
    """Hold the run; ConfigError naming host and pid if another living driver does.

    `tidy`: leave no lock file behind, for folders that are no runs.

    On a local disk the operating system releases the lock with the process. On an object store the lock
    is a file with a heartbeat, which counts as dead at once if its process on this host is gone, and
    elsewhere after three missed beats.
    """
    if root.is_local:
        with _local_lock(root, tidy):
            yield
    else:
        with _remote_lock(root):
            yield


@contextmanager
def _local_lock(root: Location, tidy: bool) -> Iterator[None]:
    path = root.local.parent / f".{root.name}.lock"  # beside the folder, which --fresh moves away
    path.parent.mkdir(parents=True, exist_ok=True)
    if tidy and root.is_dir() and not os.access(path.parent, os.W_OK):  # a folder that is mounted
        path = root.local / ".lock"
    with _locked(root, path) as file:
        file.truncate(0)
        file.write(_identity())
        file.flush()
        try:
            yield
        finally:
            if tidy:
                path.unlink(missing_ok=True)


def _locked(root: Location, path: Path) -> IO[str]:
    """The file, open and held: that which lies there, as the one that was opened may be gone meanwhile."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with file:
                file.seek(0)
                raise _held(root, file.read()) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


@contextmanager
def _remote_lock(root: Location) -> Iterator[None]:
    import threading

    path = root.parent / f".{root.name}.lock"
    if path.exists():
        text = path.read().decode()
        if alive(text):
            raise _held(root, text)
    path.write(_identity().encode())
    time.sleep(SETTLE_S)  # another driver may have written at the same moment: the last one has it
    if not _ours(path):
        raise _held(root, path.read().decode())
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S):
            with suppress(OSError):  # the store is away for a moment: the next beat may reach it
                if not _is_mine(path.read()):
                    return  # it was taken over: nobody heard of us for too long
                path.write(_identity().encode())

    thread = threading.Thread(target=beat, daemon=True, name="run lock")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if _ours(path):
            path.remove()


def _ours(path: Location) -> bool:
    try:
        return _is_mine(path.read())
    except OSError:
        return False


def _is_mine(text: bytes) -> bool:
    try:
        holder, me = json.loads(text), json.loads(_identity())
        return all(holder[key] == me[key] for key in ("host", "pid", "start"))
    except (ValueError, KeyError):
        return False


def _identity() -> str:
    me = psutil.Process()
    return json.dumps({"host": socket.gethostname(), "pid": me.pid, "start": me.create_time(), "time": time.time()})


def alive(text: str) -> bool:
    """Whether the driver that wrote this into an object store's lock lives."""
    try:
        holder = json.loads(text)
        if holder["host"] == socket.gethostname():
            process = psutil.Process(holder["pid"])
            return bool(abs(process.create_time() - holder["start"]) < 1)
        return bool(time.time() - holder["time"] < 3 * HEARTBEAT_S)
    except (ValueError, KeyError, psutil.Error):
        return False


def _held(root: Location, text: str) -> ConfigError:
    try:
        holder = json.loads(text)
        who = f"pid {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError):
        who = "another process"
    remedy = "wait for it, stop it, or give this run another name="
    return ConfigError(f"{root.uri}: {who} is working on this run; {remedy}")


def spool_of(root: Location) -> Path:
    """A local folder for the log of a run whose own folder is not local."""
    name = hashlib.sha256(root.uri.encode()).hexdigest()[:12]
    return Path.home() / ".cache" / "jem" / "spool" / f"{root.name}-{name}"


def aside(root: Location) -> Location:
    number = 1
    while (root.parent / f"{root.name}.{number}").exists():
        number += 1
    return root.parent / f"{root.name}.{number}"
