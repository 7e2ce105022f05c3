"""The trials that no other one dominates, by two objectives at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.sweep.drawing import (
    BASE,
    BEST,
    FINISHED,
    Marks,
    Scale,
    drawable,
    grid_of,
    legend,
    new_figure,
    scale_over,
    worded,
)
from orchestrator.sweep.table import Row, best, measured, objectives

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from orchestrator.sweep.config import Objective, Sweep

Point = tuple[float, float]

AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""Where a name can stand beside its point: to the right, left, above, below, ..."""


def pareto(rows: Sequence[Row], sweep: Sweep) -> Figure:
    """Two objectives: their front as steps; more: a panel a pair, in which the front is that of all of them."""
    wanted = objectives(sweep)
    finished, front = measured(rows, sweep), best(rows, sweep)
    pairs = list(itertools.combinations(wanted, 2))
    columns = min(3, len(pairs))
    lines = math.ceil(len(pairs) / columns)
    size = (7.2, 5.0) if columns == 1 else (4.4, 3.9)
    figure = new_figure(size[0] * columns, size[1] * lines + 0.4)
    grid = grid_of(figure, len(pairs), columns)
    marks: Marks = {}
    for axes, (first, second) in zip(grid, pairs, strict=True):
        places = {row.name: (row.metrics[first.key], row.metrics[second.key]) for row in finished}
        if len(wanted) == 2:
            axes.step(*_ordered([places[row.name] for row in front], first), where="post", color=BEST, linewidth=1.4)
        dominated = [places[row.name] for row in finished if row not in front]
        _scatter(axes, dominated, marks, "dominated by another", color=FINISHED, alpha=0.45, s=26, linewidth=0)
        name = "on the front" if len(wanted) == 2 else "on the front of all objectives"
        chosen = [places[row.name] for row in front]
        _scatter(axes, chosen, marks, name, color=BEST, s=44, edgecolor="black", linewidth=0.7, zorder=3)
        reference = [places[row.name] for row in finished if row.is_base]
        _scatter(axes, reference, marks, "base", color="none", s=130, marker="s", edgecolor=BASE, linewidth=1.2)
        for along, objective, of in (("x", first, 0), ("y", second, 1)):
            _limits(axes, along, scale_over([place[of] for place in places.values()], objective))
        axes.set_xlabel(worded(first), fontsize=8.5)
        axes.set_ylabel(worded(second), fontsize=8.5)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    legend(figure, marks)
    figure.draw_without_rendering()  # which lays the panels out
    for axes, (first, second) in zip(grid, pairs, strict=True):
        points = [(row.metrics[first.key], row.metrics[second.key]) for row in [*front, *finished]]
        _name(axes, [row.candidate for row in front], points)
    return figure


def _ordered(front: Iterable[Point], first: Objective) -> tuple[list[float], list[float]]:
    """From the best in the first objective on, so that a step is first along x, where the other stays as good."""
    points = sorted(front, reverse=first.mode == "max")
    return [x for x, _ in points], [y for _, y in points]


def _scatter(axes: Axes, points: Sequence[Point], marks: Marks, name: str, **style: Any) -> None:
    if points:
        marks[name] = axes.scatter([x for x, _ in points], [y for _, y in points], **style)


def _limits(axes: Axes, along: str, scale: Scale) -> None:
    low, high = (math.log(end) if scale.log else end for end in (scale.low, scale.high))
    margin = 0.1 * ((high - low) or abs(high) or 1.0)
    ends = (low - margin, high + margin)
    if scale.log:
        axes.set(**{f"{along}scale": "log"})
        getattr(axes, f"set_{along}ticks")([x for x, _ in scale.ticks], [text for _, text in scale.ticks])
        axes.minorticks_off()
    axes.set(**{f"{along}lim": tuple(map(math.exp, ends)) if scale.log else ends})


def _name(axes: Axes, names: Sequence[str], points: Sequence[Point]) -> None:
    """Write names beside the first of the points, wherever that hides no point and no other name; else not."""
    pixels = axes.figure.dpi / 72
    dots = [tuple(axes.transData.transform(point)) for point in points]
    taken = [(x - 4 * pixels, y - 4 * pixels, x + 4 * pixels, y + 4 * pixels) for x, y in dots]
    frame = axes.get_window_extent()
    for name, (x, y) in zip(map(drawable, names), dots, strict=False):
        width, height = 4.6 * pixels * len(name), 9 * pixels
        for right, up in AROUND:
            left = x + right * 8 * pixels - width * (1 - right) / 2
            low = y + up * 8 * pixels - height * (1 - up) / 2
            box = (left, low, left + width, low + height)
            inside = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                place = axes.transData.inverted().transform((left, low))
                axes.text(float(place[0]), float(place[1]), name, fontsize=7.5, va="bottom", ha="left")
                break


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
