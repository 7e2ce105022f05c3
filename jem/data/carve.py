"""Which of a source's images belong to which split.

Membership is decided by a hash of an image's position in its source, never by a random generator: the same
images are in the same split for every seed, on every machine, with every version of torch and numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jem.data.catalog import SPLITS, validation_count
from jem.data.splits import DataSet, Split, Undecoded, complete
from jem.errors import ConfigError, DataError, Problem

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Pool:
    """Labelled images that are decoded when asked for: `decode(indices)` -> uint8 [k, c, h, w]."""

    labels: Indices
    decode: Callable[[Indices], Tensor]

    @classmethod
    def of(cls, images: Tensor, labels: Any) -> Pool:
        """From images in memory, [n, c, h, w]; all of them together are handed on without a copy."""
        array = np.asarray(labels, dtype=np.int64).reshape(-1)
        return cls(array, lambda rows: images if len(rows) == len(images) else images[torch.from_numpy(rows)])


@dataclass(frozen=True)
class Source:
    """What a source offers: `pools` opens "train" and, where the source has them, "validation" and "test"."""

    classes: tuple[str, ...]
    pools: Mapping[str, Callable[[], Pool]]
    test_size: int | None = None  # carved from train where there is no test pool; None: 20 %
    by_class: bool = False  # images lie class by class


def assemble(
    name: str, source: Source, validation_size: int | None, wanted: tuple[str, ...] = SPLITS, in_memory: bool = True
) -> DataSet:
    """Carve the splits that the source lacks, decode those wanted; unless `in_memory`, later and piece by piece.

    Training images that lie class by class are brought out of that order: written so and streamed, a window or a part
    must hold all classes.
    """
    rows: dict[str, tuple[Pool, Indices]] = {}
    for split in wanted:
        if split in source.pools and split != "train":
            pool = source.pools[split]()
            rows[split] = pool, np.arange(len(pool.labels))
    if set(wanted) - set(rows):
        train = source.pools["train"]()
        for split, indices in partition(train.labels, source, validation_size).items():
            apart = split == "train" and source.by_class
            rows[split] = train, _lowest(indices, len(indices), "order") if apart else indices
    make = _decoded if in_memory else _undecoded
    made = {split: make(*of_split) for split, of_split in rows.items() if split in wanted}
    return complete(name, made, source.classes)


def _decoded(pool: Pool, indices: Indices) -> Split:
    return Split(pool.decode(indices), torch.from_numpy(pool.labels[indices]))


def _undecoded(pool: Pool, indices: Indices) -> Split:
    """Its first image is decoded, for the shape."""
    empty = pool.decode(indices[:1])[:0]
    return Undecoded(empty, torch.from_numpy(pool.labels[indices]), lambda rows: pool.decode(indices[rows]))


def partition(labels: Indices, source: Source, validation_size: int | None) -> dict[str, Indices]:
    """Split the training pool into train and what the source lacks; disjoint rows of the pool, ascending."""
    kept, parts = np.arange(len(labels)), {}
    if "test" not in source.pools:
        size = len(kept) // 5 if source.test_size is None else source.test_size
        kept, parts["test"] = carve(labels, kept, size, "test")
    if "validation" not in source.pools:
        size = validation_count(len(kept), validation_size)
        kept, parts["validation"] = carve(labels, kept, size, "validation")
    return {"train": kept, **parts}


def carve(labels: Indices, rows: Indices, size: int, purpose: str) -> tuple[Indices, Indices]:
    """Take `size` of `rows`, every class in proportion, those whose hash is lowest; returns (rest, taken).

    `labels` are those of the whole pool. At least one image of each class is left.
    """
    classes, counts = np.unique(labels[rows], return_counts=True)
    if not 0 < size <= len(rows) - len(classes):
        raise _impossible(size, len(rows), len(classes), purpose)
    exact = size * counts / len(rows)
    quota = np.floor(exact).astype(np.int64)
    order = sorted(range(len(classes)), key=lambda i: (quota[i] - exact[i], i))  # largest remainder first
    while left := size - int(quota.sum()):
        for i in [i for i in order if quota[i] < counts[i] - 1][:left]:
            quota[i] += 1
    taken = [_lowest(rows[labels[rows] == c], int(q), purpose) for c, q in zip(classes, quota, strict=True)]
    chosen = np.sort(np.concatenate(taken))
    return np.setdiff1d(rows, chosen), chosen


def _lowest(rows: Indices, count: int, purpose: str) -> Indices:
    keys = [hashlib.sha256(f"jem {purpose} {row}".encode()).digest() for row in rows.tolist()]
    order = sorted(range(len(rows)), key=keys.__getitem__)[:count]
    return rows[np.asarray(order, dtype=np.int64)]


def _impossible(size: int, n: int, n_classes: int, purpose: str) -> ConfigError | DataError:
    most = n - n_classes
    if most < 1 or purpose != "validation":
        few = f"{n} images of {n_classes} classes are too few to carve a {purpose} split of {size} from"
        return DataError(f"{few}: each class must keep an image for training; give more images, or the split itself")
    why = f"it is carved from {n} images, of which each of {n_classes} classes must keep one"
    return ConfigError([Problem("data.validation_size", f"is {size}, must be 1 to {most}: {why}")])
