"""A Parquet column of images, in any of the ways that people write them, as uint8 [n, c, h, w].

    tensors         Arrow FixedShapeTensor of uint8 [c, h, w]: what jobs/prepare.py writes
    lists           lists of lists of lists of integers, [c, h, w]; [h, w] does for one channel
    encoded images  the bytes of a PNG or JPEG, or a struct with a field `bytes` (Hugging Face datasets)

Nothing is resized or converted: what is not of the model's shape is an error that names the row.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from jem.data.image_files import wide
from jem.data.upright import orientation, upright
from jem.errors import DataError

Place = Callable[[int], str]
"""Where the i-th image of a chunk is from, for messages."""

MODES = {1: "L", 3: "RGB"}
"""Channels -> Pillow's name for such an image."""

FORMATS = ("PNG", "JPEG")


def expected(shape: tuple[int, int, int]) -> str:
    """In words, what a column must hold."""
    c, h, w = shape
    kind = {1: "one 8-bit grey channel", 3: "8-bit RGB"}.get(c, f"{c} channels")
    return f"uint8 [{c}, {h}, {w}] as tensors or lists, or PNG or JPEG of {w} x {h} pixels, {kind}"


def problem_of(column: Any, shape: tuple[int, int, int]) -> str | None:
    """What is wrong with a column's type, if that can be told without reading it."""
    kind = column
    if isinstance(kind, pa.FixedShapeTensorType):
        stored = kind.value_type == pa.uint8() and tuple(kind.shape) == shape
        plain = kind.permutation is None or list(kind.permutation) == sorted(kind.permutation)
        return None if stored and plain else f"holds tensors of {kind.value_type} {list(kind.shape)}"
    if _is_encoded(kind):
        return None
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth and pa.types.is_integer(kind) and (depth == 3 or (depth == 2 and shape[0] == 1)):
        return None
    return f"holds {column}"


def to_pixels(column: Any, shape: tuple[int, int, int], place: Place) -> np.ndarray:
    """uint8 [n, c, h, w] of an Arrow array whose type has no `problem_of`. Raises DataError naming a bad row."""
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{place(row)}: has no image (null); expected {expected(shape)}")
    if isinstance(column.type, pa.FixedShapeTensorType):
        return _from_lists(column.storage, (math.prod(shape),), shape, place)
    if _is_encoded(column.type):
        return _decode(column, shape, place)
    flat = shape if _is_list(column.type.value_type) and _is_list(column.type.value_type.value_type) else shape[1:]
    return _from_lists(column, flat, shape, place)


def _from_lists(column: Any, lengths: tuple[int, ...], shape: tuple[int, int, int], place: Place) -> np.ndarray:
    """Peel one level of lists after the other, each of which must have its length everywhere."""
    n, inner, each = len(column), column, 1
    for depth, length in enumerate(lengths):
        if pa.types.is_fixed_size_list(inner.type):
            found = np.full(len(inner), inner.type.list_size)
        else:
            found = np.diff(inner.offsets.to_numpy())
        wrong = np.flatnonzero(found != length)
        if len(wrong):
            what = f"a list of {found[wrong[0]]} at depth {depth + 1}, where {length} belong"
            raise DataError(f"{place(int(wrong[0]) // each)}: holds {what}; expected {expected(shape)}")
        inner, each = inner.flatten(), each * length
        if inner.null_count:
            row = int(np.flatnonzero(inner.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"{place(row // each)}: holds a null; expected {expected(shape)}")
    values = inner.to_numpy(zero_copy_only=False)
    if values.dtype != np.uint8:
        wrong = np.flatnonzero((values < 0) | (values > 255))
        if len(wrong):
            raise DataError(f"{place(int(wrong[0]) // each)}: holds {values[wrong[0]]}; expected {expected(shape)}")
    return np.asarray(values.astype(np.uint8, copy=False).reshape(n, *shape))


def _decode(column: Any, shape: tuple[int, int, int], place: Place) -> np.ndarray:
    if pa.types.is_struct(column.type):
        column = column.field("bytes")
    pixels = np.empty((len(column), *shape), np.uint8)
    for row, encoded in enumerate(column):
        try:
            pixels[row] = _decoded(encoded.as_py(), shape)
        except ValueError as error:
            raise DataError(f"{place(row)}: {error}; expected {expected(shape)}") from error
    return pixels


def _decoded(encoded: bytes | None, shape: tuple[int, int, int]) -> np.ndarray:
    """One image, [c, h, w]; ValueError that says what it is instead."""
    from PIL import Image

    if encoded is None:
        raise ValueError("has no image bytes (a file's path alone cannot be scored)")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            across = (shape[2], shape[1])
            found = f"a {image.format} of {image.width} x {image.height} pixels, mode {image.mode}"
            if image.size not in (across, across[::-1]) or image.mode != MODES.get(shape[0]):
                raise ValueError(f"holds {found}")  # before it is decoded: a small file can claim to be huge
            if numbers := wide(image):  # also before: of a PNG the orientation is found by decoding it
                raise ValueError(f"holds a {image.format} that has {numbers}")
            turned = orientation(image) >= 5  # a quarter, in either direction
            if image.size != (across[::-1] if turned else across):
                raise ValueError(f"holds {found}")
            array = np.asarray(upright(image))  # as training data are read
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = re.sub(r" <_io\.BytesIO.*>", "", str(error))
        raise ValueError(f"its bytes are no readable image ({reason})") from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _is_encoded(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_binary(kind.field(at).type)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
