"""init_from=models:/ and runs:/ against a real MLflow on SQLite."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from made_models import portable
from safetensors.torch import load_file, save_file

from jem.errors import DataError
from jem.files import Location
from jem.predict import Predictor, read_card, read_weights
from orchestrator.outbox import Model
from orchestrator.register import register
from orchestrator.registry import model_folder, resolve_model

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def store(migrated, tmp_path_factory):
    """(tracking URI, run id): version 1 of `net`, aliased champion, holds a model.safetensors."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("registry")
    shutil.copyfile(migrated, folder / "mlflow.db")
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


@pytest.fixture(scope="module")
def ours(store, tmp_path_factory):
    """(tracking URI, id of the run, folder of the model) of a model that a run has registered as `jem-toys`."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("ours")
    client = MlflowClient(store[0], store[0])
    run_id = client.create_run(client.get_experiment_by_name("jem").experiment_id).info.run_id
    card = portable(folder)
    register(client, run_id, folder, Model("", 7, "jem-toys", "nll", card.digest))
    return store[0], run_id, folder


OURS = ("models:/jem-toys@champion", "models:/jem-toys/1", "models:/jem-toys/latest", "runs:/RUN")


@pytest.mark.parametrize("source", OURS)
def test_a_model_that_a_run_has_registered_is_found_with_its_card(ours, tmp_path, source):
    uri, run_id, folder = ours
    found = model_folder(source.replace("RUN", run_id), uri, "/nowhere", tmp_path / "here")
    assert (found.uri, found.run_id) == (uri, run_id)
    assert read_card(found.folder) == read_card(folder)
    images = np.zeros((2, 4, 6, 3), np.uint8)
    expected = Predictor.load(folder)(images).probabilities
    np.testing.assert_array_equal(Predictor.load(found.folder)(images).probabilities, expected)


@pytest.mark.parametrize("source", OURS)
def test_a_run_can_start_from_a_model_that_a_run_has_registered(ours, tmp_path, source):
    uri, run_id, folder = ours
    found = resolve_model(source.replace("RUN", run_id), Location.of(tmp_path / "run"), uri)
    weights = load_file(f"{found}/model.safetensors")
    expected = read_weights(folder)
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_model_of_somebody_elses_is_said_to_be_none_of_ours(store, tmp_path):
    with pytest.raises(DataError, match=r"models:/net/1 holds no model\.json"):
        model_folder("models:/net/1", store[0], "/nowhere", tmp_path / "here")
    with pytest.raises(DataError, match=r"runs:/0123 cannot be had from MLflow"):
        model_folder("runs:/0123", store[0], "/nowhere", tmp_path / "here")


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


def test_looking_a_model_up_where_no_mlflow_is_makes_none(tmp_path):
    with pytest.raises(DataError, match=r"models:/net@champion: there is no MLflow at sqlite:.*; say where"):
        model_folder("models:/net@champion", None, str(tmp_path / "runs"), tmp_path / "here")
    assert not (tmp_path / "runs").exists()


def test_a_registered_model_without_a_version_is_told_how_to_name_one(store, tmp_path):
    with pytest.raises(DataError, match=r"from MLflow at sqlite:.*; .*which version: models:/net@champion"):
        model_folder("models:/net", store[0], "/nowhere", tmp_path / "here")
