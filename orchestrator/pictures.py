"""Pictures a person can read: grids of images as PNG."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor

CELL = 48
"""Smallest side of a shown image, in pixels: 8x8 digits are enlarged to be readable."""


def grid_png(images: Tensor, columns: int) -> bytes:
    """Images [n, c, h, w] on [-1, 1], row by row, as a PNG: grey or in colour; of other channels their mean."""
    return png_bytes(grid(images, columns))


def grid(images: Tensor, columns: int) -> np.ndarray:
    """The same as an array [rows, columns, 3] of uint8, with a gap between images.

    Small images are enlarged with bicubic interpolation: a person reads an 8x8 digit better that way.
    """
    images = images.detach().float().cpu()
    if images.shape[1] not in (1, 3):
        images = images.mean(dim=1, keepdim=True)
    scale = -(-CELL // images.shape[-1])
    if scale > 1:
        images = F.interpolate(images, scale_factor=scale, mode="bicubic")
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    cells = pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    n, h, w, _ = cells.shape
    gap, rows = 2, -(-n // columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, cell in enumerate(cells):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = cell
    return sheet


def by_class(images: Tensor, classes: Tensor, n_classes: int, columns: int = 10) -> Tensor:
    """The first `columns` images of each class [n], a row a class; black where a class has fewer."""
    rows = []
    for c in range(n_classes):
        row = images[classes == c][:columns]
        blank = images.new_full((columns - len(row), *images.shape[1:]), -1.0)
        rows.append(torch.cat([row, blank]))
    return torch.cat(rows)


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
