"""A run's final model in MLflow: a logged model of the run, a version of a registered model, perhaps its champion.

Every step is looked up before it is done, by the digest of the weights: after a lost answer or a crash the same call
goes on where it was. Two drivers at the same moment may register the same weights twice, or leave the alias with
the worse of two models that are both better than the champion before.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jem
from jem.predict import Card, read_card
from orchestrator.final_model import examples, summary
from orchestrator.mlflow_run import Registered
from orchestrator.outbox import Model

CHAMPION = "champion"
CHECKPOINT_TAG, DATA_TAG, WHY_TAG, METRIC_TAG = "jem.checkpoint", "jem.data", "jem.champion", "jem.validation."
"""Of a version: the digests of its weights and data, why it is the champion or not, its validation figures."""

BY_TAG = "jem.champion_by"
"""Of a version: the figure by which it was compared with the champion; older ones are without."""

TAKES_TAG = "jem.takes"
"""Layout and dtype of the images that it takes; older versions are without."""

REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "safetensors", "jaxtyping")
"""What a served model imports: tested in tests/jem/test_predict.py and tests/orchestrator/test_pyfunc_model.py."""


def register(client: Any, run_id: str, folder: Path, item: Model, description: str | None = None) -> Registered:
    """The portable model in `folder` as a version of `item.name`, made if there is none yet of these weights.

    `client`: an MlflowClient. Raises JEMError if the folder is not a model, and whatever MLflow raises.
    """
    card = read_card(folder)
    _registered_model(client, item.name)
    found = client.search_model_versions(f"name = '{item.name}' and tags.`{CHECKPOINT_TAG}` = '{card.digest}'")
    takes = _tags(card)[TAKES_TAG]
    same = [version for version in found if version.tags.get(TAKES_TAG, takes) == takes]
    version = min(same, key=lambda v: int(v.version), default=None)
    if version is None:
        logged = _logged_model(client, run_id, folder, card, item)
        version = client.create_model_version(
            item.name,
            logged.artifact_location,  # models:/ID would be looked up in the process' own MLflow
            run_id,
            tags=_tags(card),
            description=description or summary(card),
            await_creation_for=0,
            model_id=logged.model_id,
        )
    why, by = version.tags.get(WHY_TAG), version.tags.get(BY_TAG, "nll")
    if why is None:  # made just now, or by a call that did not come to its end
        _link(client, version, card.digest)
    if why is None or by != item.champion:
        why = _challenge(client, version, item.champion)
        client.set_model_version_tag(item.name, version.version, BY_TAG, item.champion)
        client.set_model_version_tag(item.name, version.version, WHY_TAG, why)  # last: what came before is done
    elif why.startswith("yes"):
        now = _champion(client, item.name)
        if now is not None and str(now.version) != str(version.version):
            why = f"no: version {now.version} is by now"
    return Registered(f"models:/{item.name}/{version.version}", why)


def _registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    if client.search_registered_models(f"name = '{name}'", max_results=1):
        return
    try:
        client.create_registered_model(name)
    except MlflowException as error:  # another driver was faster
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _tags(card: Card) -> dict[str, str]:
    figures = {f"{METRIC_TAG}{name}": repr(value) for name, value in card.info["validation"].items()}
    takes = {TAKES_TAG: f"{card.layout} {card.dtype}"}
    return {CHECKPOINT_TAG: card.digest, DATA_TAG: card.info["data_digest"], **takes, **figures}


def _logged_model(client: Any, run_id: str, folder: Path, card: Card, item: Model) -> Any:
    """The run's logged model of these weights, complete: files, metrics, a link from the run."""
    from mlflow.entities import LoggedModelOutput, Metric

    run = client.get_run(run_id)
    where = run.info.experiment_id
    model = logged_model(client, run_id, card.digest)
    if model is None:
        params = {key: str(value) for key, value in card.config.items()}
        model = client.create_logged_model(where, item.name, run_id, _tags(card), params)
    if str(model.status) != "READY":
        with tempfile.TemporaryDirectory() as temporary:
            saved = Path(temporary) / "model"
            save_pyfunc(saved, folder, card, run_id, model.model_id)
            client.log_model_artifacts(model.model_id, str(saved))
        model = client.finalize_logged_model(model.model_id, "READY")
    if item.metrics:
        metrics = [Metric(p.key, p.value, p.time, p.step, model.model_id, run_id=run_id) for p in item.metrics]
        client.log_batch(run_id, metrics=metrics)
    if model.model_id not in [output.model_id for output in (run.outputs.model_outputs if run.outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, item.step)])
    return model


def logged_model(client: Any, run_id: str, digest: str) -> Any:
    """The run's logged model of the weights with this digest, or None. Metrics with its model_id are on its page."""
    where = [client.get_run(run_id).info.experiment_id]
    query = f"source_run_id = '{run_id}' and tags.`{CHECKPOINT_TAG}` = '{digest}'"
    return next(iter(client.search_logged_models(where, query, max_results=1)), None)


def _link(client: Any, version: Any, digest: str) -> None:
    """The logged model's page names its version, as after mlflow.register_model; a server does it by itself."""
    model = logged_model(client, version.run_id, digest) if version.run_id else None
    if model is not None:
        named = [{"name": version.name, "version": version.version}]
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps(named)})


def save_pyfunc(target: Path, folder: Path, card: Card, run_id: str | None = None, model_id: str | None = None) -> None:
    """Write the portable model in `folder` as an MLflow model: code and safetensors, nothing pickled."""
    import mlflow.pyfunc
    from mlflow.models import Model as MLmodel
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema, TensorSpec

    columns = {"label": DataType.string, "probability": DataType.double, "probabilities": Array(DataType.double)}
    columns |= {"log_density": DataType.double, "in_distribution": DataType.boolean}
    images = examples(folder, card)
    mlflow.pyfunc.save_model(
        path=str(target),
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={"model": str(folder)},
        code_paths=[str(path) for path in code_of(card.config)],
        signature=ModelSignature(
            Schema([TensorSpec(images.dtype, (-1, *card.shape))]),
            Schema([ColSpec(kind, name) for name, kind in columns.items()]),
        ),
        input_example=images,
        pip_requirements=requirements(),
        mlflow_model=MLmodel(run_id=run_id, model_id=model_id),
    )


def code_of(config: Mapping[str, Any]) -> Iterable[Path]:
    """The code that a model needs: this project's `jem`, and the module of a network of the user's own."""
    yield Path(jem.__file__).parent
    module, colon, _ = str(config["model.name"]).partition(":")
    spec = importlib.util.find_spec(module.partition(".")[0]) if colon else None
    if spec is None:
        return
    places = list(spec.submodule_search_locations or [])  # of a package, which may have no __init__.py
    path = Path(places[0] if places else str(spec.origin))
    stdlib, others = sysconfig.get_path("stdlib"), {"site-packages", "dist-packages"}
    if path.exists() and not path.is_relative_to(stdlib) and others.isdisjoint(path.parts):
        yield path


def requirements() -> list[str]:
    """As installed here. A local version such as 2.11.0+cu128 is on no index."""
    versions = ((name, importlib.metadata.version(name).partition("+")[0]) for name in REQUIREMENTS)
    return [f"{name}=={version}" for name, version in versions]


def _challenge(client: Any, version: Any, metric: str) -> str:
    """Give the alias to `version` if it is better on the same data; what came of it, and why."""
    champion = _champion(client, version.name)
    mine = _figure(version, metric)
    if champion is None:
        client.set_registered_model_alias(version.name, CHAMPION, version.version)
        return f"yes: the first one (validation {metric} {mine:.6g})"
    if str(champion.version) == str(version.version):  # said to be, and then its tag was not written
        return f"yes: validation {metric} {mine:.6g}"  # or compared by another figure
    held = f"version {champion.version}"
    if champion.tags.get(DATA_TAG) != version.tags.get(DATA_TAG):
        return f"no: {held} was validated on other data, so {metric} cannot be compared; move the alias by hand"
    theirs = _figure(champion, metric)
    if theirs is None:
        return f"no: {held} has no validation {metric} to compare with; move the alias by hand"
    better = mine > theirs if metric == "accuracy" else mine < theirs
    compared = f"validation {metric} {mine:.6g}, {held} has {theirs:.6g}"
    if better:
        client.set_registered_model_alias(version.name, CHAMPION, version.version)
    return f"yes: {compared}" if better else f"no: {compared}"


def _champion(client: Any, name: str) -> Any:
    """The version that has the alias, or None."""
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if version is None else client.get_model_version(name, version)


def _figure(version: Any, metric: str) -> Any:
    text = version.tags.get(f"{METRIC_TAG}{metric}")
    return None if text is None else float(text)
