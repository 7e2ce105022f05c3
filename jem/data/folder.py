"""A folder of images, one sub-folder a class.

ROOT/{train, validation or val, test}/CLASS/*, where only train is required; or flat, ROOT/CLASS/*. What is
missing is carved from train: 20 % test, then the validation split. Imports no torch until it decodes.
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
from jem.data.upright import upright
from jem.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from jem.data.carve import Pool, Source

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
OTHERS = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".tga")
"""Images that are not read: leaving them out in silence would leave data out."""
NAMED = 20
"""Of images that cannot be read, in one message."""

SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")
LAYOUTS = "ROOT/train/CLASS/*.png (also validation, test) or ROOT/CLASS/*.png"


@dataclass(frozen=True)
class Index:
    """The files of a folder: (path, class index) for each split that the folder has, sorted by path."""

    classes: tuple[str, ...]
    files: dict[str, list[tuple[Path, int]]]


def index(root: Path, least: int = 2) -> Index:
    """List a folder; no image is opened. DataError if it has neither layout, or not `least` classes.

    With `least` 1, which is for outliers, whose classes do not matter, images without any folder will do.
    """
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; data.root names one laid out as {LAYOUTS}")
    folders = _split_folders(root)
    classes = _folders(folders["train"])
    if least == 1 and not classes:
        return Index((root.name,), {"train": _files(root.absolute().parent, [root.absolute().name], whole=False)})
    if least > 1:  # of outliers all images will do
        _check_names(root, folders, classes)
    if len(classes) < least:
        raise DataError(f"{folders['train']}: has {len(classes)} class folders, two are needed: {LAYOUTS}")
    for folder in folders.values():
        if _folders(folder) != classes:
            odd = sorted(set(_folders(folder)) ^ set(classes))
            raise DataError(f"{folder}: has other classes than train: {', '.join(odd)}; each split needs every class")
    files = {split: _files(folder, classes, whole=least > 1) for split, folder in folders.items()}
    return Index(tuple(classes), files)


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


def decode(files: Sequence[Path], size: int, channels: int) -> Tensor:
    """uint8 [n, channels, size, size]: the middle square of each image as a camera meant it, resized with antialiasing.

    Raises DataError for one that cannot be read, or whose numbers are no bytes: Pillow would cut 16 bits off at 255.
    """
    import numpy as np
    import torch
    from PIL import Image

    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    unreadable: list[str] = []
    for row, path in enumerate(files):
        try:
            with Image.open(path) as opened:
                mode = opened.mode
                image = upright(opened).convert("RGB" if channels == 3 else "L")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = str(error).removesuffix(f" '{path}'")
            unreadable.append(f"{path}: is not a readable image: {reason}; replace or delete the file")
            continue
        if mode == "F" or mode.startswith("I"):
            numbers = "floats" if mode == "F" else "more than 8 bits a pixel"
            remedy = "scale the images to 0..255 and save them with 8 bits a channel"
            unreadable.append(f"{path}: has {numbers} (Pillow's mode {mode}), must have 8 bits a channel; {remedy}")
            continue
        if unreadable:
            continue  # all of them are named at once
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
        images[row] = torch.from_numpy(np.array(square).reshape(size, size, channels)).permute(2, 0, 1)
    if unreadable:
        more = [f"and {len(unreadable) - NAMED} more"] if len(unreadable) > NAMED else []
        raise DataError("\n".join([*unreadable[:NAMED], *more]))
    return images


def _pool(files: list[tuple[Path, int]], config: DataConfig) -> Pool:
    import numpy as np

    from jem.data.carve import Pool

    labels = np.array([label for _, label in files])
    return Pool(labels, lambda rows: decode([files[i][0] for i in rows], config.image_size, config.channels))


def _split_folders(root: Path) -> dict[str, Path]:
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
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path, classes: Sequence[str], whole: bool) -> list[tuple[Path, int]]:
    listed: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        there = sorted(
            Path(where, file)
            for where, _, names in os.walk(folder / name, followlinks=True)
            for file in names
            if not file.startswith(".")
        )
        below = [path for path in there if path.name.lower().endswith(EXTENSIONS)]
        unread = [path for path in there if path.name.lower().endswith(OTHERS)]
        if unread and whole:
            raise DataError(f"{unread[0]}: is one of {len(unread)} images that are not read; convert or move them")
        if not below:
            raise DataError(f"{folder / name}: holds no image ({', '.join(EXTENSIONS)}); fill or delete the folder")
        listed += [(path, label) for path in below]
    return listed
