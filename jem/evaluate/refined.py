"""JEM-k: a classifier that first moves the image down its own energy (Grathwohl et al., 2020, section 5.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from jem.config import SGLDConfig
from jem.energy import EnergyFn, Logits, energy_fn
from jem.evaluate.attacks import Classifier
from jem.sgld import along, down


def differentiable(through: bool, energy: EnergyFn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies [n] and their gradients, which can be differentiated themselves if `through`."""
    with torch.enable_grad():
        position = x if through else x.detach().requires_grad_(True)
        value = energy(position)
        (gradient,) = torch.autograd.grad(value.sum(), position, create_graph=through)
    return value, gradient


def refined(
    logits: Logits,
    k: int,
    config: SGLDConfig,
    copies: int,
    copy_noise: float,
    generator: torch.Generator,
    straight: bool = False,
    thrifty: bool = False,
) -> Classifier:
    """Logits of images on [0, 1] after k SGLD steps, averaged over noisy copies; k = 0: as the network gives them.

    The gradient goes through all steps, second derivatives of the energy included; or, `straight`, past them, as if
    the refinement were the identity (BPDA, Athalye et al., 2018; the released code does so). The noise of `copy_noise`
    (on the [-1, 1] scale) and of the steps is drawn anew at each call, from `generator`.

    A gradient through k steps keeps what a training step keeps 3k times over, for all copies. `thrifty`: it is computed
    once more when it is asked for, of as many copies at a time as there is memory for: a third more passes.
    """

    def walk(position: Tensor, noise: Sequence[Tensor], through: bool) -> Tensor:
        """Logits after k steps; a graph is made of them only to go through."""
        begin = position
        for step in range(k):
            now = along(config, step // config.inner_steps)  # as in a chain of the training
            _, gradient = differentiable(through, energy_fn(logits), position)
            position = down(position, gradient, now, noise[step])
        return logits(position if through else begin + (position - begin).detach())

    def classify(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        if k == 0:
            return logits(2 * x - 1)
        position = (2 * x - 1).repeat(copies, 1, 1, 1)
        first, *noise = (
            torch.randn(position.shape, generator=generator, device=x.device, dtype=x.dtype) for _ in range(k + 1)
        )
        begin = position + copy_noise * first
        through = x.requires_grad and not straight
        again = through and thrifty
        found = cast(Tensor, _Again.apply(begin, walk, noise)) if again else walk(begin, noise, through)
        return found.view(copies, len(x), found.shape[1]).mean(dim=0)

    return classify


class _Again(torch.autograd.Function):
    """`walk`, without a graph, and its gradient by walking again, in pieces that the device has room for."""

    @staticmethod
    def forward(ctx: Any, begin: Tensor, walk: Callable[..., Tensor], noise: list[Tensor]) -> Tensor:
        ctx.save_for_backward(begin)
        ctx.walk, ctx.noise = walk, noise
        return walk(begin, noise, False)

    @staticmethod
    def backward(ctx: Any, *outside: Any) -> tuple[Tensor, None, None]:
        (begin,) = ctx.saved_tensors
        size = len(begin)
        while True:
            try:
                parts = [_gradient(ctx.walk, *part) for part in _parts(size, begin, ctx.noise, outside[0])]
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = (size + 1) // 2
            else:
                return torch.cat(parts), None, None


def _parts(
    size: int, begin: Tensor, noise: list[Tensor], outside: Tensor
) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
    for i in range(0, len(begin), size):
        rows = slice(i, i + size)
        yield begin[rows], [one[rows] for one in noise], outside[rows]


def _gradient(walk: Callable[..., Tensor], begin: Tensor, noise: list[Tensor], outside: Tensor) -> Tensor:
    with torch.enable_grad():
        position = begin.detach().requires_grad_(True)
        return torch.autograd.grad(walk(position, noise, True), position, outside)[0]
