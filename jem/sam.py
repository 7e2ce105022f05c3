"""Sharpness-aware minimisation: down the gradient that the loss has where it is highest near the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from jem.config import OptimizerConfig

T = TypeVar("T")


def sharpness_aware(backward: Callable[[], T], network: nn.Module, config: OptimizerConfig) -> T:
    """Leave grad L(w + eps) where the weights w keep their gradients; what `backward` gave at w itself.

        eps = rho g / |g|            SAM (Foret et al., 2021); for JEM: SADA (Yang et al., 2023)
        eps = rho w^2 g / |w g|      ASAM (Kwon et al., 2021, their eta being 0), with config.sam_adaptive

    g = grad L(w), of all weights together and as reduced over all ranks, so that these go up alike.

    `backward` leaves the gradient of one and the same loss in the weights, whenever it is called: what the network
    draws (dropout) is drawn again, and only the first call counts for its buffers (running statistics). The weights
    are exactly w afterwards.
    """
    cuda = {parameter.device for parameter in network.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cuda, key=str)):
        seen = backward()
    with ascended(network, config):
        backward()
    return seen


@contextlib.contextmanager
def ascended(network: nn.Module, config: OptimizerConfig) -> Iterator[None]:
    """The weights at w + eps, and back: they and the buffers are then what they were, bit for bit."""
    held = [*network.parameters(), *network.buffers()]
    before = [tensor.detach().clone() for tensor in held]
    ascend(list(network.parameters()), config)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)


@torch.no_grad()
def ascend(parameters: list[nn.Parameter], config: OptimizerConfig) -> None:
    """Weights w become w + eps, with g in their `grad`: see `sharpness_aware`.

    Where g is 0 they stay. Where |g| is not finite they become NaN, and with them the second gradient: so
    `guarded_update` skips the update, and nothing waits for the host.
    """
    moving = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in moving if p.grad is not None]
    scaled = [p * g for p, g in zip(moving, gradients, strict=True)] if config.sam_adaptive else gradients
    norm = torch.nn.utils.get_total_norm(scaled)
    length = (config.sam_rho / norm.where(norm.isfinite(), torch.nan)).where(norm != 0, 0.0)
    for weight, direction in zip(moving, scaled, strict=True):
        weight.add_(length * (weight * direction if config.sam_adaptive else direction))
