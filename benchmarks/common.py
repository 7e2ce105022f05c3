"""What the benchmarks share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing is installed

from orchestrator.facts import machine

__all__ = ["machine", "save", "seeds_of", "steps_logged"]


def seeds_of(text: str) -> range:
    """`3` or `0-9`."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def save(result: dict[str, Any], out: Path | None) -> None:
    """As JSON, where that was asked for."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def steps_logged(events: list[dict[str, Any]]) -> dict[int, float]:
    """When (seconds since 1970) the points of a run's training curves were logged, by step."""
    return {e["step"]: e["time"] / 1000 for e in events if e["kind"] == "metrics" and "train/loss" in e["metrics"]}
