"""`manifest.json` of a Parquet data set: what belongs to it and what it must look like. Imports no torch.

It is written last, so that a directory with a manifest is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from jem.config import DataConfig
from jem.data.catalog import SPLITS
from jem.errors import ConfigError, DataError, Problem
from jem.files import Location

NAME = "manifest.json"
FORMAT = "jem-images"
SCHEMA = 1


@dataclass(frozen=True)
class PartFile:
    """One Parquet file: `bytes` and `sha256` are the file's."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """One split; `digest` is `Split.digest`."""

    rows: int
    digest: str
    files: tuple[PartFile, ...]


@dataclass(frozen=True)
class Manifest:
    name: str
    source: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    splits: dict[str, Part]
    digest: str


def file_name(split: str, number: int, count: int) -> str:
    return f"{split}-{number:05d}-of-{count:05d}.parquet"


def location_of(config: DataConfig) -> Location:
    """The place that `data.root` means for data.name=parquet."""
    try:
        return Location.of(config.root or "")
    except ValueError as error:
        raise ConfigError([Problem("data.root", str(error))]) from error


def dump(manifest: Manifest) -> bytes:
    """The file's bytes. The text carries its own checksum and is the only spelling of its content."""
    body = {"format": FORMAT, "schema": SCHEMA, **dataclasses.asdict(manifest)}
    return _spell({**body, "checksum": _checksum(body)})


def read(location: Location) -> Manifest:
    """The manifest of the data set at `location`; DataError if there is none that can be trusted."""
    where = location / NAME
    if not where.exists():
        what = "is missing: this is no finished Parquet data set"
        raise DataError(f"{where.uri}: {what}; data.root must name the OUT of: python jobs/prepare.py SOURCE OUT")
    raw = where.read()
    try:
        body = json.loads(raw)
        if body.get("format") != FORMAT:
            raise DataError(f"{where.uri}: is no manifest of images (format {body.get('format')!r}, not {FORMAT!r})")
        if body.get("schema") != SCHEMA:
            known = f"this version reads schema {SCHEMA}"
            raise DataError(f"{where.uri}: has schema {body.get('schema')!r}, {known}; write the data set again")
        checksum = body.pop("checksum", None)
        if checksum != _checksum(body) or raw != _spell({**body, "checksum": checksum}):
            raise ValueError("its checksum does not match")
        return _parse(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where.uri}: is damaged: {error}; copy it again or write the data set again") from error


def _parse(body: dict[str, Any]) -> Manifest:
    splits = {
        name: Part(part["rows"], part["digest"], tuple(PartFile(**file) for file in part["files"]))
        for name, part in ((name, body["splits"][name]) for name in SPLITS)
    }
    c, h, w = body["image_shape"]
    return Manifest(body["name"], body["source"], tuple(body["classes"]), (c, h, w), splits, body["digest"])


def _spell(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1) + "\n").encode()


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
