"""What jobs/runs.py says of a folder of many runs: a sweep's, an ablation's, or that of several seeds."""

from __future__ import annotations

import os
import shlex
from typing import Any

from jem.files import Location
from orchestrator.survey import as_kind, holder, mapping

TRIALS, RECORD = "trials", "sweep.json"
KINDS = {
    "sweep": ("a sweep", "sweep.py", "sweep.yaml"),
    "seeds": ("several seeds", "train.py", "recipe.yaml"),
    "ablation": ("an ablation", "sweep.py", "sweep.yaml"),
}
"""Each kind in words, its command, and the file that it is made again from."""


def is_group(root: Location) -> bool:
    return (root / RECORD).exists()


def about(root: Location, jobs: str) -> dict[str, Any]:
    """A folder as JSON: its kind and status, how many of its runs ended as what, and the command to type next."""
    problem = None
    try:
        record = mapping(root / RECORD)
        if "status" not in record:
            raise ValueError(f"{(root / RECORD).uri}: damaged (it has no status)")
    except ValueError as error:
        record, problem = {}, f"{error}; its command with --fresh begins anew and keeps what is there"
    status = "running" if holder(root) else str(record.get("status", "damaged"))
    if status in ("new", "running") and not holder(root):
        status = "interrupted"
    kind, result = as_kind(str, record.get("kind"), "sweep"), as_kind(dict, record.get("result"), {})
    counts = as_kind(dict, result.get("seeds" if kind == "seeds" else "trials"), {})
    over = status in ("finished", "diverged", "damaged")
    return {
        "name": root.name,
        "folder": root.uri,
        "kind": kind,
        "status": status,
        "counts": counts if over else {},  # else they are of the attempt before
        "run_id": as_kind(dict, record.get("mlflow"), {}).get("run_id"),
        "next": None if over or status == "running" else _next(root, kind, jobs),
        "problem": problem,
    }


def print_group(told: dict[str, Any], jobs: str) -> None:
    what = KINDS.get(told["kind"], (told["kind"],))[0]
    counts = ", ".join(f"{n} {status}" for status, n in told["counts"].items() if status != "all")
    ended = f"{told['status']} ({counts})" if counts else told["status"]
    storage = shlex.quote(f"storage_path={told['folder']}/{TRIALS}")
    where = f"python {jobs}/runs.py {storage}"
    print(f"{told['name']}: {what}, {ended}; its trials: {where}")
    if told["problem"]:
        print(f"  {told['problem']}")
    if told["next"]:
        print(f"  next: {told['next']}")
    print()


def _next(root: Location, kind: str, jobs: str) -> str | None:
    """The command that goes on with it, if it is still where its recipe says."""
    if kind not in KINDS or not root.is_local:
        return None
    _, command, file = KINDS[kind]
    try:
        recipe = mapping(root / file)
    except ValueError:
        return None
    name = recipe.get("name")
    if root.name != (f"{name}-seeds" if kind == "seeds" else name):
        return None
    settings = recipe if kind == "seeds" else as_kind(dict, recipe.get("settings"), {})
    storage = os.path.abspath(os.path.expanduser(str(settings.get("storage_path"))))
    elsewhere = [] if storage == root.parent.path else [f"storage_path={_short(root.parent.path)}"]
    return shlex.join(["python", f"{jobs}/{command}", _short((root / file).path), *elsewhere])


def _short(path: str) -> str:
    """Relative to where one is, if it is below."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
