"""Pictures a person can read: grids of images as PNG."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CELL = 48
"""Smallest side of a shown image, in pixels: 8x8 digits are enlarged to be readable."""


def grid_png(images: Tensor, columns: int) -> bytes:
    """Images [n, c, h, w] on [-1, 1], row by row, as a PNG; c is 1 or 3."""
    return png_bytes(grid(images, columns))


def grid(images: Tensor, columns: int) -> np.ndarray:
    """The same as an array [rows, columns, 3] of uint8, with a gap between images."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    scale = max(1, -(-CELL // pixels.shape[-1]))
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    cells = pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    n, h, w, _ = cells.shape
    gap, rows = 2, -(-n // columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, cell in enumerate(cells):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = cell
    return sheet


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
