"""Write any source as a checked Parquet data set, or check one again. Torch is imported once it is needed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jem.config import DATA_SOURCES, DataConfig
from jem.errors import ConfigError, JEMError, Problem
from jem.settings import Entry, build
from orchestrator.config import parse_arguments
from orchestrator.result import Result
from orchestrator.runs import lock

if TYPE_CHECKING:
    from jem.data.manifest import Manifest
    from jem.files import Location

Say = Callable[[str], None]


@dataclass
class Prepared(Result):
    """`data` is where the data set lies: what `data.root` is for data.name=parquet."""

    data: str = ""


def prepare_or_verify(source: str | None, out: str, changes: Sequence[str], say: Say) -> Prepared:
    """Prepare `source` at `out`, or verify `out` where there is no source; `say` is told of the progress."""
    location = _location(out)
    try:
        if source is None:
            manifest = verify(location, say)
        else:
            config = data_config(source, changes)
            if config.name == "imagefolder" and location.is_local and _within(location.local, Path(config.root or ".")):
                raise ConfigError([Problem("OUT", f"{out} is inside SOURCE, where it would be taken for data")])
            with lock(location, tidy=True):  # of two at once the second would find an empty folder, too
                manifest = prepare(config, location, say)
    except OSError as error:  # a full disk, a store that refuses: for the user to mend
        raise JEMError(f"{out}: {error}") from error
    for line in table(manifest):
        say(line)
    return Prepared(name=manifest.name, metrics=metrics(manifest), status="finished", data=location.uri)


def prepare(config: DataConfig, location: Location, say: Say) -> Manifest:
    """Check the source, write it file by file; nothing stays at `location` if that fails."""
    from jem.data import parquet
    from jem.data.catalog import describe
    from jem.data.sources import load

    parquet.refuse_unless_empty(location)
    where = describe(config).where
    say(f"reading {config.name}: {where}")
    return parquet.write(load(config, in_memory=False), location, source=f"{config.name}: {where}", progress=say)


def verify(location: Location, say: Say) -> Manifest:
    """Compare every byte at `location` with what was written."""
    from jem.data import parquet

    return parquet.verify(location, say)


def data_config(source: str, changes: Sequence[str]) -> DataConfig:
    """SOURCE, a source's name or an image folder's path, and KEY=VALUE settings with or without `data.`."""
    entries, problems = parse_arguments(changes)
    entries = {key.removeprefix("data."): entry for key, entry in entries.items()}
    entries["name"] = Entry(source, "SOURCE", source)
    if source not in DATA_SOURCES and ":" not in source and not Path(source).is_dir():
        what = "is a file, a folder of images was expected" if Path(source).exists() else "there is no such folder"
        close = difflib.get_close_matches(source, DATA_SOURCES, 1)
        names = (
            f"did you mean {close[0]!r}?"
            if close
            else f"or name one of {', '.join(DATA_SOURCES)}, package.module:function"
        )
        problems.append(Problem("SOURCE", f"{source}: {what}; {names}"))
        del entries["name"]
    if source not in DATA_SOURCES and Path(source).is_dir():
        if "root" in entries:
            problems.append(Problem("root", f"is given, but SOURCE is the folder {source} itself; leave one out"))
        entries |= {"name": Entry("imagefolder"), "root": Entry(source, "SOURCE", source)}
    try:
        config = build(DataConfig, entries)
    except ConfigError as error:
        problems += [Problem(f"data.{p.key}" if p.key else "", p.message, p.origin) for p in error.problems]
    if problems:
        raise ConfigError(problems)
    return config


def table(manifest: Manifest) -> list[str]:
    """What was written or verified, for people."""
    shape = " x ".join(str(n) for n in manifest.image_shape)
    lines = [f"{'split':<12}{'images':>9}{'files':>7}{'MB':>9}"]
    for name, part in manifest.splits.items():
        megabytes = sum(file.bytes for file in part.files) / 1e6
        lines.append(f"{name:<12}{part.rows:>9}{len(part.files):>7}{megabytes:>9.1f}")
    return [*lines, f"{manifest.name}: {len(manifest.classes)} classes, {shape} pixels, digest {manifest.digest[:16]}"]


def metrics(manifest: Manifest) -> dict[str, float]:
    files = [file for part in manifest.splits.values() for file in part.files]
    counts = {f"{name}_images": part.rows for name, part in manifest.splits.items()}
    return {**counts, "classes": len(manifest.classes), "files": len(files), "bytes": sum(file.bytes for file in files)}


def _within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.expanduser().resolve())


def _location(out: str) -> Location:
    from jem.files import Location

    try:
        return Location.of(out)
    except ValueError as error:
        raise ConfigError([Problem("OUT", str(error))]) from error
