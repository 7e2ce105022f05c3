"""Photographs as their cameras meant them."""

from __future__ import annotations

import warnings
from typing import Any

ORIENTATION = 0x0112
"""EXIF's tag. 1: as it is."""

TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def orientation(image: Any) -> int:
    """Of a Pillow image, 1 to 8; a PNG may be decoded for it. No other tag is read: scraped ones are odd."""
    try:
        with warnings.catch_warnings(action="ignore"):
            found = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # of Pillow and struct, of many types
        return 1
    return found if found in TURNS else 1


def upright(image: Any) -> Any:
    """The Pillow image, turned and mirrored as its orientation says."""
    from PIL import Image

    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(Image.Transpose[turn])
