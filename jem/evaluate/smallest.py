"""The smallest perturbation that each attack has found for each image: what robust accuracy is read from.

Accuracy at eps is the share of images for which none was found of norm eps or less. So curves never rise, and `worst`
is never above an attack; an image that was wrong from the start has norm 0.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jem.evaluate.attacks import Classifier, is_wrong, norm_of

STRETCHED = (1.0, 1.01, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0)
"""A candidate on the boundary may fall back to the right side under other noise or rounding: it is also tried further
out, at these multiples of its length."""

SLACK = 1e-5
"""Rounding of float32 in a norm."""


class Smallest:
    """The smallest adversarial perturbation of each of n images so far, of one norm."""

    def __init__(self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], norm: str, wrong: Tensor) -> None:
        self.images, self.labels, self.norm = images, labels, norm
        self.found = torch.where(wrong, 0.0, math.inf).to(images.dtype)  # [n]
        self.adversarials = images.clone()

    def offer(
        self, rows: Int[Tensor, " m"], candidates: Float[Tensor, "m c h w"], defended: Classifier, limit: float | None
    ) -> Tensor:
        """Keep what the classifier gets wrong and is nearer than what is known. [m]: which of them are wrong.

        `limit`: the norm that the attack had to keep to; without one, candidates are stretched too. Raises
        RuntimeError for a candidate that is no number, no image, or beyond the limit: an attack that fails is no
        image that withstands.
        """
        images = self.images[rows]
        if not candidates.isfinite().all():
            raise RuntimeError(f"{self.norm}: an attack returned values that are not finite")
        if candidates.amin() < -SLACK or candidates.amax() > 1 + SLACK:
            raise RuntimeError(f"{self.norm}: an attack left [0, 1]: {candidates.amin():g} to {candidates.amax():g}")
        longest = norm_of(candidates - images, self.norm).amax().item()
        if limit is not None and longest > limit + SLACK:
            raise RuntimeError(f"{self.norm}: an attack of eps {limit:g} returned a perturbation of {longest:g}")
        fooled = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for factor in STRETCHED if limit is None else (1.0,):
            tried = (images + factor * (candidates - images)).clamp(0, 1)
            asked = self.images.clone()  # all, so that each is answered with the noise that is its own
            asked[rows] = tried
            with torch.no_grad():
                wrong = is_wrong(defended(asked), self.labels)[rows]
            norms = norm_of(tried - images, self.norm)
            if limit is not None:
                norms = norms.clamp_max(limit)
            nearer = wrong & (norms < self.found[rows])
            self.found[rows[nearer]] = norms[nearer]
            self.adversarials[rows[nearer]] = tried[nearer]
            fooled |= wrong
        return fooled
