"""The global batch as a pure function of (seed, step), of which each rank takes its rows.

Every random draw is made for the whole global batch from a generator named by (seed, purpose, step), then
sliced: nothing depends on rank, world size or call order, and there is no loader state to save.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jem.config import DataConfig
from jem.data.augment import crop_and_flip, to_float
from jem.data.splits import Split
from jem.data.stream import Streamed, Windows
from jem.errors import ConfigError, DataError, Problem
from jem.randomness import derive_seed, generator
from jem.world import World

ALONE = World()


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's part of a step's batch; images are on the [-1, 1] scale, augmented, with noise.

    All labelled: `labels` go with `images`, `labelled_*` are None. Semi-supervised: `labels` is None and
    `labelled_*` are this rank's part (maybe empty) of a second batch, drawn from the labelled images.

    `data.augment_p_x=false` (SADA): `images` are as they are stored. All labelled: `labels` go with them, and
    `labelled_*` are the same rows again, augmented. Semi-supervised: the second batch is augmented as ever.
    """

    images: Float[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"] | None
    labelled_images: Float[Tensor, "m c h w"] | None
    labelled_labels: Int64[Tensor, " m"] | None
    n_global: int  # images over all ranks
    n_labelled_global: int  # images with a label over all ranks: those cross-entropy is a mean over
    class_shares: Float[Tensor, " classes"] | None = None  # of all images with a label; none: all alike


@dataclass(frozen=True, eq=False)
class InMemory:
    """All images on the training device: `images` uint8 [total, c, h, w], `labels` int64 [total].

    `rows` (int64 [k], on the CPU) are those that belong to the sequence.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor

    def picked(self, name: str, seed: int, step: int, batch_size: int, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Images of which the batch's `part` takes some; their rows [n], and labels [n]."""
        rows = self.rows[positions(len(self.rows), seed, name, step, batch_size)[part]]
        rows = sent(rows, self.images.device)
        return self.images, rows, self.labels[rows]


@dataclass(frozen=True, eq=False)
class FromDisk:
    """Images that are read as they are needed, and go to `device` a batch at a time."""

    windows: Windows
    device: torch.device

    def picked(self, _: str, __: int, step: int, batch_size: int, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """As `InMemory.picked`: the batch's part itself, and all rows of it."""
        begin = step * batch_size
        images, labels = self.windows.rows(begin + part.start, begin + part.stop)
        return sent(images, self.device), torch.arange(len(labels), device=self.device), sent(labels, self.device)


@dataclass(frozen=True, eq=False)
class Stream:
    """An endless sequence of images, each once an epoch in a new order; batches may straddle epochs.

    All its random draws are named by (seed, name).
    """

    name: str
    source: InMemory | FromDisk
    device: torch.device
    batch_size: int
    seed: int

    def draw(
        self, step: int, config: DataConfig, share: Callable[[int], slice], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The rank's (images, labels) of the batch of `step`."""
        part, device = share(self.batch_size), self.device
        # Orders and crops are drawn on the CPU, so that they are the same whatever the device; noise is large.
        whole, rows, labels = self.source.picked(self.name, self.seed, step, self.batch_size, part)
        random = generator("cpu", self.seed, self.name, "augment", step)
        padding = config.crop_padding
        shifts = torch.randint(-padding, padding + 1, (2, self.batch_size), generator=random)
        mirrored = torch.rand(self.batch_size, generator=random) < (0.5 if config.flip else 0.0)
        if padding or config.flip:
            pixels = crop_and_flip(whole, rows, sent(shifts[:, part], device), sent(mirrored[part], device))
        else:
            pixels = whole[rows]
        images = to_float(pixels, dtype)
        if config.noise_std:
            random = generator(device, self.seed, self.name, "noise", step)
            shape = (self.batch_size, *whole.shape[1:])
            noise = torch.randn(shape, generator=random, device=device)  # float32 always: one noise, any dtype
            images = images + config.noise_std * noise[part].to(dtype)
        return images, labels


class BatchSource:
    """The training batches of one rank: `at(step)`. Images stay on `device` as uint8, or on the disk.

    `share(n)` is this rank's slice of n rows, as `World.share`; `n_classes`: none, as many as the labels tell of.
    """

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        share: Callable[[int], slice] = ALONE.share,
        dtype: torch.dtype = torch.float32,
        n_classes: int | None = None,
    ) -> None:
        check_padding(config, split.images.shape[2:])
        device = torch.device(device)
        self._config, self._share, self._dtype = config, share, dtype
        self._config_of_p_x = config if config.augment_p_x else unaugmented(config)
        self._labelled: Stream | None = None
        self._shares = class_shares(split.labels, n_classes).to(device)
        if isinstance(split, Streamed):
            self._stream = Stream("train", FromDisk(Windows(split, "train", seed), device), device, batch_size, seed)
            return
        images, labels = split.images.to(device), split.labels.to(device)
        everything = InMemory(images, labels, torch.arange(len(split)))
        self._stream = Stream("train", everything, device, batch_size, seed)
        if config.labels_per_class is not None:
            rows = labelled_rows(split.labels, config.labels_per_class, seed, n_classes)
            self._shares = class_shares(split.labels[rows], n_classes).to(device)  # of the others no class is known
            size = config.labelled_batch_size or batch_size
            self._labelled = Stream("labelled", InMemory(images, labels, rows), device, size, seed)

    def at(self, step: int) -> Batch:
        """The rank's part of the batch of `step`, counted from 0."""
        images, labels = self._stream.draw(step, self._config_of_p_x, self._share, self._dtype)
        n = self._stream.batch_size
        if self._labelled is None and self._config.augment_p_x:
            return Batch(images, labels, None, None, n, n, self._shares)
        stream = self._labelled or self._stream
        labelled_images, labelled_labels = stream.draw(step, self._config, self._share, self._dtype)
        given = labels if self._labelled is None else None
        return Batch(images, given, labelled_images, labelled_labels, n, stream.batch_size, self._shares)


def unaugmented(config: DataConfig) -> DataConfig:
    """The same images, as they are stored: for the p(x) terms of SADA (Yang et al., 2023)."""
    return replace(config, noise_std=0.0, crop_padding=0, flip=False, augment_p_x=True)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that the host does not wait for: from pinned memory, where that is a thing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def positions(n: int, seed: int, name: str, step: int, batch_size: int) -> Int64[Tensor, " batch_size"]:
    """Which of n images the batch of `step` holds: stream position g is permutation(g // n)[g % n]."""
    parts, start, stop = [], step * batch_size, (step + 1) * batch_size
    while start < stop:
        epoch, first = divmod(start, n)
        taken = min(n - first, stop - start)
        parts.append(permutation(n, derive_seed(seed, name, "order", epoch))[first : first + taken])
        start += taken
    return torch.cat(parts)


@functools.lru_cache(maxsize=8)
def permutation(n: int, seed: int) -> Int64[Tensor, " n"]:
    """A random order of n images; kept, as the next step asks again."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def class_shares(labels: Int64[Tensor, " n"], n_classes: int | None = None) -> Float[Tensor, " classes"]:
    """How frequent each class is."""
    return torch.bincount(labels.cpu(), minlength=n_classes or 0).double() / max(len(labels), 1)


def labelled_rows(
    labels: Int64[Tensor, " n"], per_class: int, seed: int, n_classes: int | None = None
) -> Int64[Tensor, " k"]:
    """`per_class` rows of each class, ascending: a function of the labels and the run's seed."""
    labels = labels.cpu()
    counts = torch.bincount(labels, minlength=n_classes or 0)
    scarce = int(counts.argmin())
    if not counts[scarce]:
        raise DataError(f"data.labels_per_class: class {scarce} has no training image; each class needs {per_class}")
    if int(counts[scarce]) < per_class:
        problem = f"is {per_class}, but class {scarce} has {int(counts[scarce])} training images; take that or fewer"
        raise ConfigError([Problem("data.labels_per_class", problem)])
    order = torch.randperm(len(labels), generator=generator("cpu", seed, "labelled", "subset"))
    chosen = [order[labels[order] == c][:per_class] for c in range(len(counts))]
    return torch.cat(chosen).sort().values


def check_padding(config: DataConfig, size: tuple[int, ...]) -> None:
    """A reflected border cannot be as wide as the image."""
    if config.crop_padding >= min(size):
        most = min(size) - 1
        message = f"is {config.crop_padding}, must be at most {most}: the images are {size[0]} x {size[1]} pixels"
        raise ConfigError([Problem("data.crop_padding", message)])
