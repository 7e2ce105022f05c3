"""What is made on the driver's machine for a run on an object store, copied into the run's folder there.

Pictures, reports and portable models are made beside the log, below ~/.cache/jem/spool: their libraries write to disks.
"""

from __future__ import annotations

from pathlib import Path

from jem.files import Location
from orchestrator.runs import spool_of

LAST = ("model.json", "report.json", "against.json", "samples.json")
"""Without them a folder counts as not there: they are written when the rest is."""


def workbench(root: Location) -> Path:
    """Where files of a run are made: in its own folder, or on this machine's disk."""
    return root.local if root.is_local else spool_of(root)


def publish(root: Location, name: str) -> None:
    """Copy a file or folder of the workbench into the run's folder, if that is elsewhere. Raises OSError."""
    if root.is_local:
        return
    made = workbench(root) / name
    files = [path for path in made.rglob("*") if path.is_file()] if made.is_dir() else [made]
    for path in sorted(files, key=lambda path: path.name in LAST):
        (root / path.relative_to(workbench(root)).as_posix()).write(path.read_bytes())


def bring(root: Location, name: str) -> None:
    """The other way round, where the folder is not here yet: another machine has published it. Raises OSError."""
    made = workbench(root) / name
    if root.is_local or made.exists():
        return
    for file in sorted((root / name).children(), key=lambda file: file.name in LAST):
        if not file.is_dir():
            Location.of(made / file.name).write(file.read())
