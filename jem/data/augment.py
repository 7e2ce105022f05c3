"""From stored pixels to what the model sees: crop, mirror, scale, noise."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


def to_float(images: UInt8[Tensor, "n c h w"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "n c h w"]:
    """0 to 255 becomes -1 to 1."""
    return images.to(dtype) / 127.5 - 1


def crop_and_flip(
    images: UInt8[Tensor, "total c h w"],
    rows: Int[Tensor, " n"],
    shifts: Int[Tensor, "2 n"],
    mirrored: Bool[Tensor, " n"],
) -> UInt8[Tensor, "n c h w"]:
    """Images `rows`, each moved down and right by its `shifts` (pixels) and mirrored where asked.

    Equal to reflect-padding, cropping and flipping one by one; here a single gather, as a reflected pad is
    only a way to compute from which pixel a pixel comes.
    """
    _, c, h, w = images.shape
    y = _reflect(torch.arange(h, device=images.device) - shifts[0, :, None], h)
    x = torch.arange(w, device=images.device).expand(len(rows), w)
    x = _reflect(torch.where(mirrored[:, None], w - 1 - x, x) - shifts[1, :, None], w)
    channel = torch.arange(c, device=images.device)
    return images[rows[:, None, None, None], channel[:, None, None], y[:, None, :, None], x[:, None, None, :]]


def _reflect(position: Int[Tensor, "n side"], side: int) -> Int[Tensor, "n side"]:
    """Positions outside 0 to side - 1 mirrored at the border pixel, which is not repeated."""
    last = side - 1
    return last - (last - position.abs()).abs()
