"""torchvision's data sets, read by torchvision's own classes; their checksums are checked by them too."""

from __future__ import annotations

import fcntl
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jem.config import DataConfig
from jem.data import idx
from jem.data.carve import Indices, Pool, Source
from jem.data.catalog import DEBIAN_FASHION_MNIST, PUBLIC, from_debian, root_of
from jem.data.image_files import decode
from jem.errors import ConfigError, DataError, Problem

UNREADABLE = (RuntimeError, OSError, ValueError, TypeError, KeyError, IndexError, AssertionError, EOFError)
"""What torchvision raises for files that are missing, cut short or not what they should be."""
DIGITS = tuple("0123456789")


def mnist_like(config: DataConfig) -> Source:
    """mnist, fashion_mnist, kmnist: greyscale, 28x28."""
    if from_debian(config):
        return idx.fashion_mnist(DEBIAN_FASHION_MNIST)
    names = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}

    def pool(train: bool) -> Pool:
        opened = fetch(config, lambda cls, download: cls(root_of(config), train=train, download=download), names)
        return Pool.of(opened.data[:, None], opened.targets)

    classes = {
        "fashion_mnist": idx.FASHION_CLASSES,
        "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    }
    return Source(classes.get(config.name, DIGITS), {"train": partial(pool, True), "test": partial(pool, False)})


def cifar(config: DataConfig) -> Source:
    """cifar10, cifar100: colour, 32x32."""
    names = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}

    def opened(train: bool) -> Any:
        return fetch(config, lambda cls, download: cls(root_of(config), train=train, download=download), names)

    def pool(dataset: Any) -> Pool:
        return Pool.of(torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), dataset.targets)

    test = opened(False)  # the smaller one; it knows the classes' names
    return Source(tuple(test.classes), {"train": lambda: pool(opened(True)), "test": lambda: pool(test)})


def svhn(config: DataConfig) -> Source:
    """Street View House Numbers, cropped: colour, 32x32; without its "extra" part."""

    def pool(split: str) -> Pool:
        opened = fetch(
            config, lambda cls, download: cls(root_of(config), split=split, download=download), {"svhn": "SVHN"}
        )
        return Pool.of(torch.from_numpy(np.ascontiguousarray(opened.data)), opened.labels)

    return Source(DIGITS, {"train": partial(pool, "train"), "test": partial(pool, "test")})


def celeba(config: DataConfig) -> Source:
    """CelebA's aligned faces: the middle square, resized; two classes by one of its 40 attributes."""
    attribute = config.options.get("attribute", "Smiling")
    # "all" once: torchvision parses every list of 200,000 lines again for each split
    faces = fetch(
        config, lambda cls, download: cls(root_of(config), split="all", download=download), {"celeba": "CelebA"}
    )
    names = [name for name in faces.attr_names if name]
    if attribute not in names:
        problem = Problem("data.options.attribute", f"is {attribute!r}, must be one of {', '.join(names)}")
        raise ConfigError([problem])
    labels = faces.attr[:, names.index(attribute)].numpy()
    folder = root_of(config) / "celeba"
    parts = _celeba_partition(folder / "list_eval_partition.txt")
    if len(parts) != len(labels):
        raise DataError(f"{folder}: its lists differ in length ({len(parts)} and {len(labels)}); fetch them again")

    def pool(part: int) -> Pool:
        rows = np.flatnonzero(parts == part)
        files = [folder / "img_align_celeba" / faces.filename[row] for row in rows]
        return Pool(labels[rows], lambda chosen: decode([files[i] for i in chosen], config.image_size, 3))

    pools = {name: partial(pool, part) for part, name in enumerate(("train", "validation", "test"))}
    return Source((f"not {attribute}", attribute), pools)


def fetch(config: DataConfig, make: Callable[[Any, bool], Any], names: dict[str, str]) -> Any:
    """`make(torchvision's class, download)` from what is on disk, else downloaded; DataError says what to do."""
    from torchvision import datasets

    cls, root = getattr(datasets, names[config.name]), root_of(config)
    try:
        return make(cls, False)
    except (*UNREADABLE, pickle.UnpicklingError) as error:
        if not config.download or "found" not in str(error):  # torchvision: "not found or corrupted"
            raise DataError(_missing(config, error)) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks on one machine: the first downloads, the others find it
            return make(cls, True)
    except (*UNREADABLE, ImportError) as error:
        by_hand = f"put {_files(config)}; or data.root=FOLDER where they are already"
        raise DataError(
            f"data.name={config.name}: the download failed: {_reason(error)}. By hand: {by_hand}"
        ) from error


def _celeba_partition(path: Path) -> Indices:
    return np.array([int(line.split()[1]) for line in path.read_text().splitlines() if line.strip()])


def _missing(config: DataConfig, error: Exception) -> str:
    found = (root_of(config) / PUBLIC[config.name].marker).exists()
    state = f"is incomplete or damaged under {root_of(config)} ({_reason(error)})" if found else "is not there"
    fetch_it = f"data.download=true fetches {PUBLIC[config.name].megabytes} MB"
    if found:
        fetch_it = f"delete it, then {fetch_it}"
    debian = "; or install Debian's package dataset-fashion-mnist" if config.name == "fashion_mnist" else ""
    return f"data.name={config.name}: {state}: {fetch_it}; or put {_files(config)}; or data.root=FOLDER{debian}"


def _files(config: DataConfig) -> str:
    facts = PUBLIC[config.name]
    return f"{facts.archives} so that {root_of(config) / facts.marker} exists"


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "reason", None) or error)
    return re.sub(r"\s+", " ", re.sub(r"\w+://\S+", "its server", text)).strip()
