"""What is made on a machine's disk for a run on an object store, copied into the run's folder there, and back.

Pictures, reports and portable models are made beside the log, below ~/.cache/jem/spool: their libraries write to disks.
"""

from __future__ import annotations

from pathlib import Path

from jem.files import Location
from orchestrator.runs import aside, spool_of

LAST = ("model.json", "report.json", "against.json", "samples.json")
"""Without them a folder counts as not there: they are written when the rest is."""


def workbench(root: Location) -> Path:
    """Where a driver makes files of a run: in the run's own folder, or on this machine's disk."""
    return root.local if root.is_local else spool_of(root)


def clear_workbench(root: Location, folder: Path | None = None) -> None:
    """For a run that is new in its place: what was made here for one that --fresh has moved away is kept beside."""
    made = Location.of(folder or workbench(root))
    if not root.is_local and made.exists():
        made.move_to(aside(made))


def publish(root: Location, name: str, folder: Path | None = None) -> None:
    """Copy a file or folder below `folder`, else the workbench, into the run's folder elsewhere. Raises OSError."""
    if root.is_local:
        return
    folder = folder or workbench(root)
    made = folder / name
    files = [path for path in made.rglob("*") if path.is_file()] if made.is_dir() else [made]
    for path in sorted(files, key=lambda path: path.name in LAST):
        (root / path.relative_to(folder).as_posix()).write(path.read_bytes())


def fetch(root: Location, name: str) -> None:
    """The other way round, to the workbench: a file, or a folder with its files. Raises OSError."""
    source, target = root / name, workbench(root) / name
    files = {target / file.name: file for file in source.children()} if source.is_dir() else {target: source}
    for path, file in sorted(files.items(), key=lambda pair: pair[0].name in LAST):
        if not file.is_dir():
            Location.of(path).write(file.read())


def bring(root: Location, name: str) -> None:
    """Fetch a folder that another machine has published, if there is one, and it is not here. Raises OSError."""
    if not root.is_local and not (workbench(root) / name).exists() and (root / name).exists():
        fetch(root, name)
