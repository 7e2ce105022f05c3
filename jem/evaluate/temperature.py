"""Temperature scaling (Guo et al., 2017, section 4.2): one number, fitted on validation, that divides the logits.

The order of the classes stays, so accuracy does; so does E(x), which is read from the logits as they were.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from jem.errors import DivergedError
from jem.evaluate.calibration import confidence_bins, ece
from jem.evaluate.classification import nll

LOWEST, HIGHEST = 1e-3, 1e3


class Temperature(NamedTuple):
    """A temperature and what it did on the data it was fitted on. NLL in nats; ECE of 20 equal-width bins."""

    value: float
    reason: str  # "fitted", or why it is not the minimiser
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float


def fit_temperature(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Temperature:
    """T > 0 that minimises the NLL of softmax(logits / T), found to the last digits; the same every time.

    The NLL is convex in b = 1 / T, with the derivative mean(E_p[f] - f_y) for p = softmax(b f): bisection in
    log T on its sign cannot miss. Where there is no minimiser, or none from 0.001 on, `reason` says so:
    - no image is misclassified, so the NLL falls all the way to T = 0 and nothing says how sure is too sure: T is 1.
    - the logits tell less than nothing, and the NLL falls all the way to T = infinity: T is 1000 times their largest
      difference, or 1000, and p all but uniform.
    - the logits are tiny: T is 0.001.
    Raises ValueError if there are no images, DivergedError if a logit is not finite.
    """
    if not len(labels):
        raise ValueError("temperature: no images to fit it on; it needs a validation split of at least one")
    f = logits.double()
    if not f.isfinite().all():
        raise DivergedError("temperature: a logit is not finite; the model diverged, use an earlier checkpoint")
    value, reason = minimiser(f, labels)
    if nll(f / value, labels) > nll(f, labels):  # by rounding: the two are within the last digits of each other
        value = 1.0
    before, after = f, f / value
    return Temperature(
        value,
        reason,
        nll(before, labels),
        nll(after, labels),
        ece(confidence_bins(before, labels)),
        ece(confidence_bins(after, labels)),
    )


def minimiser(f: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> tuple[float, str]:
    """T and "fitted", or the T to use where there is no minimiser, and why."""
    above = f - f.gather(1, labels[:, None])  # only differences matter, and those of large logits keep their digits

    def rises(log_t: float) -> bool:
        """Whether the NLL rises with T: its derivative in 1 / T is negative."""
        return bool(((above / math.exp(log_t)).softmax(dim=1) * above).sum() < 0)

    highest = HIGHEST * max(1.0, above.abs().max().item())  # logits of any size may tell something
    low, high = math.log(LOWEST), math.log(highest)
    if above.max() <= 0:
        return 1.0, "nothing is misclassified: the NLL falls all the way to T = 0"
    if rises(low):
        return LOWEST, "the logits are tiny: the NLL still falls at the lowest T"
    if not rises(high):
        return highest, "the logits tell less than nothing: the NLL still falls at the highest T"
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return math.exp(middle), "fitted"
        low, high = (low, middle) if rises(middle) else (middle, high)
