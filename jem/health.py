"""Whether a training run is well: each look at it is judged, for the most part, against what it was while it was well.

The loss of a lost run stays finite for hundreds of steps and says nothing. What changes is the energy gap,
what the chains look like, and the accuracy; often within 25 steps, by orders of magnitude. What is normal
differs by network, data and settings and drifts as a run goes on, so that tight bounds are learnt from the run
itself and fixed ones are wide. benchmarks/divergence.py measures when this notices what.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from jem.config import ObjectiveConfig

WINDOW = 24
"""Healthy looks that are remembered: 600 steps, with a look every 25."""

WARM_UP = 8
"""Healthy looks before bounds learnt from them count: while a run begins, everything moves."""

GAP = 5.0
"""Nats. Chains that follow the model keep the energy gap near 0: healthy runs within +-0.5, and +-3 while they begin.
Where the model has outrun them the gap falls and stays, with little else amiss: to -1 / energy_l2, where the loss
E(x) - E(x') + energy_l2 (E(x)^2 + E(x')^2) is least if nothing ties the two energies together."""

LOST_GAP = 1000.0
"""Nats: needs no second look."""

SLOW = 6
"""Looks in a row that a gap beyond `GAP` may last: the chains of a run that begins catch up sooner."""

PRIOR_CONTRAST = 1 / 3
"""Variance of a pixel that is uniform on [-1, 1]: what chains start with, whatever the data are."""

KNOWN = ("gap", "energy_data", "accuracy")


class Sign(NamedTuple):
    """Something odd about a look; the run is sick once `patience` looks in a row have it."""

    kind: str
    patience: int
    words: str


class Health:
    """Judges every look at a run against what the same run looked like while it was well."""

    def __init__(self, n_classes: int, samples: bool, detects: bool = False) -> None:
        """`samples`: whether the run has chains; a plain classifier does not. `detects`: whether its loss is DAT's: the
        gap then says how well samples are told from data, is wide while chains are on their way, and drives
        nothing away.
        """
        self.chance = 1 / n_classes
        self.samples = samples
        self.detects = detects
        self.known: list[dict[str, float]] = []  # the last healthy looks, oldest first
        self.odd: dict[str, int] = {}  # for how many looks in a row each kind of sign has been there
        self.last_energy: float | None = None  # of data, at the last look

    @classmethod
    def of(cls, objective: ObjectiveConfig, n_classes: int) -> Health:
        return cls(n_classes, objective.samples_needed, objective.p_x_loss == "bce" and not objective.p_x_y_weight)

    def judge(self, figures: dict[str, float], last: bool = False) -> str | None:
        """Why the run is sick, in words; None if it is not.

        `figures`: `Meter.read` of the steps since the last look. Healthy ones become part of what is known. A
        look with a sign that needs company is not called sick, and is not learnt from; unless it is the run's
        `last`, as nothing can clear it of its sign any more.
        """
        signs = list(self._signs(figures))
        self.odd = {sign.kind: self.odd.get(sign.kind, 0) + 1 for sign in signs}
        self.last_energy = figures["energy_data"] if math.isfinite(figures["energy_data"]) else None
        if not signs:
            look = figures | {"gap": _gap(figures)}
            self.known = [*self.known, {key: look[key] for key in KNOWN}][-WINDOW:]
        sick = [sign.words for sign in signs if last or self.odd[sign.kind] >= sign.patience]
        return "; ".join(sick) or None

    def _signs(self, figures: dict[str, float]) -> Iterator[Sign]:
        skipped, steps = round(figures["skipped"]), round(figures["steps"])
        if 10 * skipped > steps:  # a chain that is not finite skips its step's
            words = f"{skipped} of {steps} updates were not finite, and skipped"
            yield Sign("skipped", 1 if 2 * skipped > steps else 2, words)
            if skipped == steps:
                return  # nothing else was measured
        bad = [key for key, value in figures.items() if not math.isfinite(value)]
        if bad:
            yield Sign("numbers", 1, f"not finite: {', '.join(bad)}")
            return
        yield from self._of_accuracy(figures["accuracy"])
        if self.samples:
            yield from self._of_energies(figures)
            yield from self._of_chains(figures)

    def _of_accuracy(self, accuracy: float) -> Iterator[Sign]:
        """How much is left of what lay above chance: less than half is odd, less than a fifth a collapse."""
        usual = self._usual("accuracy")
        if usual is None or usual - self.chance < 0.1:
            return
        left = (accuracy - self.chance) / (usual - self.chance)
        if left < 0.5:
            yield Sign("accuracy", 1 if left < 0.2 else 2, f"accuracy {accuracy:.3g}, it was {usual:.3g}")

    def _of_energies(self, figures: dict[str, float]) -> Iterator[Sign]:
        """The gap by its size and by what it was; energies, whose constant is arbitrary, by their jumps alone."""
        gap, usual = _gap(figures), self._usual("gap")
        if abs(gap) > LOST_GAP:
            yield Sign("lost gap", 1, f"energy gap {gap:.3g}, beyond +-{LOST_GAP:g}")
            return
        if abs(gap) > GAP and not self.detects:
            yield Sign("wide gap", SLOW, f"energy gap {gap:.3g}, for {SLOW} looks beyond +-{GAP:g}")
        if usual is not None and not self.detects:
            width = max(2.0, 12 * self._deviation("gap"))
            if abs(gap - usual) > width:
                within = f"[{usual - width:.3g}, {usual + width:.3g}]"
                yield Sign("gap", 2, f"energy gap {gap:.3g}, it was within {within}")
        if self.last_energy is not None:
            jump = figures["energy_data"] - self.last_energy
            if abs(jump) > max(50.0, 20 * self._usual_jump()):
                yield Sign("jump", 2, f"energy of data {figures['energy_data']:.3g}, a jump of {jump:.3g}")

    def _of_chains(self, figures: dict[str, float]) -> Iterator[Sign]:
        saturation, contrast, data = (figures[key] for key in ("chain_saturation", "chain_contrast", "data_contrast"))
        if saturation > 0.15:
            words = f"{saturation:.0%} of the chains' pixels are saturated beyond what data are"
            yield Sign("saturation", 1 if saturation > 0.5 else 2, words)
        low, high = min(data, PRIOR_CONTRAST) / 5, max(data, PRIOR_CONTRAST) * 5
        if not low <= contrast <= high:
            gross = not low / 10 <= contrast <= high * 10
            words = f"chains have a contrast of {contrast:.2g}, data {data:.2g}"
            yield Sign("contrast", 1 if gross else 2, words)

    def _usual(self, key: str) -> float | None:
        """The median of the healthy looks, once there are enough."""
        return median(look[key] for look in self.known) if len(self.known) >= WARM_UP else None

    def _deviation(self, key: str) -> float:
        """Median absolute deviation of the healthy looks, times 1.4826: a normal's standard deviation."""
        values = [look[key] for look in self.known]
        middle = median(values)
        return 1.4826 * median(abs(value - middle) for value in values)

    def _usual_jump(self) -> float:
        energies = [look["energy_data"] for look in self.known]
        jumps = [abs(after - before) for before, after in pairwise(energies)]
        return median(jumps) if jumps else 0.0

    def state(self) -> dict[str, Any]:
        """All that later judgements depend on, for JSON."""
        return {"known": [dict(look) for look in self.known], "odd": dict(self.odd), "last_energy": self.last_energy}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.known = [dict(look) for look in state["known"]]
        self.odd = dict(state["odd"])
        self.last_energy = state["last_energy"]


def _gap(figures: dict[str, float]) -> float:
    return figures["energy_data"] - figures["energy_samples"]
