"""What every command ends with: one JSON object on stdout's last line, and an exit code."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

EXIT_CODES = {
    "finished": 0,
    "planned": 0,
    "listed": 0,
    "submitted": 0,
    "fit": 0,
    "failed": 1,
    "bad configuration": 2,
    "bad data": 2,
    "no good checkpoint": 3,
    "diverged": 4,
    "stopped": 143,
}
"""A status as an exit code; any other status is a failure, 1."""


@dataclass
class Result:
    """`checkpoint` is an absolute path or URI of a directory, `step` the optimiser steps done."""

    run_id: str | None = None
    name: str | None = None
    checkpoint: str | None = None
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    status: str = "failed"
    weights: str | None = None  # which of the checkpoint's are final: model, ema or best
    samples: str | None = None  # the newest picture of the chains
    curves: str | None = None  # losses, energies, accuracy against steps
    model: str | None = None  # the registered model, such as models:/jem-digits/3
    champion: str | None = None  # whether that became its champion, and why: yes: ..., no: ...
    tracking_uri: str | None = None
    message: str = ""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.status, 1)

    def json(self) -> str:
        """One line of JSON; a figure that is not a number is null, as JSON has none."""
        return json.dumps(_without_nan(asdict(self)))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(result: Result) -> None:
    """The result as a short table on stdout, for the person at the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    console.print(f"{result.name}: {result.status} at step {result.step}", soft_wrap=True, highlight=False)
    table = Table()  # a title would be broken to the width of the columns
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result.metrics.items():
        if not name.startswith("train/"):
            table.add_row(name, f"{value:.4f}")
    console.print(table)
    lines = {
        "checkpoint": result.checkpoint,
        "final weights": result.weights,
        "samples": result.samples,
        "curves": result.curves,
        "model": result.model,
        "champion": result.champion,
    }
    for label, text in lines.items():
        if text:
            console.print(f"{label}: {text}", soft_wrap=True, highlight=False)
    if result.tracking_uri:
        console.print(f"MLflow: run {result.run_id} in {result.tracking_uri}", soft_wrap=True, highlight=False)
