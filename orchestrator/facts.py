"""Where and with what a run runs: versions, machine, code."""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("jem", "orchestrator", "jobs")
COMMIT = "JEM_GIT_COMMIT"
"""The environment variable that says the commit where the code was uploaded without its history."""
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
    found["code.digest"] = code_digest()
    return found | {"git.commit": head, "mlflow.source.git.commit": head.rstrip("+"), "mlflow.user": _user()}


def machine() -> str:
    """This machine's cores, its processor and its Python."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {next(names, platform.machine())}, Python {platform.python_version()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def commit(root: Path = ROOT) -> str:
    """The commit of the code in `root`, with + where files were changed since; `unknown` where nothing tells."""
    if not (root / ".git").exists():  # uploaded as a job's working directory, or installed
        return os.environ.get(COMMIT, "unknown")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def code_digest(root: Path = ROOT) -> str:
    """Names the code that runs, with or without git: a digest of all modules and recipes, their paths included."""
    found = hashlib.sha256()
    for folder in CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                found.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return found.hexdigest()[:16]
