"""How well p(y|x) names the class."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor


def accuracy(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """The share of images whose most probable class is the right one; the first class wins a tie."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def nll(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """Mean -log p(y|x), in nats."""
    return F.cross_entropy(logits.double(), labels).item()
