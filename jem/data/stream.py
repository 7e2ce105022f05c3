"""Training images read from Parquet while they are needed: for data sets larger than memory.

Order: each epoch takes the row groups in an order of its own, as many in a row as make `WINDOW_BYTES` of pixels are a
window, and a window's images are shuffled together. All of it is drawn from (seed, epoch, window), so that an image is
seen once an epoch, a batch is a function of (seed, step) alone, and there is nothing to save. Two images of one window
meet sooner than chance would have it: data that lie sorted are spread over an epoch by their groups.

The window in use and the next, which a thread reads meanwhile, are all that is in memory. Every rank reads all windows
and takes its rows: reading is far cheaper than a training step's chains (docs/performance.md).
"""

from __future__ import annotations

import bisect
import functools
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from jem.data.splits import Split
from jem.randomness import generator

if TYPE_CHECKING:  # predicting needs no pyarrow
    from jem.data.manifest import Manifest
    from jem.files import Location

WINDOW_BYTES = 128 * 2**20
"""Pixels that are shuffled together. Another number is another order."""


class Group(NamedTuple):
    """A row group: its file, its number there, and the rows of the split that it holds."""

    file: Location
    number: int
    rows: range


@dataclass(frozen=True, eq=False)
class Streamed(Split):
    """A split that stays on the disk: `images` is empty, `labels` are all there. Page checksums guard what is read."""

    manifest: Manifest
    groups: tuple[Group, ...] = field(repr=False)

    in_memory = False

    def read(self, group: Group) -> tuple[UInt8[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """Raises DataError naming file and row group if it is damaged."""
        from jem.data.rows import read_group

        return read_group(group.file, group.number, self.manifest)

    def chunks(self) -> Iterator[Tensor]:
        return (self.read(group)[0] for group in self.groups)

    def part(self) -> Split:
        """Row groups evenly spaced over the split, as many as make a window.

        Warns where rows are sorted by class and some are missing.
        """
        bytes_each = self.images.shape[1:].numel() * max(len(group.rows) for group in self.groups)
        count = min(len(self.groups), max(1, WINDOW_BYTES // bytes_each))
        images, labels = zip(
            *(self.read(self.groups[(2 * i + 1) * len(self.groups) // (2 * count)]) for i in range(count)), strict=True
        )
        found = torch.cat(labels)
        missing = sorted({*self.labels.tolist()} - {*found.tolist()})
        if missing and int((self.labels.diff() != 0).sum()) < 2 * len(self.manifest.classes):
            names = ", ".join(self.manifest.classes[label] for label in missing[:10])
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            warnings.warn(
                f"{self.manifest.name}: the {len(found):,} images that priors and baselines see of the streamed split "
                f"have none of {names}{more}, as its rows are sorted by class: write them in another order "
                "(jobs/prepare.py does so with a folder of images)",
                stacklevel=2,
            )
        return Split(torch.cat(images), found)


class Window(NamedTuple):
    """Images as they lie on the disk, and the order in which they are seen."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    order: Int64[Tensor, " n"]


class Epoch(NamedTuple):
    """The windows of an epoch: groups of each, and the positions where they begin, with the epoch's end."""

    windows: list[list[Group]]
    begins: list[int]


@functools.lru_cache(maxsize=4)
def epoch_of(split: Streamed, name: str, seed: int, epoch: int) -> Epoch:
    """The order of a split's row groups in an epoch; kept, as the next step asks again."""
    order = torch.randperm(len(split.groups), generator=generator("cpu", seed, name, "groups", epoch)).tolist()
    enough = max(1, WINDOW_BYTES // split.images.shape[1:].numel())
    windows: list[list[Group]] = []
    begins, rows = [0], enough
    for group in (split.groups[i] for i in order):
        if rows >= enough:
            windows.append([])
            begins.append(begins[-1])
            rows = 0
        windows[-1].append(group)
        rows += len(group.rows)
        begins[-1] += len(group.rows)
    return Epoch(windows, begins)


Key = tuple[int, int]
"""Of a window: epoch, and number there."""


class Windows:
    """The endless sequence of a split's images; `rows(first, stop)` are those at some positions of it."""

    def __init__(self, split: Streamed, name: str, seed: int) -> None:
        self.split, self.name, self.seed = split, name, seed
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._held: dict[Key, Future[Window]] = {}

    def epoch(self, epoch: int) -> Epoch:
        return epoch_of(self.split, self.name, self.seed, epoch)

    def rows(self, first: int, stop: int) -> tuple[UInt8[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """Images and labels at positions `first` to `stop`. Raises DataError for a row group that is damaged."""
        parts = list(self._parts(first, stop))
        if not parts:
            return self.split.images, self.split.labels[:0]
        following = self._after(parts[-1][0])
        wanted = {following, *(key for key, _ in parts)}
        self._held = {key: window for key, window in self._held.items() if key in wanted}  # before more is read
        found = [self._taken(key, positions) for key, positions in parts]
        self._reading(following)
        images, labels = zip(*found, strict=True)
        return torch.cat(images), torch.cat(labels)

    def _parts(self, first: int, stop: int) -> Iterator[tuple[Key, slice]]:
        """The windows that positions lie in, and where in them."""
        while first < stop:
            epoch, position = divmod(first, len(self.split))
            begins = self.epoch(epoch).begins
            number = bisect.bisect_right(begins, position) - 1
            taken = min(stop - first, begins[number + 1] - position)
            yield (epoch, number), slice(position - begins[number], position - begins[number] + taken)
            first += taken

    def _taken(self, key: Key, positions: slice) -> tuple[Tensor, Tensor]:
        window = self._window(key)
        at = window.order[positions]
        return window.images[at], window.labels[at]

    def _window(self, key: Key) -> Window:
        try:
            return self._reading(key).result()
        except BaseException:
            self._held.pop(key, None)  # whoever asks again reads again
            raise

    def _reading(self, key: Key) -> Future[Window]:
        if key not in self._held:
            self._held[key] = self._reader.submit(self._read, key)
        return self._held[key]

    def _after(self, key: Key) -> Key:
        epoch, number = key
        return (epoch, number + 1) if number + 1 < len(self.epoch(epoch).windows) else (epoch + 1, 0)

    def _read(self, key: Key) -> Window:
        epoch, number = key
        groups = self.epoch(epoch).windows[number]
        n = sum(len(group.rows) for group in groups)
        images = torch.empty(n, *self.split.images.shape[1:], dtype=torch.uint8)
        labels = torch.empty(n, dtype=torch.int64)
        row = 0
        for group in groups:
            stop = row + len(group.rows)
            images[row:stop], labels[row:stop] = self.split.read(group)
            row = stop
        order = torch.randperm(n, generator=generator("cpu", self.seed, self.name, "window", epoch, number))
        return Window(images, labels, order)
