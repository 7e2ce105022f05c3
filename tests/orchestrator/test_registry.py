"""init_from=models:/ and runs:/ against a real MLflow on SQLite."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from jem.errors import DataError
from jem.files import Location
from orchestrator.registry import resolve_model

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """(tracking URI, run id): version 1 of `net`, aliased champion, holds a model.safetensors."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("jem", f"{folder}/artifacts")
    run = client.create_run(experiment).info
    (folder / "model").mkdir()
    save_file({"weight": torch.arange(3.0)}, folder / "model" / "model.safetensors")
    client.log_artifacts(run.run_id, str(folder / "model"), "model")
    client.create_registered_model("net")
    version = client.create_model_version("net", f"{run.artifact_uri}/model", run.run_id)
    client.set_registered_model_alias("net", "champion", version.version)
    return uri, run.run_id


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """MLflow's defaults would be found in the working directory."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "mlflow.db").exists(), "the default store was asked"


@pytest.mark.parametrize("source", ["models:/net@champion", "models:/net/1", "runs:/RUN/model"])
def test_a_model_of_mlflows_is_copied_into_the_runs_folder(store, tmp_path, source):
    uri, run_id = store
    root = Location.of(tmp_path / "run")
    found = resolve_model(source.replace("RUN", run_id), root, uri)
    assert found == f"{tmp_path}/run/init_from"
    assert (root / "init_from" / "model.safetensors").size() > 0


def test_a_model_that_is_not_there_is_bad_data(store, tmp_path):
    with pytest.raises(DataError, match=r"init_from: models:/other@champion cannot be had from MLflow"):
        resolve_model("models:/other@champion", Location.of(tmp_path / "run"), store[0])
    assert not (tmp_path / "run" / "init_from").exists()


def test_a_path_is_left_as_it_is(tmp_path):
    assert resolve_model("/a/b.pt", Location.of(tmp_path), "sqlite:////nowhere") == "/a/b.pt"
    assert resolve_model(None, Location.of(tmp_path), "sqlite:////nowhere") is None
