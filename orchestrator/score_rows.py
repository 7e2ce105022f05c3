"""One unit: read, scored, written. In memory is a chunk of rows and what Arrow holds of its row group, no file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jem.data.rows import UNREADABLE
from jem.errors import DataError
from jem.files import Location
from jem.predict import BATCH, Card, Predictions, Predictor
from orchestrator import score_folder
from orchestrator.score_files import KEY, Totals
from orchestrator.score_folder import Images
from orchestrator.score_images import to_pixels
from orchestrator.score_units import Columns, Unit, is_text, open_parquet

CHUNK_BYTES, CHUNK_BATCHES = 2**24, 40
"""How much is read and scored at once, at most."""


@dataclass(frozen=True)
class Work:
    """What a worker needs to know besides the model and the unit."""

    root: Location
    out: Location
    columns: Columns
    classes: tuple[str, ...] | None  # that labels mean which are numbers; none: the model's
    identity: dict[str, Any]
    images: Images = score_folder.NONE  # where these are the data


class Part(NamedTuple):
    """What is read and scored at once."""

    images: np.ndarray  # uint8 [n, c, h, w]
    file: Any  # where each image is from, of text, and
    row: np.ndarray  # there; 0 of an image file
    labels: Any  # the column of right classes, of text or int64; None if there is none
    kept: Any  # a table of the columns to be written as they are


def score_unit(predictor: Predictor, work: Work, unit: Unit) -> None:
    """Read, score, write. Raises DataError that names file and row of an image that cannot be scored."""
    card, totals = predictor.card, Totals()
    size = BATCH * min(CHUNK_BATCHES, max(1, CHUNK_BYTES // (BATCH * math.prod(card.image_shape))))
    sink = pa.BufferOutputStream()
    writer = None
    for part in (_image_files if work.images else _rows)(work, unit, card, size):
        predictions = predictor(part.images.transpose(0, 2, 3, 1) if card.layout == "NHWC" else part.images)
        totals.add(predictions, _truth(part.labels, card.classes), len(card.classes))
        table = _table(predictions, part)
        if writer is None:
            writer = pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table)
    assert writer is not None, "a unit is never empty"
    content = work.identity | {"unit": asdict(unit), "totals": asdict(totals)}
    writer.add_key_value_metadata({KEY: json.dumps(content).encode()})
    writer.close()
    (work.out / unit.name).write(sink.getvalue())


def _rows(work: Work, unit: Unit, card: Card, size: int) -> Iterator[Part]:
    row = unit.start
    for chunk in chunks_of(work.root, unit, work.columns, size):
        images, n = _pixels(chunk, work, unit, card, row), chunk.num_rows
        kept = chunk.select(list(work.columns.keep))
        file = pa.array([unit.file] * n, pa.string())
        try:
            labels = _labels(chunk, work.columns)
        except pa.ArrowInvalid as error:
            raise DataError(f"{(work.root / unit.file).uri}: column {work.columns.label}: {error}") from error
        if labels is not None and work.classes not in (None, card.classes) and not is_text(labels.type):
            labels = _named(labels, work.classes or ())
        yield Part(images, file, np.arange(row, row + n), labels, kept)
        row += n


def _image_files(work: Work, unit: Unit, card: Card, size: int) -> Iterator[Part]:
    for start in range(unit.start, unit.start + unit.rows, size):
        stop = min(start + size, unit.start + unit.rows)
        names = work.images.names[start:stop]
        images = score_folder.read(work.root, work.images, start, stop, card.image_shape)
        labels = score_folder.labels_of(names, card.classes) if work.columns.label else None
        yield Part(images, pa.array(names, pa.string()), np.zeros(len(names), np.int64), labels, pa.table({}))


def chunks_of(root: Location, unit: Unit, columns: Columns, size: int) -> Iterator[Any]:
    """The unit's rows as Arrow tables of `size` rows, the last one shorter; Arrow may hold a whole row group."""
    where = f"{(root / unit.file).uri}, rows {unit.start} to {unit.start + unit.rows - 1}"
    held: list[Any] = []
    seen = filled = 0
    try:
        for batch in _wanted(root, unit, columns, size):
            while batch.num_rows:
                held.append(batch.slice(0, size - filled))
                filled += held[-1].num_rows
                seen += held[-1].num_rows
                batch = batch.slice(held[-1].num_rows)
                if filled == size:
                    yield pa.Table.from_batches(held)
                    held, filled = [], 0
    except UNREADABLE as error:
        raise DataError(f"{where}: cannot be read: {error}; copy or write the file again") from error
    if seen != unit.rows:
        raise DataError(f"{where}: holds {seen} rows there; it was changed while it was scored")
    if held:
        yield pa.Table.from_batches(held)


def _wanted(root: Location, unit: Unit, columns: Columns, size: int) -> Iterator[Any]:
    """Record batches of the unit's rows, of any lengths."""
    file = root / unit.file
    if file.size() != unit.bytes:
        raise OSError(f"has {file.size()} bytes, had {unit.bytes} when scoring began")
    skip, left = unit.skip, unit.rows
    with open_parquet(file) as opened:
        groups, names = range(unit.first, unit.stop), columns.names
        for batch in opened.iter_batches(size, row_groups=groups, columns=names, use_threads=False):
            part = batch.slice(skip, left) if skip < batch.num_rows else batch.slice(0, 0)
            skip = max(0, skip - batch.num_rows)
            left -= part.num_rows
            yield part
            if not left:
                return


def _pixels(chunk: Any, work: Work, unit: Unit, card: Card, row: int) -> np.ndarray:
    parts, uri = [], (work.root / unit.file).uri
    for part in chunk.column(work.columns.image).chunks:

        def place(i: int, before: int = row) -> str:
            return f"{uri}, row {before + i}"

        parts.append(to_pixels(part, card.image_shape, place))
        row += len(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _labels(chunk: Any, columns: Columns) -> Any:
    """The column of right classes, of text or int64; None if there is none."""
    if columns.label is None:
        return None
    labels = _plain(chunk.column(columns.label))
    return labels if is_text(labels.type) else labels.cast(pa.int64())


def _named(labels: Any, classes: tuple[str, ...]) -> Any:
    """The names of the classes that numbers mean: null for a number that is no class's."""
    known = pc.and_(pc.greater_equal(labels, 0), pc.less(labels, len(classes)))
    return pc.take(pa.array(classes, pa.string()), pc.if_else(known, labels, None))


def _truth(labels: Any, classes: tuple[str, ...]) -> np.ndarray | None:
    """The right classes' numbers, -1 where it is none of the model's; None if that is not known."""
    if labels is None:
        return None
    if is_text(labels.type):
        labels = pc.index_in(labels.cast(pa.string()), pa.array(classes, pa.string())).cast(pa.int64())
    return np.asarray(pc.fill_null(labels, -1).to_numpy())


def _plain(column: Any) -> Any:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _table(p: Predictions, part: Part) -> Any:
    n, classes = p.probabilities.shape
    offsets = np.arange(0, (n + 1) * classes, classes, dtype=np.int32)
    flat = pa.array(p.probabilities.astype(np.float32).reshape(-1))
    columns: dict[str, Any] = {
        "file": part.file,
        "row": pa.array(part.row),
        "label": pa.array(p.label, pa.string()),
        "index": pa.array(p.index.astype(np.int32)),
        "probability": pa.array(p.probability),
        "probabilities": pa.ListArray.from_arrays(pa.array(offsets), flat),
        "log_density": pa.array(p.log_density),
        "in_distribution": pa.array(p.in_distribution),
    }
    if part.labels is not None:
        columns["true_label"] = part.labels
    return pa.table(columns | {name: _plain(part.kept.column(name)) for name in part.kept.column_names})
