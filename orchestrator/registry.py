"""Models that MLflow keeps."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jem.errors import DataError
from jem.files import Location
from jem.predict import CARD, WEIGHTS
from orchestrator.config import shown
from orchestrator.mlflow_run import prepared
from orchestrator.tracking import default_uri

SCHEMES = ("models:/", "runs:/")


class Found(NamedTuple):
    """A registered model that was fetched."""

    folder: Path  # see jem.predict
    uri: str  # the tracking URI it was found under
    run_id: str | None  # of the run that trained it


def model_folder(source: str, uri: str | None, storage: str, target: Path) -> Found:
    """Fetch the portable model of models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID into `target`.

    `uri`: of MLflow; None: where runs in the folder `storage` are tracked. Raises DataError if it cannot be had.
    """
    uri = default_uri(Location.of(storage), uri)[0]
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():  # MLflow would make one
        raise DataError(f"{source}: there is no MLflow at {uri}; say where with storage_path= or tracking.uri=")
    found, run_id = fetch(source, uri, target)
    cards = sorted(found.rglob(CARD))
    if not cards:
        raise DataError(f"{source} holds no {CARD}: it was not registered by this project's training")
    return Found(cards[0].parent, uri, run_id)


def check_source(source: str | None) -> None:
    """Raises DataError if `init_from` is a local path where nothing is."""
    if source is not None and "://" not in source and not source.startswith(SCHEMES) and not Path(source).exists():
        raise DataError(f"init_from: there is no {source}; give a checkpoint directory, .safetensors or .pt")


def resolve_model(source: str | None, root: Location, tracking_uri: str) -> str | None:
    """`init_from` as a path every worker can read: a model of MLflow's is copied into the run's folder."""
    if source is None or not source.startswith(SCHEMES):
        return source
    target = root / "init_from"
    weights_copy = target / WEIGHTS
    if not weights_copy.exists():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found, _ = fetch(source, tracking_uri, Path(folder))
            except DataError as error:
                raise DataError(f"init_from: {error}") from error
            weights = sorted(found.rglob(WEIGHTS))
            if not weights:
                raise DataError(f"init_from: {source} holds no {WEIGHTS}")
            weights_copy.write(weights[0].read_bytes())
    return target.uri


def fetch(source: str, uri: str, target: Path) -> tuple[Path, str | None]:
    """All files of a model below `target`, and the run that it came from. Raises DataError if it cannot be had."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow.artifacts
    from mlflow import MlflowClient

    try:
        uri = prepared(uri)
        client = MlflowClient(uri, uri)
        where, run_id = _models(client, source) if source.startswith("models:/") else _runs(client, source)
        # by the place of the files: a models:/ URI would be looked up in the process' own MLflow
        path = mlflow.artifacts.download_artifacts(where, dst_path=str(target), tracking_uri=uri)
    except Exception as error:  # MLflow raises whatever its store, driver or server does
        text = (str(error) or type(error).__name__).splitlines()[0]
        password = urlsplit(uri).password
        text = text.replace(password, "***") if password else text  # MLflow repeats it
        bare = source.startswith("models:/") and not set("@/") & set(source.removeprefix("models:/"))
        hint = f"; of a registered model say which version: {source}@champion" if bare else ""
        raise DataError(f"{source} cannot be had from MLflow at {shown(uri)}: {text}{hint}") from error
    return Path(path), run_id


def _models(client: Any, source: str) -> tuple[str, str | None]:
    """Of models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest or models:/MODEL_ID: its files and its run."""
    name, at, alias = source.removeprefix("models:/").partition("@")
    name, _, number = name.partition("/")
    if not at and not number:
        logged = client.get_logged_model(name)
        return logged.artifact_location, logged.source_run_id
    if number == "latest":
        numbers = [int(version.version) for version in client.search_model_versions(f"name = '{name}'")]
        number = str(max(numbers, default="latest"))
    version = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, number)
    return client.get_model_version_download_uri(name, version.version), version.run_id


def _runs(client: Any, source: str) -> tuple[str, str | None]:
    """Of runs:/ID or runs:/ID/PATH; the former is the newest model that the run logged, if it logged any."""
    run_id, _, path = source.removeprefix("runs:/").partition("/")
    run = client.get_run(run_id)
    if path:
        return f"{run.info.artifact_uri}/{path}", run_id
    newest = [{"field_name": "creation_time", "ascending": False}]
    query = f"source_run_id = '{run_id}'"
    models = client.search_logged_models([run.info.experiment_id], query, order_by=newest)
    found = [model for model in models if str(model.status) == "READY"]
    return (found[0].artifact_location if found else run.info.artifact_uri), run_id
