"""A folder of images, one sub-folder a class.

ROOT/{train, validation or val, test}/CLASS/*, where only train is required; or flat, ROOT/CLASS/*. What is
missing is carved from train: 20 % test, then the validation split. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jem.config import DataConfig
from jem.data.catalog import root_of, validation_count
from jem.data.image_files import EXTENSIONS, below, decode, is_image, refuse_others
from jem.errors import DataError

if TYPE_CHECKING:
    from jem.data.carve import Pool, Source

SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")
LAYOUTS = "ROOT/train/CLASS/*.png (also validation, test) or ROOT/CLASS/*.png"


@dataclass(frozen=True)
class Index:
    """The files of a folder: (path, class index) for each split that the folder has, sorted by path."""

    classes: tuple[str, ...]
    files: dict[str, list[tuple[Path, int]]]


def index(root: Path) -> Index:
    """List a folder; no image is opened. DataError if it has neither layout, or images where none are looked for."""
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; data.root names one laid out as {LAYOUTS}")
    folders = split_folders(root)
    classes = _folders(folders["train"])
    _check_names(root, folders, classes)
    if len(classes) < 2:
        raise DataError(f"{folders['train']}: has {len(classes)} class folders, two are needed: {LAYOUTS}")
    for folder in folders.values():
        if _folders(folder) != classes:
            odd = sorted(set(_folders(folder)) ^ set(classes))
            raise DataError(f"{folder}: has other classes than train: {', '.join(odd)}; each split needs every class")
        files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
        refuse_others(files)
        beside = [path for path in files if is_image(path)]
        if beside:
            what = f"is one of {len(beside)} images beside the classes' folders"
            raise DataError(f"{beside[0]}: {what}, which would be left out; move them into one, or away")
    return Index(tuple(classes), {split: _files(folder, classes) for split, folder in folders.items()})


def imagefolder(config: DataConfig) -> Source:
    """The source that `data.root` names; images become `channels` x `image_size` x `image_size`."""
    from jem.data.carve import Source

    found = index(root_of(config))
    pools = {split: partial(_pool, files, config) for split, files in found.files.items()}
    return Source(found.classes, pools, by_class=True)


def carved_sizes(found: Index, validation_size: int | None) -> dict[str, int]:
    """Images in each split once the missing ones are carved."""
    sizes = {split: len(files) for split, files in found.files.items()}
    if "test" not in sizes:
        sizes["test"] = sizes["train"] // 5
        sizes["train"] -= sizes["test"]
    if "validation" not in sizes:
        sizes["validation"] = validation_count(sizes["train"], validation_size)
        sizes["train"] -= sizes["validation"]
    return {split: sizes[split] for split in ("train", "validation", "test")}


def _pool(files: list[tuple[Path, int]], config: DataConfig) -> Pool:
    import numpy as np

    from jem.data.carve import Pool

    labels = np.array([label for _, label in files])
    return Pool(labels, lambda rows: decode([files[i][0] for i in rows], config.image_size, config.channels))


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split that there is; the root itself as train where it has no splits."""
    if not _folders(root / "train"):
        return {"train": root}
    candidates = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
    found = {split: [root / name for name in names if (root / name).is_dir()] for split, names in candidates.items()}
    return {split: folders[0] for split, folders in found.items() if folders}


def _check_names(root: Path, folders: dict[str, Path], classes: list[str]) -> None:
    """Splits by other names would be left out, or taken for classes."""
    remedy = f"rename or move them: {LAYOUTS}"
    if folders["train"] != root:
        beside = [name for name in _folders(root) if root / name not in folders.values()]
        strange = [name for name in beside if {*_folders(root / name)} & {*classes}]
        if strange:
            raise DataError(f"{root}: beside train, {', '.join(strange)} would not be read; {remedy}")
    else:
        strange = [name for name in classes if name.lower() in SPLIT_NAMES and _folders(root / name)]
        if strange:
            raise DataError(f"{root}: {', '.join(strange)} would be taken for classes, there is no train; {remedy}")


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error


def _files(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    listed: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        images = below(folder / name)
        if not images:
            raise DataError(f"{folder / name}: holds no image ({', '.join(EXTENSIONS)}); fill or delete the folder")
        listed += [(path, label) for path in images]
    return listed
