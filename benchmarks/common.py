"""What the benchmarks share."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> str:
    return f"{os.cpu_count()} cores of {processor()}, Python {platform.python_version()}"


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
