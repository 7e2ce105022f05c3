"""One run in depth: its attempts, checkpoints and newest metrics, from its folder alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from jem.errors import JEMError
from jem.files import Location
from orchestrator import events
from orchestrator.survey import Run, as_kind, bytes_below, mapping


@dataclass
class Checkpoint:
    step: int
    directory: str
    bytes: int
    state: str  # whole: every file is there in its size; verified: as it was written; else what is wrong
    good: bool


@dataclass
class Story:
    """What the log says: (value, step) of each metric's newest point, and what happened in each attempt."""

    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)
    restarts: Counter[int] = field(default_factory=Counter)  # of the workers, by attempt
    reached: dict[int, int] = field(default_factory=dict)  # the newest step, by attempt
    failed_checkpoints: list[dict[str, Any]] = field(default_factory=list)
    damaged_lines: int = 0


def story(log_path: Path | None) -> Story:
    """Read a whole log."""
    told, attempt = Story(), 0
    for event in events.read(log_path)[0] if log_path else []:
        kind, step = event["kind"], event.get("step")
        if kind == "damaged":
            told.damaged_lines += 1
        elif kind == "attempt":
            told.restarts[event.get("attempt", 0)] += event.get("attempt") == attempt
            attempt = event.get("attempt", 0)
        elif kind == "metrics":
            told.metrics |= {key: (value, step) for key, value in as_kind(dict, event.get("metrics"), {}).items()}
        elif kind == "failed_checkpoint":
            told.failed_checkpoints.append(event)
        if isinstance(step, int):
            told.reached[attempt] = step
    return told


def attempts(run: Run, told: Story) -> list[dict[str, Any]]:
    """Of run.json, with how those ended that nobody could close, and how often workers were restarted."""
    rows = []
    for number, entry in enumerate(run.attempts, 1):
        alive = run.status == "running" and number == len(run.attempts)
        ending = {"status": "running" if alive else "interrupted", "ended": None, "step": told.reached.get(number)}
        rows.append({"number": number, **ending, **entry, "restarts": told.restarts[number]})
    return rows


def checkpoints(root: Location, verify: bool = False) -> list[Checkpoint]:
    """Those that are committed, newest first. `verify` reads every byte, else sizes are compared."""
    folders = [d for d in (root / "checkpoints").children() if d.name.isdecimal()]
    found = (_checkpoint(d, verify) for d in sorted(folders, key=lambda d: int(d.name), reverse=True))
    return [one for one in found if one is not None]


def _checkpoint(directory: Location, verify: bool) -> Checkpoint | None:
    """None where it is not committed, or pruned while it is looked at."""
    state, good, size = "whole", True, 0
    try:
        if not (directory / "manifest.json").exists():
            return None
        size = bytes_below(directory)
        _compare_sizes(directory)
        if verify:
            from jem import checkpoint  # which imports torch; what it says is what a run goes by

            checkpoint.read_manifest(directory).verify()
            state = "verified"
    except (JEMError, OSError, ValueError) as error:
        if not (directory / "manifest.json").exists():
            return None
        state, good = str(error), False
    return Checkpoint(int(directory.name), directory.uri, size, state, good)


def _compare_sizes(directory: Location) -> None:
    """Raises ValueError for a file that is missing or not of the size that the manifest gives."""
    manifest = mapping(directory / "manifest.json")
    files = as_kind(dict, manifest.get("files"), {})
    if not files:
        raise ValueError(f"{(directory / 'manifest.json').uri}: damaged (it names no files)")
    names = list(files)
    for name, info in zip(names, directory.fs.get_file_info([(directory / n).path for n in names]), strict=True):
        if info.type == pafs.FileType.NotFound:
            raise ValueError(f"{(directory / name).uri}: is missing")
        written = as_kind(dict, files[name], {}).get("bytes")
        if info.size != written:
            raise ValueError(f"{(directory / name).uri}: has {info.size} bytes, {written} were written")
