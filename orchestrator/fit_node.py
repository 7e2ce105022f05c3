"""What the doctor looks at on one machine, in a process there: plain facts, which fit.py judges."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from jem.files import Location, existing
from orchestrator.facts import code_digest

DRIVER = "driver"
SHM = Path("/dev/shm")
NVIDIA = Path("/proc/driver/nvidia/version")


def examine(storage: str, probe: str, me: str) -> dict[str, Any]:
    """Facts of this machine. `probe`: a folder in `storage` that the driver has made; `me`: our file there."""
    import torch

    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("ray", "torch")},
        "code": code_digest(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpus": gpus(),
        "nvidia": NVIDIA.exists() and torch.version.cuda is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != "",
        "temporary": shutil.disk_usage("/tmp").free,
        "shm": shutil.disk_usage(SHM).free if SHM.exists() else None,
        "storage": use(storage, probe, me),
    }


def gpus() -> list[str]:
    """Those that torch can use: NVML counts those of a driver that is too old for it as well."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def use(storage: str, probe: str, me: str) -> dict[str, Any]:
    """What came of reading the driver's file, writing one, and renaming it; `error` is what went wrong first."""
    told: dict[str, Any] = {"shared": False, "free": None, "error": None}
    try:
        root = Location.of(storage)
        if root.is_local:
            told["free"] = shutil.disk_usage(existing(root.local)).free
        folder = root / probe
        with suppress(FileNotFoundError):
            told["shared"] = (folder / DRIVER).read() == probe.encode()
        if told["shared"]:
            written = folder / f"{me}.part"
            written.write(me.encode())
            written.move_to(folder / me)
            if (folder / me).read() != me.encode() or written.exists():
                told["error"] = "a file that was renamed is not what was written"
    except Exception as error:  # whatever the filesystem makes of it
        told["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return told


class Examiner:
    """On a node, as a Ray actor: the clock is asked when the process is up."""

    def now(self) -> float:
        return time.time()

    def examine(self, storage: str, probe: str, me: str) -> dict[str, Any]:
        return examine(storage, probe, me)
