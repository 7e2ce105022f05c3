"""What the pictures of a sweep share: places and ticks along a parameter, marks of trials, labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jem.settings import flatten
from orchestrator.sweep.space import OPTIONS, Axis, words
from orchestrator.sweep.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from orchestrator.sweep.config import Objective, Sweep

FINISHED, PRUNED, BAD, BASE, BEST = "tab:blue", "tab:grey", "tab:red", "black", "tab:orange"

LOG_FROM = 20.0
"""Positive figures that span more than this factor are drawn on a logarithmic scale."""

Marks = dict[str, Any]
"""What a legend shows: label to a drawn mark."""


@dataclass(frozen=True)
class Scale:
    """Where values lie along an axis: numbers between low and high, or options at 0, 1, 2, ..."""

    low: float
    high: float
    log: bool = False
    options: tuple[str, ...] = ()

    def place(self, value: Any) -> float | None:
        """A value's coordinate; None if it has none, as a base's none among numbers."""
        if self.options:
            text = _option(value)
            return float(self.options.index(text)) if text in self.options else None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if number and math.isfinite(value) and (value > 0 or not self.log) else None

    def unit(self, place: float) -> float:
        """A coordinate as a fraction of the axis; the ends for what lies beyond them."""
        if self.high == self.low:
            return 0.5
        low, high, x = (math.log(v) if self.log else v for v in (self.low, self.high, place))
        return min(max((x - low) / (high - low), 0.0), 1.0)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        if self.options:
            return [(float(k), drawable(text, 14)) for k, text in enumerate(self.options)]
        found = _decades(self.low, self.high) if self.log else _linear(self.low, self.high)
        return [(x, f"{x:.4g}") for x in found]

    def apply(self, axes: Axes, others: Iterable[float] = ()) -> None:
        """Scale, limits and ticks of a picture's x; `others` are coordinates beyond the axis that are to be seen."""
        ends = [self.low, self.high, *others]
        if self.log:
            axes.set_xscale("log")
            low, high = (math.log(end) for end in (min(ends), max(ends)))
            axes.set_xlim(math.exp(low - 0.06 * (high - low)), math.exp(high + 0.06 * (high - low)))
        else:
            margin = 0.5 if self.options else 0.06 * (max(ends) - min(ends))
            axes.set_xlim(min(ends) - margin, max(ends) + margin)
        crowded = len(self.options) > 1 and sum(len(text) + 2 for _, text in self.ticks) > 34
        axes.set_xticks([x for x, _ in self.ticks], [text for _, text in self.ticks], rotation=25 if crowded else 0)
        axes.minorticks_off()
        axes.tick_params(labelsize=8)


def scale_of(axis: Axis) -> Scale:
    if axis.kind in OPTIONS:
        return Scale(0, len(axis.values) - 1, options=tuple(_option(value) for value in axis.values))
    return Scale(float(axis.values[0]), float(axis.values[1]), axis.kind.startswith("log"))


def scale_over(values: Sequence[float], objective: Objective) -> Scale:
    """Of an objective's values, with room at neither end."""
    return Scale(min(values), max(values), worth_log(values, objective))


def worth_log(values: Iterable[float], objective: Objective) -> bool:
    found = list(values)
    return objective.mode == "min" and min(found, default=0) > 0 and max(found) > LOG_FROM * min(found)


def jitter(number: int) -> float:
    """A small shift, the same for the same trial, that keeps equal options apart."""
    return 0.36 * ((0.618034 * number) % 1.0 - 0.5)


def draw_trials(
    axes: Axes, places: Mapping[str, float], rows: Sequence[Row], objective: Objective, best: set[str], marks: Marks
) -> None:
    """Mark the trials that have a place: at their value, or at the worse edge if they came to nothing."""
    key, edge = objective.key, 0.955 if objective.mode == "min" else 0.045
    there = [row for row in rows if row.name in places]
    done = [row for row in there if row.status == "finished" and key in row.metrics and not row.is_base]
    base = [row for row in there if row.status == "finished" and key in row.metrics and row.is_base]
    cut = [row for row in there if row.status == "pruned" and key in row.metrics]
    bad = [row for row in there if row.status in ("diverged", "failed")]

    def mark(label: str, chosen: Sequence[Row], heights: Sequence[float], **style: Any) -> None:
        if chosen:
            marks[label] = axes.scatter([places[row.name] for row in chosen], heights, **style)

    mark("finished", done, [r.metrics[key] for r in done], s=24, color=FINISHED, alpha=0.75, linewidth=0, zorder=2)
    mark("pruned, its last value", cut, [r.metrics[key] for r in cut], s=20, color="none", edgecolor=PRUNED, alpha=0.7)
    top = [row for row in done + base if row.name in best]
    ring = {"s": 95, "color": "none", "edgecolor": BEST, "linewidth": 1.8, "zorder": 4}
    mark("best" if len(top) < 2 else "best (no trial is better in all)", top, [r.metrics[key] for r in top], **ring)
    mark("base", base, [r.metrics[key] for r in base], s=80, marker="*", color=BASE, zorder=3)
    style = {"marker": "x", "s": 30, "color": BAD, "linewidth": 1.3, "transform": axes.get_xaxis_transform()}
    mark("diverged or failed", bad, [edge] * len(bad), **style)


def draw_base(axes: Axes, rows: Iterable[Row], objective: Objective) -> float | None:
    """A line at the base's value, which is given back; None if it has none."""
    for row in rows:
        if row.is_base and row.status == "finished" and objective.key in row.metrics:
            found = row.metrics[objective.key]
            axes.axhline(found, color=BASE, linestyle="--", linewidth=0.8, alpha=0.7, zorder=0)
            return found
    return None


def fit_heights(axes: Axes, rows: Iterable[Row], objective: Objective) -> None:
    """The y axis from the best to the worst that is drawn, with room for the marks at the worse edge."""
    shown = [
        r.metrics[objective.key] for r in rows if r.status in ("finished", "pruned") and objective.key in r.metrics
    ]
    log = worth_log(shown, objective)
    low, high = ((math.log(x) if log else x) for x in (min(shown), max(shown)))
    size = (high - low) or abs(high) or 1.0
    below, above = (0.07, 0.16) if objective.mode == "min" else (0.16, 0.07)
    low, high = low - below * size, high + above * size
    if log:
        axes.set_yscale("log")
        low, high = math.exp(low), math.exp(high)
        axes.set_yticks(_decades(low, high), [f"{y:.4g}" for y in _decades(low, high)])
        axes.minorticks_off()
    axes.set_ylim(low, high)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def base_value(sweep: Sweep, key: str) -> Any:
    """What the base has at a dotted key, which can be one inside a mapping such as model.options."""
    flat: dict[str, Any] = flatten(sweep.run)
    if key in flat:
        return flat[key]
    home = next((k for k, found in flat.items() if key.startswith(f"{k}.") and isinstance(found, dict)), None)
    found: Any = flat[home] if home else None
    for part in key[len(home or "") + 1 :].split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def worded(objective: Objective) -> str:
    return f"{objective.key} ({'lower' if objective.mode == 'min' else 'higher'} is better)"


def drawable(text: str, length: int = 60) -> str:
    """Text that the font has letters for and matplotlib takes for no formula, shortened."""
    text = text if len(text) <= length else text[: length - 3] + "..."
    return "".join(c if ord(c) < 0x250 and c.isprintable() else "?" for c in text).replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: there is no screen, and this may run in a thread

    return Figure(figsize=(width, height), layout="constrained")


def legend(figure: Figure, marks: Marks, columns: int | None = None) -> None:
    columns = columns or len(marks)
    figure.legend(marks.values(), marks.keys(), loc="outside upper center", ncols=columns, fontsize=8.5, frameon=False)


def grid_of(figure: Figure, panels: int, columns: int) -> list[Axes]:
    """Axes row by row; those beyond the last panel are blank."""
    grid = figure.subplots(math.ceil(panels / columns), columns, squeeze=False).flatten()
    for axes in grid[panels:]:
        axes.set_axis_off()
    return list(grid[:panels])


def _option(value: Any) -> str:
    return words(value)


def _linear(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    margin = 1e-9 * (high - low)
    return [float(x) for x in found if low - margin <= x <= high + margin]


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between two positive numbers; only some of them where they are many."""
    found: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = [float(f"{step}e{exponent}") for exponent in exponents for step in steps]
        found = [x for x in every if low * (1 - 1e-9) <= x <= high * (1 + 1e-9)]
        if len(found) <= 5:
            break
    while len(found) > 6:
        found = found[::2]
    return found if len(found) > 1 else _linear(low, high)
