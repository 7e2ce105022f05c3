"""A sweep's search as pictures, made of the rows of its trials alone."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jem.files import Location
from orchestrator.sweep.drawing import (
    BEST,
    Marks,
    base_value,
    draw_base,
    draw_trials,
    drawable,
    fit_heights,
    grid_of,
    jitter,
    legend,
    new_figure,
    scale_of,
    worded,
)
from orchestrator.sweep.importance import importance_picture
from orchestrator.sweep.parallel import parallel
from orchestrator.sweep.pareto import pareto
from orchestrator.sweep.space import Axis
from orchestrator.sweep.table import GOING_ON, Row, best, measured, objectives

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from orchestrator.sweep.config import Objective, Sweep

COLUMNS = 4


def draw_plots(rows: Sequence[Row], sweep: Sweep, folder: Path) -> list[str]:
    """Write the pictures of a search as PNGs; their names. What there are too few trials for is left out."""
    searched = [row for row in rows if row.stage == "search"]
    written = []
    for name, draw in _drawings(searched, sweep).items():
        figure = draw(searched, sweep)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110)
            (Location.of(folder) / name).write(buffer.getvalue())
            written.append(name)
    return written


def _drawings(rows: Sequence[Row], sweep: Sweep) -> dict[str, Callable[[Sequence[Row], Sweep], Figure | None]]:
    finished = measured(rows, sweep)
    functions = {
        "objectives.png": (against_parameters, any(row.point for row in finished)),
        "parallel.png": (parallel, sum(bool(row.point) for row in finished) > 1),
        "importance.png": (importance_picture, True),
        "pareto.png": (pareto, len(finished) > 1 and len(sweep.config.objective) > 1),
        "progress.png": (progress, bool(finished)),
    }
    return {name: draw for name, (draw, enough) in functions.items() if enough}


def against_parameters(rows: Sequence[Row], sweep: Sweep) -> Figure:
    """For each objective a panel a parameter; trials that came to nothing are marked at the edge that is worse."""
    wanted = objectives(sweep)
    lines = math.ceil(len(sweep.space) / (COLUMNS if len(wanted) == 1 else COLUMNS + 1))
    columns = math.ceil(len(sweep.space) / lines)
    figure = new_figure(max(6.5, 2.9 * columns + 0.5), 2.5 * lines * len(wanted) + 0.6)
    marks: Marks = {}
    for part, objective in zip(figure.subfigures(len(wanted), 1, squeeze=False)[:, 0], wanted, strict=True):
        for k, (axes, axis) in enumerate(zip(grid_of(part, len(sweep.space), columns), sweep.space, strict=True)):
            _panel(axes, axis, rows, sweep, objective, marks)
            if k % columns == 0:
                axes.set_ylabel(worded(objective).replace(" (", "\n("), fontsize=8.5)
    legend(figure, marks)
    return figure


def _panel(axes: Axes, axis: Axis, rows: Sequence[Row], sweep: Sweep, objective: Objective, marks: Marks) -> None:
    scale = scale_of(axis)
    places = {}
    for row in rows:
        place = scale.place(row.point[axis.key]) if axis.key in row.point else None
        if place is not None:
            places[row.name] = place + (jitter(row.number) if scale.options else 0.0)
    at = scale.place(base_value(sweep, axis.key))
    base = [row.name for row in rows if row.is_base]
    if at is not None:
        places |= dict.fromkeys(base, at)
    draw_trials(axes, places, rows, objective, {row.name for row in best(rows, sweep)}, marks)
    draw_base(axes, rows, objective)
    fit_heights(axes, rows, objective)
    scale.apply(axes, [at] if base and at is not None else [])
    condition = f"\nonly with {drawable(axis.condition, 34)}" if axis.when else ""
    axes.set_xlabel(f"{axis.key}{condition}", fontsize=8.5)


def progress(rows: Sequence[Row], sweep: Sweep) -> Figure:
    """The best so far against the number of trials that are over, in the order in which they ended."""
    over = sorted((row for row in rows if row.status not in GOING_ON), key=lambda row: (row.ended, row.number))
    places = {row.name: float(k) for k, row in enumerate(over, 1)}
    wanted = objectives(sweep)
    columns = min(2, len(wanted))
    figure = new_figure(7.4 if columns == 1 else 11.5, 3.2 * math.ceil(len(wanted) / columns) + 0.6)
    top = {row.name for row in best(rows, sweep)} if len(wanted) == 1 else set()
    marks: Marks = {}
    for axes, objective in zip(grid_of(figure, len(wanted), columns), wanted, strict=True):
        draw_trials(axes, places, over, objective, top, marks)
        draw_base(axes, over, objective)
        better = min if objective.mode == "min" else max
        known = [row for row in over if row.status == "finished" and objective.key in row.metrics]
        heights = list(itertools.accumulate((row.metrics[objective.key] for row in known), better))
        xs = [*(places[row.name] for row in known), float(len(over))]
        (marks["best so far"],) = axes.step(xs, [*heights, heights[-1]], where="post", color=BEST, zorder=1)
        fit_heights(axes, over, objective)
        axes.set_xlim(0.4, len(over) + 0.6)
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
        axes.set_xlabel("trials that are over", fontsize=8.5)
        axes.set_ylabel(worded(objective), fontsize=8.5)
    legend(figure, marks)
    return figure
