"""Fashion-MNIST from Debian's package: gzipped idx files whose compression differs from the originals'.

torchvision compares the .gz files' md5 with the originals' and so refuses these; the images inside are the same.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jem.data.carve import Pool, Source
from jem.errors import DataError

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
UINT8 = 0x08


def fashion_mnist(folder: Path) -> Source:
    """The source whose four .gz files are in `folder`."""
    return Source(FASHION_CLASSES, {"train": partial(_pool, folder, "train"), "test": partial(_pool, folder, "t10k")})


def read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The array in a gzipped idx file: two zero bytes, type, rank, big-endian 32-bit sizes, then the values."""
    try:
        with gzip.open(path) as stream:
            raw = stream.read()
        zeros, kind, rank = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{rank}I", raw, 4)
        if zeros or kind != UINT8:
            raise ValueError("this is no idx file of bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        remedy = "install the package dataset-fashion-mnist again"
        raise DataError(f"{path}: cannot be read: {error}; {remedy}") from error


def _pool(folder: Path, part: str) -> Pool:
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return Pool.of(torch.from_numpy(images[:, None].copy()), labels)
