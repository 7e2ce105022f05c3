"""The chains' gradient, compiled: the same arithmetic in fewer passes over memory (torch.compile)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from jem import sgld
from jem.energy import EnergyFn


class Compiled:
    """`sgld.differentiate`, compiled when it is first called; as it comes where that fails, with one warning.

    The results differ from the plain function's in their last bits.
    """

    def __init__(self) -> None:
        self.compiled: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.failed = False

    def __call__(
        self, energy_fn: EnergyFn, x: Float[Tensor, "n ..."]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n ..."]]:
        if self.failed:
            return sgld.differentiate(energy_fn, x)
        if self.compiled is None:
            self.compiled = torch.compile(_differentiate, fullgraph=True, dynamic=False)
        try:
            with torch.no_grad():  # func.grad sees to itself; weights that no gradient is asked of are constants
                return self.compiled(energy_fn, x)
        except _failures() as error:
            self.failed = True
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("backend=")]
            reason = lines[0].strip() if lines else type(error).__name__
            warnings.warn(f"compile=true: the chains are not compiled but run as they are: {reason}", stacklevel=2)
            return sgld.differentiate(energy_fn, x)


def _differentiate(energy_fn: EnergyFn, x: Tensor) -> tuple[Tensor, Tensor]:
    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        energy = energy_fn(x)
        return energy.sum(), energy

    gradient, (_, energy) = torch.func.grad_and_value(total, has_aux=True)(x)
    return energy, gradient


@functools.cache
def _failures() -> tuple[type[BaseException], ...]:
    """What the compiler raises: imported late, as it takes a second."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, FailOnRecompileLimitHit, InductorError
