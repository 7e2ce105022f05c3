"""Image files as data to be scored: an image a row, decoded as data.name=imagefolder does for training.

A folder laid out as for training, CLASS/* or SPLIT/CLASS/*, says what its images are; any other does as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jem.data.folder import SPLIT_NAMES
from jem.data.image_files import decode, is_image, refuse_others
from jem.errors import ConfigError, DataError, Problem
from jem.files import Location

IMAGES_PER_UNIT = 1_000
"""At most: photographs take milliseconds each to decode, so that a folder of them is shared among the workers."""

READERS = 16
"""Files looked at at once: on an object store each takes a few requests."""

SAMPLE_BYTES = 2**15


@dataclass(frozen=True)
class Images:
    """Image files, sorted by name, which is relative to the folder that is scored."""

    names: tuple[str, ...]
    known: tuple[str, ...]  # of each what tells it from another image of that name

    def __bool__(self) -> bool:
        return bool(self.names)


NONE = Images((), ())


def look(root: Path, paths: Sequence[Path]) -> Images:
    """The image files among `paths`. Raises DataError for those that are no data: of other kinds, links to nowhere."""
    refuse_others(paths)
    files = [path for path in paths if is_image(path)]
    names = [path.relative_to(root).as_posix() for path in files]
    for name in names:
        shown = name.encode(errors="backslashreplace").decode()
        if shown != name:
            raise DataError(f"{root}: the name of {shown} is no UTF-8; rename it")
    with ThreadPoolExecutor(READERS) as pool:
        known = list(pool.map(fingerprint, files))
    listed = sorted(zip(names, known, strict=True))
    return Images(tuple(name for name, _ in listed), tuple(each for _, each in listed))


def fingerprint(path: Path) -> str:
    """Size and a digest of both ends: the same for a copy, whenever it was made."""
    try:
        with path.open("rb") as file:
            sha = hashlib.sha256(file.read(SAMPLE_BYTES))
            size = file.seek(0, 2)
            file.seek(max(SAMPLE_BYTES, size - SAMPLE_BYTES))
            sha.update(file.read())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; replace or delete the file") from error
    return f"{size}:{sha.hexdigest()[:16]}"


def check(root: Location, column: str, keep: Sequence[str], label: str | None, shape: tuple[int, int, int]) -> None:
    """Refuse what makes no sense for image files: settings about columns, models of other shapes."""
    given: list[tuple[str, Any]] = []
    if column != "image":
        given.append(("column", column))
    if label not in ("label", None):
        given.append(("label", label))
    if keep:
        given.append(("keep", list(keep)))
    problems = [Problem(key, f"is {value!r}, but {root.uri} holds image files, no columns") for key, value in given]
    c, h, w = shape
    if h != w or c not in (1, 3):
        what = f"image files become squares, grey or RGB, but the model takes {c} channels of {h} x {w}; give Parquet"
        problems.append(Problem("DATA", f"{root.uri}: {what}"))
    if problems:
        raise ConfigError(problems)


def cuts(images: Images, rows_per_unit: int) -> Iterator[tuple[Any, ...]]:
    """Units' fields after their number and count."""
    size = min(rows_per_unit, IMAGES_PER_UNIT)
    for start in range(0, len(images.names), size):
        names, known = images.names[start : start + size], images.known[start : start + size]
        sample = hashlib.sha256(json.dumps([names, known]).encode()).hexdigest()
        yield names[0], sum(int(each.partition(":")[0]) for each in known), sample, 0, 0, 0, start, len(names)


def class_of(name: str, classes: Sequence[str]) -> str | None:
    """The class that a file's folder is called as: the first below what is scored, or below a split's.

    Names of classes may have slashes; the longest one counts. Folders of any other layout mean nothing: 2024/5 is no 5.
    """
    parts = name.split("/")[:-1]
    if parts and parts[0].lower() in SPLIT_NAMES and parts[0] not in classes:
        parts = parts[1:]
    found = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((each for each in found if each in classes), None)


def labels_of(names: Sequence[str], classes: Sequence[str]) -> Any:
    return pa.array([class_of(name, classes) for name in names], pa.string())


def read(root: Location, images: Images, start: int, stop: int, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [n, c, h, w] of some of the images. Raises DataError that names files that cannot be read, or changed."""
    files = [root.local / name for name in images.names[start:stop]]
    try:
        pixels = decode(files, shape[1], shape[0]).numpy()
    except DataError as error:
        raise DataError(
            f"{error}\nreplaced, they go on from here; without them these are other data, for another OUT"
        ) from error
    for path, known in zip(files, images.known[start:stop], strict=True):
        if fingerprint(path) != known:
            raise DataError(f"{path}: was changed while it was scored; the same command scores what is there now")
    return pixels
