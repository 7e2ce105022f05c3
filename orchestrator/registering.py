"""`jobs/register.py`: a model that was trained elsewhere as a registered model of this MLflow."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jem.errors import DataError, JEMError
from jem.files import Location
from jem.predict import WEIGHTS, read_card
from orchestrator.config import shown
from orchestrator.final_model import EXAMPLES
from orchestrator.mlflow_run import MLflowRun, RunSpec
from orchestrator.opened import open_model
from orchestrator.outbox import Artifact, Item, Model, Point, legal_name
from orchestrator.result import Result
from orchestrator.scoring import portable_folder
from orchestrator.tracking import default_uri
from orchestrator.upload import reason

REPORT = "report.json"


def register_model(source: str, arguments: Sequence[str], say: Callable[[str], None] = print) -> Result:
    """A version of jem-DATA of the model that `source` names, in an MLflow run with the figures that lie beside it.

    Called again, it makes nothing twice. Raises ConfigError or DataError for what is no model, JEMError where MLflow
    does not take it.
    """
    opened = open_model(source, arguments)
    config = opened.config
    storage = Location.of(config.storage_path)
    uri, artifact_root = default_uri(storage, config.tracking.uri)
    with tempfile.TemporaryDirectory(prefix="jem-register-") as temporary:
        folder = portable_folder(source, config.tracking.uri, Path(temporary), config.storage_path)
        card = read_card(folder)
        if not (folder / EXAMPLES).exists():
            raise DataError(f"{source}: holds no {EXAMPLES}, images that MLflow shows to say what the model takes")
        spec = RunSpec(
            uri,
            config.tracking.experiment,
            opened.name,
            artifact_root,
            config.science,
            {"registered": opened.source, "model.digest": card.digest},
        )
        step, now = opened.step or 0, int(time.time() * 1000)
        report = folder / REPORT
        metrics = json.loads(report.read_text())["metrics"] if report.exists() else {}
        new = [Point(legal_name(key), value, now, step) for key, value in metrics.items()]
        beside = sorted({path.name for path in folder.iterdir() if path.is_file()} - {WEIGHTS, EXAMPLES})
        try:
            run = MLflowRun(spec, None, token=f"registered-{card.digest}", resume=False)
            sent = {} if run.created else {(point.key, point.step): point for point in run.history()}
            points = tuple(sent.get((point.key, point.step), point) for point in new)  # with another time it is another
            items: list[Item] = [*points, *(Artifact(f"{folder.name}/{name}") for name in beside)]
            items.append(
                Model(folder.name, step, config.registered_name, config.evaluate.champion, card.digest, points)
            )
            run.send(items, folder.parent)
            run.terminate("FINISHED")
        except Exception as error:  # MLflow raises whatever its store, driver or server does
            raise JEMError(
                f"MLflow at {shown(uri)} has not taken {source} ({reason(error, uri)}); the same command goes on"
            ) from error
    done = run.registered.get(card.digest)
    if done is None:
        raise JEMError(f"MLflow at {shown(uri)} has the run {run.run_id} of {source}, but would not register its model")
    say(f"model: {done.model}")
    say(f"champion: {done.champion}")
    say(f"MLflow: run {run.run_id} in {shown(uri)}")
    return Result(
        run_id=run.run_id,
        name=opened.name,
        step=opened.step,
        weights=opened.weights,
        metrics=metrics,
        status="finished",
        model=done.model,
        champion=done.champion,
        tracking_uri=shown(uri),
    )
