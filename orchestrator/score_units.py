"""Units of scoring: at most `rows_per_unit` rows of one Parquet file, or so many image files, in, one file of scores
out. Knows no Ray.

Where units begin and end depends on the data and on `rows_per_unit` alone, and a unit's images are scored in fixed
batches counted from its first row: the scores are the same whoever computes them, however many there are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from jem.data import manifest as manifests
from jem.data.catalog import SPLITS
from jem.data.image_files import walk
from jem.data.manifest import Manifest
from jem.data.rows import UNREADABLE
from jem.errors import ConfigError, DataError, Problem
from jem.files import Location
from orchestrator import score_folder
from orchestrator.score_folder import READERS, Images
from orchestrator.score_images import expected, problem_of

SAMPLES, SAMPLE_BYTES = 4, 2**16


@dataclass(frozen=True)
class Unit:
    """Rows of one file: `rows` of them from `start` on, which are in the row groups `first` to `stop` - 1.

    Or `rows` image files from the `start`-th of a folder on, of which `file` is the first.
    """

    number: int  # from 0
    count: int  # of all units
    file: str  # relative to the data
    bytes: int  # of that file, or of all image files
    sample: str  # sha256 of its Parquet footer and of samples of its bytes; of the image files' names and contents
    first: int
    stop: int
    skip: int  # rows of the row group `first` that belong to the units before
    start: int
    rows: int

    @property
    def name(self) -> str:
        """Of the file with its scores."""
        return f"scores-{self.number:05d}-of-{self.count:05d}.parquet"


class Input(NamedTuple):
    """A Parquet file of the data."""

    name: str
    bytes: int
    sample: str
    groups: tuple[int, ...]  # rows of each row group
    schema: Any


@dataclass(frozen=True)
class Columns:
    """Those that are read."""

    image: str
    label: str | None  # of the right class, written as true_label
    keep: tuple[str, ...]  # written as they are

    @property
    def names(self) -> list[str]:
        return [self.image, *([self.label] if self.label else []), *self.keep]


@dataclass(frozen=True)
class Plan:
    """What is to be scored."""

    root: Location  # units' files are relative to it
    units: tuple[Unit, ...]
    columns: Columns
    classes: tuple[str, ...] | None  # that labels mean which are numbers, where the data say so
    data: dict[str, Any]  # what tells these data from others: digest, files, rows, bytes
    images: Images = score_folder.NONE  # where these are the data

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)


def make_plan(
    data: Location,
    split: str | None,
    columns: Columns,
    rows_per_unit: int,
    shape: tuple[int, int, int],
    classes: Sequence[str] = (),
) -> Plan:
    """Look at all footers and cut units. Raises DataError for files that cannot be scored, before any is read.

    classes: the model's, as which folders of image files may be called.
    """
    root, found, manifest = _files(data, split)
    if isinstance(found, Images):
        return _plan_images(root, found, columns, rows_per_unit, shape, classes)
    with ThreadPoolExecutor(READERS) as pool:
        inputs = list(pool.map(lambda name: _inspect(root, name), found))
    if columns.label == "label" and "label" not in inputs[0].schema.names:
        columns = dataclasses.replace(columns, label=None)
    for one in inputs:
        _check_schema(one, root, columns, shape)
    cuts = [cut for one in inputs for cut in _cut(one, rows_per_unit)]
    if not cuts:
        raise DataError(f"{data.uri}: holds no rows")
    listed = json.dumps([manifest and manifest.classes, manifest and manifest.digest, *(one[:4] for one in inputs)])
    known = _known(listed, len(inputs), sum(one.bytes for one in inputs), cuts)
    return Plan(root, _numbered(cuts), columns, manifest.classes if manifest else None, known)


def _plan_images(
    root: Location,
    images: Images,
    columns: Columns,
    rows_per_unit: int,
    shape: tuple[int, int, int],
    classes: Sequence[str],
) -> Plan:
    score_folder.check(root, columns.image, columns.keep, columns.label, shape)
    if not any(score_folder.class_of(name, classes) for name in images.names):
        columns = dataclasses.replace(columns, label=None)
    cuts = list(score_folder.cuts(images, rows_per_unit))
    known = _known(json.dumps([cut[2] for cut in cuts]), len(images.names), sum(cut[1] for cut in cuts), cuts)
    return Plan(root, _numbered(cuts), columns, None, known, images)


def _numbered(cuts: Sequence[tuple[Any, ...]]) -> tuple[Unit, ...]:
    return tuple(Unit(number, len(cuts), *cut) for number, cut in enumerate(cuts))


def _known(listed: str, files: int, size: int, cuts: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return {"digest": digest, "files": files, "rows": sum(cut[-1] for cut in cuts), "bytes": size}


def open_parquet(file: Location) -> Any:
    """With page checksums compared, and read through a buffer: memory still grows with the row groups, not the file."""
    return pq.ParquetFile(file.path, filesystem=file.fs, buffer_size=2**22, page_checksum_verification=True)


def _files(data: Location, split: str | None) -> tuple[Location, Sequence[str] | Images, Manifest | None]:
    """(What names are relative to, the Parquet files' names or the image files, the manifest of a data set of ours)."""
    if not data.exists():
        raise ConfigError([Problem("DATA", f"{data.uri} does not exist")])
    if data.is_dir() and (data / manifests.NAME).exists():
        manifest = manifests.read(data)
        parts = [manifest.splits[name] for name in ([split] if split else SPLITS)]
        return data, [file.name for part in parts for file in part.files], manifest
    if split:
        raise ConfigError([Problem("split", f"is {split!r}, but {data.uri} has no {manifests.NAME} that knows splits")])
    if not data.is_dir():
        images = score_folder.look(data.parent.local, [data.local]) if data.is_local else score_folder.NONE
        return data.parent, images or [data.name], None
    return data, _listed(data), None


def _listed(folder: Location) -> Sequence[str] | Images:
    """The Parquet files below a folder, else the image files."""
    if folder.is_local:
        paths = list(walk(folder.local))
        names = sorted(path.relative_to(folder.local).as_posix() for path in paths)  # as a store's names are
    else:
        found = folder.fs.get_file_info(pafs.FileSelector(folder.path, recursive=True))
        skip = len(folder.path.rstrip("/")) + 1
        names = sorted(info.path[skip:] for info in found if info.type == pafs.FileType.File)
    chosen = [n for n in names if n.endswith(".parquet") and not any(p.startswith((".", "_")) for p in n.split("/"))]
    if chosen:
        return chosen
    images = score_folder.look(folder.local, paths) if folder.is_local else score_folder.NONE
    if not images:
        there = ", and no image file" if folder.is_local else "; image files are scored where they lie on a disk"
        raise DataError(f"{folder.uri}: holds neither {manifests.NAME} nor any *.parquet{there}")
    return images


def _inspect(root: Location, name: str) -> Input:
    file = root / name
    try:
        size = file.size()
        sample = _sample(file, size)
        with open_parquet(file) as opened:
            groups = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
            return Input(name, size, sample, tuple(groups), opened.schema_arrow)
    except FileNotFoundError as error:
        raise DataError(f"{file.uri}: is missing; copy it again") from error
    except (*UNREADABLE, TypeError) as error:
        raise DataError(f"{file.uri}: is no readable Parquet file: {error}") from error


def _sample(file: Location, size: int) -> str:
    """What tells a file from others of its size, without reading all of it: the footer alone may be the same."""
    sha = hashlib.sha256()
    with file.fs.open_input_file(file.path) as raw:
        raw.seek(max(0, size - 8))
        footer = int.from_bytes(raw.read(4), "little") + 8
        for part in range(SAMPLES):
            raw.seek(max(0, size - SAMPLE_BYTES) * part // (SAMPLES - 1))
            sha.update(raw.read(SAMPLE_BYTES))
        raw.seek(max(0, size - footer))
        sha.update(raw.read())
    return sha.hexdigest()


def _check_schema(one: Input, root: Location, columns: Columns, shape: tuple[int, int, int]) -> None:
    where = (root / one.name).uri
    for key, names in (("column", [columns.image]), ("label", [columns.label]), ("keep", columns.keep)):
        for name in filter(None, names):
            if one.schema.names.count(name) != 1:
                has = ", ".join(one.schema.names)
                hint = "; to score image files give a folder without *.parquet" if key == "column" else ""
                raise ConfigError([Problem(key, f"is {name!r}, but {where} has the columns {has}{hint}")])
    wrong = problem_of(one.schema.field(columns.image).type, shape)
    if wrong:
        raise DataError(f"{where}: column {columns.image} {wrong}; the model takes {expected(shape)}")
    for key, names in (("label", [columns.label]), ("keep", columns.keep)):
        for name in filter(None, names):
            kind = value_type(one.schema.field(name).type)
            label_fits = pa.types.is_integer(kind) or is_text(kind)
            if not (label_fits if key == "label" else is_simple(kind)):
                must = "whole numbers or text" if key == "label" else "of a simple type: numbers, text, dates, bool"
                raise ConfigError([Problem(key, f"is {name!r}, which is {kind} in {where}; must be {must}")])


def value_type(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_simple(kind: Any) -> bool:
    return bool(pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or is_text(kind))


def _cut(one: Input, rows_per_unit: int) -> Iterator[tuple[Any, ...]]:
    """Whole row groups as far as they fit; a row group that is larger on its own is cut itself."""
    first = start = rows = 0
    for group, length in enumerate((*one.groups, 0)):
        last = group == len(one.groups)
        if rows and (last or rows + length > rows_per_unit):
            yield *one[:3], first, group, 0, start, rows
            start, rows = start + rows, 0
        if not rows:
            first = group
        rows += length
        if rows > rows_per_unit:
            for skip in range(0, length, rows_per_unit):
                part = min(rows_per_unit, length - skip)
                yield *one[:3], group, group + 1, skip, start, part
                start += part
            rows = 0
