"""Images that are not of the data set: made from its test images or from nothing, or brought from another data set.

Those that are made are floats on [-1, 1], as the network sees images, and not rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, UInt8
from torch import Tensor

from jem.errors import DataError
from jem.randomness import generator as stream


def interpolations(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The midpoint of every image and another, which one being a function of n alone.

    Not its neighbour in the file: where images are sorted by class, as in mnist5k and in folders, both are of one.
    """
    order = torch.randperm(len(images), generator=stream("cpu", "interpolations", len(images)))
    others = torch.empty_like(order)
    others[order] = order.roll(1)  # in one circle: no image's other is itself, and each is once another's
    return (images + images[others]) / 2


def uniform_noise(shape: torch.Size, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Pixels drawn uniformly from [-1, 1]."""
    return torch.rand(shape, generator=generator) * 2 - 1


def gaussian_noise(shape: torch.Size, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Pixels drawn from N(0, 0.5^2) and clamped to [-1, 1] (as Hendrycks et al., Outlier Exposure, 2019)."""
    return (0.5 * torch.randn(shape, generator=generator)).clamp(-1, 1)


def constant_images(shape: torch.Size, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Images of one colour, each channel of each drawn uniformly from [-1, 1]."""
    return uniform_noise(torch.Size((*shape[:2], 1, 1)), generator).expand(shape).contiguous()


def rotated(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Images turned by 90 degrees, counterclockwise. Some may still be of the data set, such as a digit 0.

    Raises DataError if they are not square: turned ones would have another shape.
    """
    h, w = images.shape[2:]
    if h != w:
        raise DataError(f"the set rot90 needs square images, these are {h}x{w}; leave it out")
    return images.rot90(1, dims=(2, 3))


OutlierSet = Callable[[Tensor, torch.Generator], Tensor]
"""From the test images [n, c, h, w] on [-1, 1] and a stream of randomness to as many outliers, on the CPU."""

SETS: dict[str, OutlierSet] = {
    "interp": lambda images, _: interpolations(images),
    "uniform": lambda images, generator: uniform_noise(images.shape, generator),
    "gaussian": lambda images, generator: gaussian_noise(images.shape, generator),
    "constant": lambda images, generator: constant_images(images.shape, generator),
    "rot90": lambda images, _: rotated(images),
}


class Adapted(NamedTuple):
    """Images of another data set in the shape that the network takes."""

    images: Tensor  # uint8 [n, c, h, w]
    how: str  # what was done to them, in words


def adapt(images: UInt8[Tensor, "n _c _h _w"], shape: tuple[int, int, int]) -> Adapted:
    """Bring images to `shape` (channels, height, width): crop to its proportions, resize, make grey or RGB.

    Made smaller, an image loses detail and, made larger, it is smooth: either may be what gives an outlier away,
    so `how` belongs beside the figures. Raises DataError for channels other than 1 and 3.
    """
    c, h, w = shape
    steps = []
    images, step = _crop(images, h, w)
    steps += step
    if images.shape[2:] != (h, w):
        steps.append(f"resized from {_size(images)} to {h}x{w} (bilinear, antialiased)")
        resized = F.interpolate(images.float(), (h, w), mode="bilinear", antialias=True)
        images = resized.round().clamp(0, 255).to(torch.uint8)
    if images.shape[1] != c:
        images, step = _recolour(images, c)
        steps += step
    return Adapted(images, ", ".join(steps) or "as they are")


def _crop(images: Tensor, h: int, w: int) -> tuple[Tensor, list[str]]:
    """The largest part in the middle that has the proportions h : w."""
    old_h, old_w = images.shape[2:]
    new_h, new_w = (old_h, max(1, old_h * w // h)) if old_h * w < old_w * h else (max(1, old_w * h // w), old_w)
    if (new_h, new_w) == (old_h, old_w):
        return images, []
    top, left = (old_h - new_h) // 2, (old_w - new_w) // 2
    cropped = images[:, :, top : top + new_h, left : left + new_w]
    return cropped, [f"the middle {_size(cropped)} of {old_h}x{old_w} cut out"]


def _recolour(images: Tensor, c: int) -> tuple[Tensor, list[str]]:
    found = images.shape[1]
    if (found, c) == (1, 3):
        return images.expand(-1, 3, -1, -1).contiguous(), ["grey repeated over 3 channels"]
    if (found, c) == (3, 1):
        luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        grey = (images.float() * luma).sum(dim=1, keepdim=True).round().to(torch.uint8)
        return grey, ["RGB made grey (0.299 R + 0.587 G + 0.114 B)"]
    raise DataError(f"images of {found} channels cannot be made into images of {c}: only grey and RGB into each other")


def _size(images: Tensor) -> str:
    return f"{images.shape[2]}x{images.shape[3]}"
