"""What the benchmarks share."""

from __future__ import annotations

import os
import platform
from pathlib import Path


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
