"""Write any source as a checked Parquet data set, or check one again. Torch is imported once it is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jem.config import DATA_SOURCES, DataConfig
from jem.errors import ConfigError, JEMError, Problem
from jem.settings import Entry, build

if TYPE_CHECKING:
    from jem.data.manifest import Manifest
    from jem.files import Location

Say = Callable[[str], None]


def command(source: str | None, out: str, changes: Iterable[str], say: Say) -> tuple[int, dict[str, Any]]:
    """Prepare `source`, or verify `out` when there is none; (exit code, what the command's last line says)."""
    result: dict[str, Any] = {"run_id": None, "name": None, "checkpoint": None, "step": None, "metrics": {}}
    result |= {"status": "done", "data": out}
    try:
        location = _location(out)
        result["data"] = location.uri
        manifest = verify(location, say) if source is None else prepare(data_config(source, changes), location, say)
    except JEMError as error:
        say(f"error: {error}")
        return error.exit_code, result | {"status": error.status}
    except OSError as error:  # a full disk, a store that refuses: for the user to mend, so no traceback
        say(f"error: {out}: {error}")
        return 1, result | {"status": "failed"}
    for line in table(manifest):
        say(line)
    return 0, result | {"name": manifest.name, "metrics": metrics(manifest)}


def prepare(config: DataConfig, location: Location, say: Say) -> Manifest:
    """Load the whole source, check it, write it; nothing stays at `location` if that fails."""
    from jem.data import parquet
    from jem.data.catalog import describe
    from jem.data.sources import load

    parquet.refuse_unless_empty(location)
    where = describe(config).where
    say(f"reading {config.name}: {where}")
    return parquet.write(load(config), location, source=f"{config.name}: {where}", progress=say)


def verify(location: Location, say: Say) -> Manifest:
    """Compare every byte at `location` with what was written."""
    from jem.data import parquet

    return parquet.verify(location, say)


def data_config(source: str, changes: Iterable[str]) -> DataConfig:
    """SOURCE, a source's name or an image folder's path, and KEY=VALUE settings with or without `data.`."""
    entries = {"name": Entry(source, "SOURCE", source)}
    if source not in DATA_SOURCES and (os.sep in source or Path(source).is_dir()):
        entries = {"name": Entry("imagefolder"), "root": Entry(source, "SOURCE", source)}
    problems = []
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            problems.append(Problem("", f"{change!r} is not KEY=VALUE, such as image_size=32", "command line"))
            continue
        try:
            entries[key.removeprefix("data.")] = Entry(yaml.safe_load(text), "command line", text)
        except yaml.YAMLError:
            problems.append(Problem(key, f"{text!r} cannot be read as a value", "command line"))
    if problems:
        raise ConfigError(problems)
    try:
        return build(DataConfig, entries)
    except ConfigError as error:
        named = [Problem(f"data.{p.key}" if p.key else "", p.message, p.origin) for p in error.problems]
        raise ConfigError(named) from error


def table(manifest: Manifest) -> list[str]:
    """What was written or verified, for people."""
    shape = " x ".join(str(n) for n in manifest.image_shape)
    lines = [f"{'split':<12}{'images':>9}{'files':>7}{'MB':>9}"]
    for name, part in manifest.splits.items():
        megabytes = sum(file.bytes for file in part.files) / 1e6
        lines.append(f"{name:<12}{part.rows:>9}{len(part.files):>7}{megabytes:>9.1f}")
    return [*lines, f"{manifest.name}: {len(manifest.classes)} classes, {shape} pixels, digest {manifest.digest[:16]}"]


def metrics(manifest: Manifest) -> dict[str, int]:
    files = [file for part in manifest.splits.values() for file in part.files]
    counts = {f"{name}_images": part.rows for name, part in manifest.splits.items()}
    return {**counts, "classes": len(manifest.classes), "files": len(files), "bytes": sum(file.bytes for file in files)}


def _location(out: str) -> Location:
    from jem.files import Location

    try:
        return Location.of(out)
    except ValueError as error:
        raise ConfigError([Problem("OUT", str(error))]) from error
