"""Models that MLflow keeps."""

from __future__ import annotations

import tempfile
from pathlib import Path

from jem.errors import DataError
from jem.files import Location

SCHEMES = ("models:/", "runs:/")


def resolve_model(source: str | None, root: Location, tracking_uri: str) -> str | None:
    """`init_from` as a path every worker can read: a model of MLflow's is copied into the run's folder."""
    if source is None or not source.startswith(SCHEMES):
        return source
    target = root / "init_from"
    weights_copy = target / "model.safetensors"
    if not weights_copy.exists():
        import mlflow

        # a registered model is looked up in the process' own registry, whatever tracking_uri= says
        mlflow.set_tracking_uri(tracking_uri)
        mlflow.set_registry_uri(tracking_uri)
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=folder)
            except Exception as error:  # MLflow raises whatever its store, driver or server does
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise DataError(f"init_from: {source} cannot be had from MLflow: {reason}") from error
            weights = sorted(Path(found).rglob("model.safetensors"))
            if not weights:
                raise DataError(f"init_from: {source} holds no model.safetensors")
            weights_copy.write(weights[0].read_bytes())
    return target.uri
