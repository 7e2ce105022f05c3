"""The rows of one Parquet file: images as Arrow tensors, labels as integers, pages with checksums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from jem.data.manifest import Manifest
from jem.errors import DataError
from jem.files import Location

REMEDY = "copy the file again, or write the data set again with jobs/prepare.py"
UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)
"""What pyarrow raises for a damaged file."""


def write_rows(sink: Any, images: Tensor, labels: Tensor, group: int) -> None:
    schema = schema_of(tuple(images.shape[1:]))
    options = {
        "compression": "zstd",
        "use_dictionary": False,
        "write_statistics": ["label"],
        "write_page_checksum": True,
    }
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for start in range(0, len(labels), group):
            pixels = pa.array(images[start : start + group].contiguous().numpy().reshape(-1))
            storage = pa.FixedSizeListArray.from_arrays(pixels, int(np.prod(images.shape[1:])))
            column = pa.ExtensionArray.from_storage(schema.field("image").type, storage)
            chunk = pa.table([column, labels[start : start + group].numpy()], schema=schema)
            writer.write_table(chunk, row_group_size=group)


def schema_of(shape: tuple[int, ...]) -> Any:
    tensor = pa.fixed_shape_tensor(pa.uint8(), shape)
    return pa.schema([pa.field("image", tensor, nullable=False), pa.field("label", pa.int64(), nullable=False)])


def open_file(file: Location) -> Any:
    if file.is_local:
        return pq.ParquetFile(file.path, memory_map=True, page_checksum_verification=True)
    return pq.ParquetFile(file.path, filesystem=file.fs, page_checksum_verification=True)


def row_groups(where: Location, manifest: Manifest) -> Iterator[tuple[Tensor, Tensor]]:
    with _reading(where) as file:
        for number in range(file.num_row_groups):
            yield _row_group(file, number, where, manifest)


def read_group(where: Location, number: int, manifest: Manifest) -> tuple[Tensor, Tensor]:
    """One row group: uint8 [n, c, h, w], int64 [n]."""
    with _reading(where) as file:
        return _row_group(file, number, where, manifest)


def group_sizes(where: Location) -> list[int]:
    """Rows of each row group, as the footer tells."""
    with _reading(where) as file:
        return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]


def read_labels(where: Location, manifest: Manifest) -> Tensor:
    """The labels of a file, int64 [n]; no image is read."""
    with _reading(where) as file:
        labels = file.read(columns=["label"], use_threads=False).column("label").to_numpy()
    return _checked_labels(labels, f"{where.uri}", manifest)


@contextmanager
def _reading(where: Location) -> Iterator[Any]:
    try:
        with open_file(where) as file:
            yield file
    except UNREADABLE as error:
        raise DataError(f"{where.uri}: cannot be read: {error}; {REMEDY}") from error


def _row_group(file: Any, number: int, where: Location, manifest: Manifest) -> tuple[Tensor, Tensor]:
    place = f"{where.uri}, row group {number}"
    try:
        table = file.read_row_group(number, columns=["image", "label"], use_threads=False).combine_chunks()
        image, label = table.column("image").chunk(0), table.column("label").chunk(0)
        pixels = image.storage.flatten().to_numpy(zero_copy_only=True).reshape(-1, *manifest.image_shape)
        labels = label.to_numpy(zero_copy_only=True)
        if len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} images and {len(labels)} labels")
    except (*UNREADABLE, IndexError) as error:
        raise DataError(f"{place}: is damaged: {error}; {REMEDY}") from error
    return torch.from_numpy(pixels.copy()), _checked_labels(labels, place, manifest)


def _checked_labels(labels: Any, place: str, manifest: Manifest) -> Tensor:
    top = len(manifest.classes) - 1
    bad = np.flatnonzero((labels < 0) | (labels > top))
    if len(bad):
        row = int(bad[0])
        raise DataError(f"{place}, row {row}: label {labels[row]} is out of range, must be 0 to {top}; {REMEDY}")
    return torch.from_numpy(labels.copy())
