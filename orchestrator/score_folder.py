"""A folder of image files as data to be scored: an image a row, decoded as data.name=imagefolder does for training.

Images may lie in sub-folders of any depth. One that is called as a class of the model says what its images are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from jem.data.folder import EXTENSIONS, OTHERS, decode
from jem.errors import ConfigError, DataError, Problem
from jem.files import Location

IMAGES_PER_UNIT = 1_000
"""At most: photographs take milliseconds each to decode, so that a folder of them is shared among the workers."""


@dataclass(frozen=True)
class Images:
    """The image files of a folder, sorted by name, which is relative to it."""

    names: tuple[str, ...]
    known: tuple[tuple[int, int], ...]  # (bytes, modified in ns) of each: other numbers are another image


def look(infos: Sequence[Any], root: Location) -> Images | None:
    """The image files among `infos`, what pyarrow says of files below `root`; None if there is none.

    Raises DataError for images of a kind that is not read: leaving them out in silence would leave data out.
    """
    skip = len(root.path.rstrip("/")) + 1
    found = {info.path[skip:]: info for info in infos if info.type == pafs.FileType.File}
    seen = {name: info for name, info in found.items() if not any(p.startswith(".") for p in name.split("/"))}
    names = sorted(name for name in seen if name.lower().endswith(EXTENSIONS))
    unread = sorted(name for name in seen if name.lower().endswith(OTHERS))
    if unread and names:
        raise DataError(f"{(root / unread[0]).uri}: is one of {len(unread)} images that are not read; convert them")
    known = tuple((int(seen[name].size), int(seen[name].mtime_ns or 0)) for name in names)
    return Images(tuple(names), known) if names else None


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
    if not root.is_local:
        problems.append(
            Problem("DATA", f"image files must lie on a disk, not at {root.uri}; copy them, or give Parquet")
        )
    elif h != w or c not in (1, 3):
        what = f"image files become squares, grey or RGB, but the model takes {c} channels of {h} x {w}; give Parquet"
        problems.append(Problem("DATA", f"{root.uri}: {what}"))
    if problems:
        raise ConfigError(problems)


def cuts(images: Images, rows_per_unit: int) -> Iterator[tuple[Any, ...]]:
    """Units' fields after their number and count."""
    size = min(rows_per_unit, IMAGES_PER_UNIT)
    for start in range(0, len(images.names), size):
        names, known = images.names[start : start + size], images.known[start : start + size]
        listed = json.dumps([names, known])
        sample = hashlib.sha256(listed.encode()).hexdigest()
        yield names[0], sum(size for size, _ in known), sample, 0, 0, 0, start, len(names)


def class_of(name: str, classes: Sequence[str]) -> str | None:
    """The innermost folder of a file that is called as a class."""
    return next((part for part in reversed(name.split("/")[:-1]) if part in classes), None)


def read(root: Location, names: Sequence[str], shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [n, c, h, w]. Raises DataError that names the files that cannot be read."""
    return decode([root.local / name for name in names], shape[1], shape[0]).numpy()


def labels_of(names: Sequence[str], classes: Sequence[str]) -> Any:
    return pa.array([class_of(name, classes) for name in names], pa.string())
