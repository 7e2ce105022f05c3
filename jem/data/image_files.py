"""Image files on a disk: which there are below a folder, and their pixels. Imports no torch until it decodes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jem.data.upright import upright
from jem.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".tif", ".tiff", ".webp", ".gif"),
)
OTHERS = (
    *(".avif", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".svg", ".tga", ".psd"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw"),
)
"""Images that are not read: leaving them out in silence would leave data out."""

NAMED = 20
"""Of images that cannot be read, in one message."""


def below(folder: Path, whole: bool = True) -> list[Path]:
    """The image files below a folder, sorted. Raises DataError for a folder that cannot be read.

    `whole`: and for images of a kind that is not read. Of outliers some will do.
    """
    there = sorted(walk(folder))
    if whole:
        refuse_others(there)
    return [path for path in there if is_image(path)]


def walk(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """All files below a folder but hidden ones and those in hidden folders. Links are followed, none in a circle."""
    try:
        info = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    here = above | {(info.st_dev, info.st_ino)}
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        try:
            found = path.stat() if entry.is_dir() else None
        except OSError:  # a link to itself, or into what cannot be read: whoever wants the file will say so
            found = None
        if found is None:
            yield path
        elif (found.st_dev, found.st_ino) not in here:
            yield from walk(path, here)


def is_image(path: Path) -> bool:
    return path.name.lower().endswith(EXTENSIONS)


def refuse_others(paths: Sequence[Path]) -> None:
    """Raises DataError where some are images that are not read."""
    unread = [path for path in paths if path.name.lower().endswith(OTHERS)]
    if unread:
        raise DataError(f"{unread[0]}: is one of {len(unread)} images that are not read; convert or move them")


def decode(files: Sequence[Path], size: int, channels: int) -> Tensor:
    """uint8 [n, channels, size, size]: the middle square of each image as a camera meant it, resized with antialiasing.

    What is transparent has the colour that is stored for it. Raises DataError for one that cannot be read, or whose
    numbers are no bytes: Pillow would cut 16 bits off at 255, or leave half of them out.
    """
    import numpy as np
    import torch
    from PIL import Image

    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    unreadable: list[str] = []
    for row, path in enumerate(files):
        try:
            with Image.open(path) as opened:
                numbers = wide(opened)
                if not numbers:
                    opened.load()  # Pillow turns a TIFF itself while it loads it, and then has no orientation
                    image = upright(opened).convert("RGB" if channels == 3 else "L")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unreadable.append(f"{path}: {_reason(error, path)}")
            continue
        if numbers:
            remedy = "scale the images to 0..255 and save them with 8 bits a channel"
            unreadable.append(f"{path}: has {numbers}, must have 8 bits a channel; {remedy}")
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


def wide(image: Any) -> str:
    """In words, what an opened Pillow image has in the place of bytes; empty if it has bytes."""
    if image.mode == "F":
        return "floats (Pillow's mode F)"
    stored = [str(tile[3]) for tile in image.tile]  # Pillow's mode is that of 8 bits
    colour = any(";16" in one and "BGR;16" not in one for one in stored)  # that one is 16 bits in all
    return f"more than 8 bits a pixel's channel (Pillow's mode {image.mode})" if colour or image.mode[0] == "I" else ""


def _reason(error: Exception, path: Path) -> str:
    from PIL import Image

    if isinstance(error, FileNotFoundError):
        return "is not there; copy it again"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, Image.DecompressionBombError):
        return f"has too many pixels to be read; scale it down ({error})"
    reason = str(error).removesuffix(f" '{path}'")
    return f"is not a readable image: {reason}; replace or delete the file"
