"""Parallel coordinates: a vertical line a parameter and an objective, a path across them a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.sweep.drawing import BAD, BASE, BEST, base_value, jitter, new_figure, scale_of, scale_over, worded
from orchestrator.sweep.table import Row, best, measured, objectives

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from orchestrator.sweep.config import Sweep
    from orchestrator.sweep.drawing import Scale

NOWHERE = -0.14
"""The height at which a trial crosses a parameter that was not drawn for it, and a figure that it did not reach."""


def parallel(rows: Sequence[Row], sweep: Sweep) -> Figure:
    """The search, coloured by the first objective; the base is black, what came to nothing thin and red."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    wanted = objectives(sweep)
    first = wanted[0]
    finished = measured(rows, sweep)
    bad = [row for row in rows if row.status in ("diverged", "failed") and row.point]
    top = {row.name for row in best(rows, sweep)}
    scales = {axis.key: scale_of(axis) for axis in sweep.space}
    scales |= {o.key: scale_over([row.metrics[o.key] for row in finished], o) for o in wanted}
    colour = scales[first.key]
    norm = (LogNorm if colour.log else Normalize)(colour.low, colour.high)
    mappable = ScalarMappable(norm, "viridis" if first.mode == "min" else "viridis_r")
    figure = new_figure(max(6.0, 1.55 * len(scales) + 1.2), 4.6)
    axes = figure.subplots()
    xs = range(len(scales))
    for row in bad:
        axes.plot(xs, _path(scales, row.point, row.number), color=BAD, linewidth=0.8, alpha=0.5, linestyle="--")
    sign = 1 if first.mode == "min" else -1
    for row in sorted(finished, key=lambda row: -sign * row.metrics[first.key]):
        base = {axis.key: base_value(sweep, axis.key) for axis in sweep.space} if row.is_base else {}
        path = _path(scales, base | row.point | row.metrics, row.number)
        if row.name in top:
            axes.plot(xs, path, color=BEST, linewidth=5.0, alpha=0.6, solid_capstyle="round")
        rgba = mappable.to_rgba([row.metrics[first.key]])[0]  # type: ignore[arg-type]
        axes.plot(xs, path, color=BASE if base else rgba, linewidth=1.6, alpha=0.9, linestyle=":" if base else "-")
    for x, scale in enumerate(scales.values()):
        _vertical(axes, x, [(scale.unit(place), text) for place, text in scale.ticks])
    seldom = [k for k, a in enumerate(sweep.space) if a.when and any(a.key not in r.point for r in [*finished, *bad])]
    for x in seldom:
        _text(axes, x, NOWHERE, "not drawn", style="italic")
    for x in range(len(sweep.space), len(scales)) if bad else ():
        _text(axes, x, NOWHERE, "no figure", style="italic")
    names = [_broken(axis.key, ".") for axis in sweep.space]
    names += [f"{_broken(o.key, '/')}\n({'lower' if o.mode == 'min' else 'higher'} is better)" for o in wanted]
    axes.set_xticks(xs, names, fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.set_xlim(-0.45, len(scales) - 0.75)
    axes.set_ylim(NOWHERE - 0.06 if bad or seldom else -0.05, 1.04)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mappable, ax=axes, pad=0.01, aspect=30)
    bar.set_label(worded(first), fontsize=8.5)
    bar.set_ticks([x for x, _ in colour.ticks], labels=[text for _, text in colour.ticks], fontsize=8)
    bar.minorticks_off()
    says = ["wide: the best" if len(wanted) == 1 else "wide: no trial is better in all objectives"]
    says += ["dotted: the base"] if any(row.is_base for row in finished) else []
    says += ["red: diverged or failed"] if bad else []
    figure.suptitle("; ".join(says), fontsize=9)
    return figure


def _path(scales: Mapping[str, Scale], values: Mapping[str, Any], number: int) -> list[float]:
    """A trial's heights; paths through the same option lie beside each other."""
    heights = []
    for key, scale in scales.items():
        place = scale.place(values[key]) if key in values else None
        height = NOWHERE if place is None else scale.unit(place)
        heights.append(height + 0.09 * jitter(number) if scale.options or place is None else height)
    return heights


def _broken(key: str, at: str) -> str:
    """A long key on two lines, about equally long."""
    if len(key) < 16:
        return key
    cuts = [i + 1 for i, character in enumerate(key) if character == at]
    cut = min(cuts, key=lambda i: abs(i - len(key) / 2), default=0)
    return f"{key[:cut]}\n{key[cut:]}" if cut else key


def _vertical(axes: Axes, x: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.axvline(x, color="black", linewidth=0.8, alpha=0.6)
    for y, text in ticks:
        axes.plot([x - 0.03, x], [y, y], color="black", linewidth=0.8)
        _text(axes, x, y, text)


def _text(axes: Axes, x: int, y: float, text: str, style: str = "normal") -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    axes.text(x - 0.05, y, text, ha="right", va="center", fontsize=7.5, bbox=box, fontstyle=style, zorder=5)
