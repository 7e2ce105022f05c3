"""A report to MLflow: to the run that trained the model, or to one of its own where the model came from elsewhere."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from jem.errors import ConfigError
from jem.files import Location
from orchestrator.config import shown
from orchestrator.mlflow_run import MLflowRun, RunSpec
from orchestrator.opened import Opened
from orchestrator.outbox import Artifact, Item, Point
from orchestrator.tracking import default_uri
from orchestrator.upload import reason

SENT = "sent.json"
"""Beside the report: which MLflow run has it."""


def send_report(opened: Opened, report: dict[str, Any], folder: Path) -> tuple[str | None, str | None, str]:
    """Send figures and files; the run's id, where, and what went wrong, if so: the report itself is on the disk.

    What was sent is not sent again. A point that the run has at the same step with the same value is left out.
    """
    uri, artifact_root = _where(opened)
    sent = _sent(folder)
    if sent.get("uri") == shown(uri):
        return sent["run_id"], shown(uri), ""
    known = opened.mlflow.get("run_id") if opened.mlflow.get("uri") in (shown(uri), uri) else None
    tags = {"evaluated": opened.source, "model.digest": opened.digest}
    spec = RunSpec(
        uri,
        str(opened.mlflow.get("experiment") or opened.config.tracking.experiment),
        opened.name,
        artifact_root,
        {} if known else opened.config.science,
        {} if known else tags,
    )
    try:
        run = MLflowRun(spec, known, token=f"evaluation-{opened.digest}", resume=False)
        has = {(point.key, point.step, point.value) for point in run.history()} if not run.created else set()
        step, now = opened.step or 0, int(time.time() * 1000)
        items: list[Item] = [
            Point(key, value, now, step) for key, value in report["metrics"].items() if (key, step, value) not in has
        ]
        beside = sorted(path.name for path in folder.parent.glob(f"{folder.name}-against-*"))
        items += [Artifact(f"evaluations/{name}") for name in (folder.name, *beside)]
        run.send(items, folder.parent.parent)
        if run.created or not known:
            run.terminate("FINISHED")
    except Exception as error:  # MLflow raises whatever its store, driver or server does
        fault = f"MLflow at {shown(uri)} has not got the report ({reason(error, uri)}); the same command sends it again"
        return known, shown(uri), fault
    Location.of(folder / SENT).write(json.dumps({"uri": shown(uri), "run_id": run.run_id}).encode())
    return run.run_id, shown(uri), ""


def _where(opened: Opened) -> tuple[str, str | None]:
    """The tracking URI: what was asked for, else the run's own, else as a training finds it."""
    asked = opened.config.tracking.uri
    own = opened.mlflow.get("uri")
    if asked is None and own:
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        asked = environment if environment and shown(environment) == own else own
        if ":***@" in asked:
            raise ConfigError(
                f"tracking.uri: the run's is {own}; its password is not kept: give it, or set MLFLOW_TRACKING_URI"
            )
    storage = opened.run_folder.parent if opened.run_folder else Path(opened.config.storage_path)
    return default_uri(Location.of(storage), asked)


def _sent(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / SENT).read_text()))
    except (OSError, ValueError):
        return {}
