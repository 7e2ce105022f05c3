"""Where and with what a run runs: versions, machine, code."""

from __future__ import annotations

import getpass
import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow", "jem-orchestrator")


def facts() -> dict[str, str]:
    """Tags of a run: no settings, no secrets."""
    found = {"host": socket.gethostname(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    head = commit()
    return found | {"git.commit": head, "mlflow.source.git.commit": head.rstrip("+"), "mlflow.user": _user()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def commit() -> str:
    """The commit of the code, with + where files were changed since; `unknown` outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
