"""A report to MLflow: to the run that trained the model, or to one of its own where the model came from elsewhere."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jem.errors import ConfigError
from jem.evaluate.against import transfer_metrics
from jem.evaluate.sampled import gen_tags
from jem.files import Location
from orchestrator.config import shown
from orchestrator.mlflow_run import MLflowRun, RunSpec
from orchestrator.opened import Opened
from orchestrator.outbox import Artifact, Item, Point, Tags, legal_name
from orchestrator.tracking import default_uri
from orchestrator.upload import reason

SENT = "sent.json"
"""Beside the report: which MLflow run has it, and which comparisons."""


def send_report(opened: Opened, report: dict[str, Any], folder: Path) -> tuple[str | None, str | None, str]:
    """Send figures, files and comparisons; the run's id, where, and what went wrong: the report is on the disk.

    What was sent is not sent again. A point whose newest value at that step is the same is left out.
    """
    uri, artifact_root = _where(opened)
    names = [folder.name, *sorted(path.name for path in folder.parent.glob(f"{folder.name}-against-*"))]
    sent = _sent(folder, shown(uri))
    left = [name for name in names if name not in sent.get("folders", [])]
    if not left:
        return sent["run_id"], shown(uri), ""
    known = opened.mlflow.get("run_id") if opened.mlflow.get("uri") in (shown(uri), uri) else None
    experiment = str(opened.mlflow.get("experiment") or opened.config.tracking.experiment)
    told = {"evaluated": opened.source, "model.digest": opened.digest}
    own = RunSpec(uri, experiment, opened.name, artifact_root, opened.config.science, told)
    spec, token = replace(own, params={}, tags={}) if known else own, f"evaluation-{opened.digest}"
    try:
        run = MLflowRun(spec, known, token, resume=False)
        if known and run.run_id != known:  # it was deleted
            run, known = MLflowRun(own, run.run_id, token, resume=False), None
        figures = report["metrics"] if folder.name in left else {}
        items: list[Item] = _points(run, report, figures | _of_comparisons(folder.parent, left), opened.step or 0)
        items += [Tags(gen_tags(report["gen"]))] if "gen" in report else []
        run.send([*items, *(Artifact(f"{folder.parent.name}/{name}") for name in left)], folder.parent.parent)
        if not known:
            run.terminate("FINISHED")
    except Exception as error:  # MLflow raises whatever its store, driver or server does
        fault = f"MLflow at {shown(uri)} has not got the report ({reason(error, uri)}); the same command sends it again"
        return known, shown(uri), fault
    content = {"uri": shown(uri), "run_id": run.run_id, "folders": names}
    Location.of(folder / SENT).write(json.dumps(content).encode())
    return run.run_id, shown(uri), ""


def _of_comparisons(home: Path, names: list[str]) -> dict[str, float]:
    """Accuracy on the adversarials of a classifier twin that this model is compared with."""
    found: dict[str, float] = {}
    for name in (name for name in names if "-against-" in name):
        comparison = json.loads((home / name / "against.json").read_text())
        if comparison.get("of_twin"):  # of a JEM's adversarials, the comparison alone tells
            found |= dict(transfer_metrics(comparison["transfer"]))
    return found


def _points(run: MLflowRun, report: dict[str, Any], metrics: dict[str, float], step: int) -> list[Item]:
    """The report's figures, but for those that the run shows: of the evaluation at the end of its training."""
    before = sorted(run.history(), key=lambda point: point.time) if not run.created else []
    newest = {(point.key, point.step): point.value for point in before}
    now = int(time.time() * 1000)
    noise = report["settings"]["noise_std"]
    prefix = f"noise{noise:g}/" if noise else ""  # of other images: not the run's own test figures
    figures = {legal_name(prefix + key): value for key, value in metrics.items()}
    return [Point(key, value, now, step) for key, value in figures.items() if newest.get((key, step)) != value]


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
    return default_uri(opened.run.parent if opened.run else Location.of(opened.config.storage_path), asked)


def _sent(folder: Path, uri: str) -> dict[str, Any]:
    """What that MLflow has of the evaluation."""
    try:
        found: dict[str, Any] = json.loads((folder / SENT).read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("uri") == uri else {}
