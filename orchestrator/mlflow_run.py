"""One MLflow run, opened once and sent to: the only code that calls MLflow's tracking client.

Every call may be repeated: after a lost answer the same call leaves the run as it was. Any of them may raise
whatever MLflow, its database driver or its HTTP client raise; the caller retries.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jem.errors import JEMError
from orchestrator.outbox import RUN_ID, Artifact, Image, Item, Model, Point, Tags, legal_name

log = logging.getLogger(__name__)

TOKEN_TAG = "jem.token"
_MAX_PARAM = 6000
_MAX_TAG = 8000
_MAX_BATCH = 1000
_MAX_PARAMS = 100  # in one call

_REFUSED = ("INVALID_PARAMETER_VALUE", "ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "PERMISSION_DENIED", "NOT_IMPLEMENTED")
"""Answers of MLflow to a registration that asking again would not change."""

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # By default one call to a dead server blocks for 246 s. The uploader retries by itself, and a create_run that
    # the HTTP layer repeats could make two runs.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to the result
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class RunSpec:
    """What an MLflow run is opened with. `artifact_root` is used when the experiment is made."""

    uri: str
    experiment: str
    run_name: str
    artifact_root: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Registered:
    """A version of a registered model, and whether it is the champion and why: "yes: ..." or "no: ..."."""

    model: str  # models:/NAME/VERSION
    champion: str


class MLflowRun:
    """`created` says that the run is new, so that everything has to be sent from the start."""

    def __init__(self, spec: RunSpec, run_id: str | None, token: str, resume: bool = True) -> None:
        """Open `run_id`, or the run that carries `token`, or a new one; with `resume` it is RUNNING again.

        The token was written down before the run was created, so a run whose creation was not answered is found.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Imported here: it takes seconds, and belongs to the uploader's thread.
        from mlflow import MlflowClient

        uri = prepared(spec.uri)
        self._client = MlflowClient(uri, uri)
        self.registered: dict[str, Registered] = {}  # by digest
        self.created = False
        run = (self._existing(run_id) if run_id else None) or self._found_or_created(spec, token)
        self.run_id: str = run.info.run_id
        if resume and run.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        self._log_params(spec.params, run.data.params)
        if not self.created:
            self._set_tags(spec.tags)
        self._images: set[tuple[str, int]] | None = set() if self.created else None

    def send(self, items: Iterable[Item], run_dir: Path) -> None:
        from mlflow.entities import Metric

        items = list(items)
        points = [Metric(i.key, i.value, i.time, i.step) for i in items if isinstance(i, Point)]
        for start in range(0, len(points), _MAX_BATCH):
            self._client.log_batch(self.run_id, metrics=points[start : start + _MAX_BATCH])
        for item in items:
            if isinstance(item, Image):
                self._log_image(item, run_dir)
            elif isinstance(item, Artifact):
                self._log_artifact(item, run_dir)
            elif isinstance(item, Tags):
                self._set_tags(item.tags)
        for item in items:  # after all that a model should not keep waiting
            if isinstance(item, Model):
                self._register(item, run_dir)

    def log_file_as(self, path: Path, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copyfile(path, Path(folder) / name)
            self._client.log_artifact(self.run_id, str(copy))

    def history(self) -> list[Point]:
        """Every point that the run has."""
        keys = self._client.get_run(self.run_id).data.metrics
        metrics = [m for key in keys for m in self._client.get_metric_history(self.run_id, key)]
        return [Point(m.key, m.value, m.timestamp, m.step) for m in metrics]

    def terminate(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status)

    def _existing(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            log.warning("MLflow has no run %s any more: a new run is made and gets everything from the start", run_id)
            return None
        return run

    def _found_or_created(self, spec: RunSpec, token: str) -> Any:
        experiment_id = self._experiment(spec)
        found = self._client.search_runs([experiment_id], f"tags.`{TOKEN_TAG}` = '{token}'", max_results=1)
        if found:
            return found[0]
        self.created = True
        # With all tags at once: a crash right after it must leave no child of a sweep without its parent.
        tags = {key: str(value)[:_MAX_TAG] for key, value in spec.tags.items()} | {TOKEN_TAG: token}
        return self._client.create_run(experiment_id, tags=tags, run_name=spec.run_name)

    def _experiment(self, spec: RunSpec) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(spec.experiment)
        if experiment is None:
            try:
                tags = {"mlflow.experimentKind": "custom_model_development"}  # else its pages are those of GenAI
                made = self._client.create_experiment(spec.experiment, spec.artifact_root, tags)
                return str(made)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(spec.experiment)  # another driver was faster
        if experiment.lifecycle_stage != "active":
            raise RuntimeError(
                f"the experiment {spec.experiment!r} was deleted: restore it with `mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}` or set tracking.experiment to another name"
            )
        return str(experiment.experiment_id)

    def _log_params(self, params: Mapping[str, Any], existing: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        wanted = {legal_name(key): str(value)[:_MAX_PARAM] for key, value in params.items()}
        changed = [f"{k} (was {existing[k]}, is {v})" for k, v in wanted.items() if existing.get(k, v) != v]
        if changed:
            log.warning("MLflow keeps a run's parameters as first logged; these differ now: %s", ", ".join(changed))
        new = [Param(key, value) for key, value in wanted.items() if key not in existing]
        for start in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(self.run_id, params=new[start : start + _MAX_PARAMS])

    def _set_tags(self, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        wanted = [RunTag(key, str(value).replace(RUN_ID, self.run_id)[:_MAX_TAG]) for key, value in tags.items()]
        self._client.log_batch(self.run_id, tags=wanted)

    def _log_image(self, item: Image, run_dir: Path) -> None:
        import PIL.Image

        if self._images is None:
            self._images = self._logged_images()
        if (item.key.replace("/", "~"), item.step) in self._images:
            return  # log_image gives every file a name of its own: sent again, it would be there twice
        try:
            with PIL.Image.open(run_dir / item.path) as file:
                image = file.convert("RGB")
        except OSError as error:
            log.warning("the image %s is not sent to MLflow: %s", run_dir / item.path, error)
            return
        self._client.log_image(self.run_id, image, key=item.key, step=item.step, timestamp=item.time)

    def _register(self, item: Model, run_dir: Path) -> None:
        from mlflow.exceptions import MlflowException

        from orchestrator.register import register  # imports torch

        try:
            self.registered[item.digest] = register(self._client, self.run_id, run_dir / item.path, item)
        except JEMError as error:
            log.warning("the model is not registered in MLflow: %s", error)
        except MlflowException as error:
            if error.error_code not in _REFUSED:
                raise
            reason = str(error).splitlines()[0]
            log.warning("MLflow refuses the model %s, which stays in %s: %s", item.name, run_dir / item.path, reason)

    def _logged_images(self) -> set[tuple[str, int]]:
        """(key, step) of the images that are complete: log_image writes the compressed copy last."""
        paths = [file.path for file in self._client.list_artifacts(self.run_id, "images")]
        names = [path.rsplit("/", 1)[-1].split("+") for path in paths if path.endswith("+compressed.webp")]
        return {(name[0], int(name[2])) for name in names if name[1] == "step"}

    def _log_artifact(self, item: Artifact, run_dir: Path) -> None:
        path = run_dir / item.path
        below = Path(item.path)
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), str(below))
        elif path.is_file():
            folder = None if str(below.parent) == "." else str(below.parent)
            self._client.log_artifact(self.run_id, str(path), folder)
        else:
            log.warning("the artifact %s is not sent to MLflow: there is no such file", path)


def prepared(uri: str) -> str:
    """The URI, where MLflow can be opened: of SQLite with its folder and its tables.

    MLflow makes missing tables one by one, in whatever process comes first: two at once, or one that is killed
    meanwhile, leave a database that no MLflow opens again. A new one is made apart and appears whole.
    """
    if not uri.startswith("sqlite:///"):
        return uri
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return uri
    turn = path.with_name(f".{path.name}.lock")
    with turn.open("a") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
                _make_database(Path(folder) / path.name, path)
        turn.unlink(missing_ok=True)  # who still waits for it finds the database
    return uri


def _make_database(apart: Path, path: Path) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{apart}"
    MlflowClient(store, store).search_experiments(max_results=1)
    apart.replace(path)
