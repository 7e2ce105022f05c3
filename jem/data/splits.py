"""Images in memory: three splits of one data set, checked, with digests that tell whether two are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from jem.data.catalog import SPLITS
from jem.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """`images`: uint8 [n, c, h, w], 0 to 255; `labels`: int64 [n], 0 to n_classes - 1."""

    images: Tensor
    labels: Tensor

    in_memory = True
    """Whether `images` are all there. Where not they are empty, of the right shape."""

    def __len__(self) -> int:
        return len(self.labels)

    def chunks(self) -> Iterator[Tensor]:
        """All images in order, in pieces of any size."""
        yield self.images

    def part(self) -> Split:
        """As many of the images as memory surely holds, spread over all."""
        return self

    @cached_property
    def digest(self) -> str:
        """Sha256 of shape, images and labels: equal if and only if the data are."""
        return hash_of((len(self), *self.images.shape[1:]), self.chunks(), self.labels)


CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True, eq=False)
class Undecoded(Split):
    """A split whose images are made when they are asked for: `decode(rows)` -> uint8 [k, c, h, w]."""

    decode: Callable[[slice], Tensor]

    in_memory = False

    def chunks(self) -> Iterator[Tensor]:
        size = max(1, CHUNK_BYTES // self.images.shape[1:].numel())
        return (self.decode(slice(row, min(row + size, len(self)))) for row in range(0, len(self), size))


@dataclass(frozen=True, eq=False)
class DataSet:
    """Three disjoint splits of one source. A split that was not asked for is empty."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def splits(self) -> dict[str, Split]:
        return {name: getattr(self, name) for name in SPLITS}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        c, h, w = self.train.images.shape[1:]
        return c, h, w

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def digest(self) -> str:
        """Sha256 of the three splits' digests."""
        return combined_digest({name: split.digest for name, split in self.splits.items()})


def complete(name: str, made: Mapping[str, Split], classes: tuple[str, ...]) -> DataSet:
    """A `DataSet` in which the splits that were not made are empty."""
    some = next(iter(made.values()))
    empty = Split(some.images[:0], some.labels[:0])
    train, validation, test = (made.get(split, empty) for split in SPLITS)
    return DataSet(name, train, validation, test, classes)


def check(dataset: DataSet, origin: str, wanted: tuple[str, ...] = SPLITS) -> DataSet:
    """Every data set passes through here, wherever it is from; raises DataError naming `origin`."""
    if len(set(dataset.classes)) < dataset.n_classes:
        twice = [name for name in dataset.classes if dataset.classes.count(name) > 1]
        raise DataError(f"{origin}: two classes are called {twice[0]!r}; give each its own name")
    for name, split in dataset.splits.items():
        where = f"{origin}: split {name}"
        images, labels = split.images, split.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            found = f"{images.dtype} of shape {list(images.shape)}"
            raise DataError(f"{where}: images are {found}, must be torch.uint8 of shape [n, channels, height, width]")
        if labels.dtype != torch.int64 or (split.in_memory and labels.shape != images.shape[:1]):
            found = f"{labels.dtype} of shape {list(labels.shape)}"
            raise DataError(f"{where}: labels are {found}, must be torch.int64 of shape [{len(images)}], one an image")
        if name in wanted and not len(split):
            raise DataError(f"{where}: is empty; each of {', '.join(wanted)} needs at least one image")
        if images.shape[1:] != dataset.train.images.shape[1:]:
            ours, first = list(images.shape[1:]), list(dataset.train.images.shape[1:])
            raise DataError(f"{where}: images are {ours}, those of train {first}; all must have one shape")
        bad = ((labels < 0) | (labels >= dataset.n_classes)).nonzero()
        if len(bad):
            row, top = int(bad[0]), dataset.n_classes - 1
            raise DataError(f"{where}: row {row}: label {int(labels[row])} is out of range, must be 0 to {top}")
    return dataset


def hash_of(shape: tuple[int, ...], images: Any, labels: Tensor) -> str:
    """Sha256 over shape, then the chunks of `images` (an iterable of uint8 tensors), then labels."""
    sha = hashlib.sha256(repr(tuple(int(n) for n in shape)).encode())
    for chunk in images:
        sha.update(chunk.detach().cpu().contiguous().numpy().data)
    sha.update(labels.detach().cpu().contiguous().numpy().astype("<i8").tobytes())
    return sha.hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(" ".join(digests[name] for name in SPLITS).encode()).hexdigest()
