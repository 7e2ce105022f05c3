"""The run's curves as one picture, drawn from its log."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from orchestrator import events
from orchestrator.events import Event

PANELS = {
    "loss": ("train/loss", "train/cross_entropy"),
    "energy (nats)": ("train/energy_data", "train/energy_samples", "train/energy_gap"),
    "accuracy": ("train/accuracy", "val/accuracy"),
    "validation": ("val/nll", "val/ece"),
}


def curves_png(log_path: Path) -> bytes | None:
    """A PNG of the curves against steps, and of where the run went back; None if there is nothing to draw yet."""
    series = read_series(log_path)
    rollbacks = sorted({event["from_step"] for event in events.read(log_path)[0] if event["kind"] == "rollback"})
    panels = {title: [k for k in keys if len(series[k]) > 1] for title, keys in PANELS.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    if not panels:
        return None
    from matplotlib.figure import Figure  # no pyplot: there is no screen, and this may run in a thread

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, keys) in zip(grid, panels.items(), strict=False):
        for key in keys:
            steps = sorted(series[key])
            axes.plot(steps, [series[key][step] for step in steps], label=key, linewidth=1.2)
        for step in rollbacks:
            label = "diverged, went back" if step == rollbacks[0] else None
            axes.axvline(step, color="tab:red", alpha=0.6, linestyle=":", linewidth=1.2, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def read_series(log_path: Path) -> dict[str, dict[int, float]]:
    """Metric to step to value; what was run again after a rollback counts as it was last."""
    return series_of(events.read(log_path)[0])


def series_of(told: Iterable[Event]) -> dict[str, dict[int, float]]:
    """The same of events."""
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for event in told:
        if event["kind"] == "metrics":
            for key, value in event["metrics"].items():
                series[key][event["step"]] = value
    return series


def latest(log_path: Path) -> dict[str, float]:
    """The last value of each metric: what is known of a run that did not finish."""
    return {key: points[max(points)] for key, points in read_series(log_path).items()}
