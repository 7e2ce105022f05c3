"""jobs/register.py's work: a model from elsewhere in a real MLflow on SQLite."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from made_models import portable

from jem.errors import ConfigError, DataError, JEMError
from jem.predict import Predictor
from orchestrator.final_model import EXAMPLES
from orchestrator.registering import REPORT, register_model

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def model(tmp_path):
    """As a colleague gives it: with a report and a picture."""
    folder = tmp_path / "given"
    card = portable(folder, 3)
    (folder / REPORT).write_text(
        json.dumps({"metrics": {"test/accuracy": 0.75, "robust/linf/0.1/worst/accuracy": 0.5}})
    )
    (folder / "samples.png").write_bytes(b"a picture")
    return folder, card


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tables(migrated, tmp_path):
    """MLflow's database where it is looked for, with nothing in it."""
    (tmp_path / "runs").mkdir()
    shutil.copyfile(migrated, tmp_path / "runs" / "mlflow.db")


def client_of(tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    return MlflowClient(uri, uri)


def test_it_is_in_mlflow_once_with_what_lies_beside_it_and_answers_the_same(model, tables, tmp_path):
    import mlflow.pyfunc

    folder, card = model
    first, second = (register_model("given", []) for _ in range(2))
    assert first == second
    assert first.status == "finished"
    assert first.model.endswith("/1")
    assert first.champion.startswith("yes")
    client = client_of(tmp_path)
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == first.metrics == {"test/accuracy": 0.75, "robust/linf/0.1/worst/accuracy": 0.5}
    assert len(client.get_metric_history(first.run_id, "test/accuracy")) == 1
    files = {file.path for file in client.list_artifacts(first.run_id, "given")}
    assert files == {f"given/{name}" for name in ("model.json", REPORT, "samples.png")}, "weights are the model's own"
    name = first.model.split("/")[1]
    assert [v.tags["jem.checkpoint"] for v in client.search_model_versions(f"name = '{name}'")] == [card.digest]
    images = np.load(folder / EXAMPLES).transpose(0, 2, 3, 1)
    served = mlflow.pyfunc.load_model(client.get_model_version_download_uri(name, "1"))
    np.testing.assert_array_equal(served.predict(images)["log_density"], Predictor.load(folder)(images).log_density)


def test_a_registration_that_was_cut_goes_on(model, tables, tmp_path, monkeypatch):
    from orchestrator import register as module

    def cut(*arguments, **settings):
        raise ConnectionError("the line is down")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_pyfunc", cut)
        with pytest.raises(JEMError, match=r"not taken given .ConnectionError: the line is down.; the same command"):
            register_model("given", [])
    result = register_model("given", [])
    client = client_of(tmp_path)
    assert result.model.endswith("/1")
    assert len(client.search_runs([client.get_experiment_by_name("jem").experiment_id])) == 1
    assert len(client.get_metric_history(result.run_id, "test/accuracy")) == 1


def test_what_is_no_model_is_said(model, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing does not exist; give .*a model that comes with this project"):
        register_model("nothing", [])
    (tmp_path / "given" / EXAMPLES).unlink()
    with pytest.raises(DataError, match=f"given: holds no {EXAMPLES}"):
        register_model("given", [])
    assert not (tmp_path / "runs").exists()
