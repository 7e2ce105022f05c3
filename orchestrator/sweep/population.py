"""Population-based training: all trials train to a step, the worst go on from the best, and so on to the end.

Jaderberg et al., Population Based Training of Neural Networks, 2017, in its synchronous form (appendix A.1), with
truncation selection. Trials are compared at the same step, however many of them run at once, and who goes on from
whom is a function of what was measured and of the sweep's seed. Ray Tune runs each stretch; its own PBT scheduler
compares whatever trials happen to run, each at another step, and where it is told to wait for all of them, one that
diverges leaves the others waiting for ever.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jem.files import Location
from orchestrator.sweep.axes import valid
from orchestrator.sweep.config import OBJECTIVES, Sweep
from orchestrator.sweep.fork import Fork, hold, note
from orchestrator.sweep.space import OPTIONS, RANGES, Axis, in_space, points
from orchestrator.sweep.table import Row

FACTORS = (0.8, 1.2)
"""By which a setting is multiplied (section 4.1.1)."""

RESAMPLED = 0.25
"""How often a setting is drawn anew in place of that."""


@dataclass(frozen=True)
class Stretch:
    """Part of a search: all trials up to `until`; None: to their ends."""

    name: str
    until: int | None


def stretches(sweep: Sweep) -> list[Stretch]:
    """The parts that a search is made of: one, but with PBT."""
    interval = sweep.config.scheduler.interval_steps
    if sweep.config.scheduler.name != "pbt" or interval is None:
        return [Stretch("search", None)]
    steps = range(interval, sweep.run.steps, interval)
    return [*(Stretch(f"search-{step}", step) for step in steps), Stretch("search", None)]


def evolve(rows: Sequence[Row], sweep: Sweep, trials: Location, step: int) -> list[Fork]:
    """Write down which trials go on from which others; they do so when they begin again. Doing it twice is as once.

    `rows` are the trials of the search; those count that wait at `step`. The base stays the base, to be compared with.
    """
    objective = OBJECTIVES[sweep.config.objective[0]]
    sign = 1 if objective.mode == "min" else -1
    here = [row for row in rows if row.status == "waiting" and row.step == step and objective.key in row.metrics]
    ranked = sorted(here, key=lambda row: (sign * row.metrics[objective.key], row.number))
    n = min(-int(-len(ranked) * sweep.config.scheduler.quantile // 1), len(ranked) // 2)
    best, others = ranked[:n], [row for row in ranked if not row.is_base]
    worst = [row for row in others[len(others) - n :] if row not in best]
    forks = []
    for row in worst:
        chance = random.Random(f"{sweep.config.seed} {step} {row.name}")
        donor = chance.choice(best)
        if hold(trials / donor.name, step) != step:
            continue  # its checkpoint could not be written: nobody goes on from it
        fork = Fork(f"{step}-{row.name}", donor.name, step, explored(sweep, donor.point, chance))
        note(trials / row.name, fork)
        forks.append(fork)
    return forks


def explored(sweep: Sweep, point: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A point near another one: each setting times 0.8 or 1.2, the next one of a list, or drawn anew."""
    anew = points(sweep.space, "random", 1, chance.getrandbits(31), lambda point: valid(sweep.run, point))[0]
    near = {}
    for axis in sweep.space:
        fresh = chance.random() < RESAMPLED or axis.key not in point  # a condition of its did not hold
        if axis.key in anew or not fresh:
            nothing = point.get(axis.key) is None and axis.key in anew  # the base has none: no factor moves it
            near[axis.key] = anew[axis.key] if fresh or nothing else _near(axis, point[axis.key], chance)
    inside = in_space(sweep.space, near)
    return inside if valid(sweep.run, inside) else anew


def _near(axis: Axis, value: Any, chance: random.Random) -> Any:
    if axis.kind in RANGES:
        factor = chance.choice(FACTORS)
        if value is not None and axis.kind in ("int", "logint") and round(value * factor) == value:
            return value + (1 if factor > 1 else -1)
        return None if value is None else value * factor
    assert axis.kind in OPTIONS
    if value not in axis.values:  # the base's, which need not be one of them
        return chance.choice(axis.values)
    place = axis.values.index(value) + chance.choice((-1, 1))
    return axis.values[min(max(place, 0), len(axis.values) - 1)]
