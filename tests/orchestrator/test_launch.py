"""The driver, as far as it goes without Ray."""

from __future__ import annotations

import json
import shutil
import sqlite3

import pytest
from made_models import portable

from jem.errors import ConfigError, DataError
from orchestrator.config import load_run_config, to_yaml
from orchestrator.events import EventLog
from orchestrator.launch import launch
from orchestrator.plan import plan
from orchestrator.runs import RunRecord
from orchestrator.tracking import check_uri

pytestmark = pytest.mark.timeout(120)
TINY = ("steps=4", "batch_size=8", "model.channels=[4]", "replay.capacity=16", "name=done")


@pytest.fixture
def finished(migrated, tmp_path):
    """(configuration, folder) of a finished run whose MLflow was down: nothing was sent."""
    config = load_run_config("digits", [*TINY, f"storage_path={tmp_path}/runs"])
    folder = tmp_path / "runs" / "done"
    folder.mkdir(parents=True)
    shutil.copyfile(migrated, folder.parent / "mlflow.db")
    log = EventLog(folder / "events.jsonl")
    log.append("attempt", attempt=1, step=0, workers=2)
    log.append("metrics", step=4, metrics={"test/accuracy": 0.5})
    log.append("end", status="finished")
    log.close()
    result = {"name": "done", "step": 4, "status": "finished", "metrics": {"test/accuracy": 0.5}}
    record = RunRecord("done", config.science, "digest", "finished", attempts=[{"number": 1}], result=result)
    (folder / "run.json").write_text(json.dumps(vars(record)))
    return config, folder


def test_what_mlflow_did_not_take_is_sent_when_a_finished_run_is_asked_for_again(finished):
    config, folder = finished
    result = launch(config)
    assert result.metrics == {"test/accuracy": 0.5}
    with sqlite3.connect(folder.parent / "mlflow.db") as db:
        assert db.execute("select run_uuid, key, value, step from metrics").fetchall() == [
            (result.run_id, "test/accuracy", 0.5, 4)
        ]
        assert db.execute("select status from runs").fetchall() == [("FINISHED",)]
    kept = json.loads((folder / "run.json").read_text())
    assert (kept["mlflow"]["complete"], kept["result"]["run_id"]) == (True, result.run_id)
    before = (folder / "events.jsonl").read_bytes()
    assert launch(config) == result
    assert (folder / "events.jsonl").read_bytes() == before


def test_a_finished_run_whose_model_was_sent_later_names_it(finished):
    config, folder = finished
    card = portable(folder / "models" / "ab")
    log = EventLog(folder / "events.jsonl")
    model = {"step": 4, "path": "models/ab", "digest": card.digest, "name": "jem-digits", "champion": "nll"}
    log.append("model", **model)
    log.append("end", status="finished")
    log.close()
    result = launch(config)
    assert (result.model, result.champion) == ("models:/jem-digits/1", "yes: the first one (validation nll 0.5)")
    assert json.loads((folder / "run.json").read_text())["result"]["model"] == "models:/jem-digits/1"
    assert launch(config) == result


def test_a_password_in_the_tracking_uri_is_in_no_file_that_is_shared():
    config = load_run_config("digits", [*TINY, "tracking.uri=postgresql://me:hunter2@db/mlflow"])
    assert "hunter2" not in to_yaml(config)
    assert "postgresql://me:***@db/mlflow" in to_yaml(config)
    assert config.tracking.uri == "postgresql://me:hunter2@db/mlflow"


def test_a_relative_database_is_refused_under_a_submitted_job(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    settings = [*TINY, f"storage_path={tmp_path}/runs", "tracking.uri=sqlite:///mine.db"]
    with pytest.raises(ConfigError, match=r"tracking\.uri: 'sqlite:///mine\.db' is relative, .*thrown away"):
        launch(load_run_config("digits", settings))
    assert not (tmp_path / "runs" / "done").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.crop_padding=8", "data.crop_padding: is 8, must be at most 7"),
        ("data.validation_size=5000", "data.validation_size: is 5000, which leaves none of 1437 images"),
        ("data.labels_per_class=1000", "data.labels_per_class: is 1000, must be at most 129"),
        ("data.options.foo=1", "data.options.foo: data.name=digits has no such option"),
        ("model.options.foo=1", "model.options: are for a function of your own"),
    ],
)
def test_settings_that_do_not_go_with_the_data_are_found_before_anything_starts(setting, message):
    with pytest.raises(ConfigError) as alone:
        load_run_config("digits", [setting])
    (problem,) = alone.value.problems
    assert message in str(problem)
    assert problem.origin == "command line" or setting.startswith("data.options")


def test_a_finished_run_is_read_out_though_what_it_began_with_has_gone(finished, tmp_path):
    """The weights it started from, the folder of outliers; of a new run both are asked for before anything is made."""
    _, folder = finished
    gone = ["init_from=/nowhere/net.safetensors", "evaluate.sets=[/nowhere/photos]", f"storage_path={tmp_path}/runs"]
    config = load_run_config("digits", [*TINY, *gone])
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"science": config.science, "digest": config.digest}))
    assert launch(config).metrics == {"test/accuracy": 0.5}
    for settings in (gone, [gone[0], gone[2]]):
        with pytest.raises((ConfigError, DataError), match=r"/nowhere"):
            launch(load_run_config("digits", [*TINY, *settings, "name=new"]))
    assert not (tmp_path / "runs" / "new").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_does_not_begin_in_the_folder_of_a_sweep(tmp_path, fresh):
    folder = tmp_path / "runs" / "done"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text("{}")
    config = load_run_config("digits", [*TINY, f"storage_path={tmp_path}/runs"])
    for start in (lambda: launch(config, fresh), lambda: plan(config)):
        with pytest.raises(ConfigError, match=r"name: .*/done is the folder of a sweep, or of several seeds"):
            start()
    assert [path.name for path in folder.iterdir()] == ["sweep.json"]


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("localhost:5000", "http://localhost:5000"),
        ("mlruns", "sqlite:///HERE/mlruns/mlflow.db"),
        ("sqlite://x.db", "sqlite:///HERE/x.db"),
        ("file:///data/mlruns", "sqlite:////data/mlruns/mlflow.db"),
    ],
)
def test_what_names_no_mlflow_is_refused_before_anything_is_made(tmp_path, monkeypatch, uri, meant):
    monkeypatch.chdir(tmp_path)
    config = load_run_config("digits", [*TINY, f"storage_path={tmp_path}/runs", f"tracking.uri={uri}"])
    for start in (launch, plan):
        with pytest.raises(ConfigError) as raised:
            start(config)
        assert f"names no MLflow: a server is http://HOST:PORT, a file sqlite:///PATH, as {meant}" in str(
            raised.value
        ).replace(str(tmp_path), "/HERE" if "////" in meant else "HERE")
    assert not (tmp_path / "runs" / "done").exists()


@pytest.mark.parametrize("uri", ["http://a:5000", "https://a/b", "databricks", "databricks://p", "mysql+pymysql://a/b"])
def test_what_may_be_an_mlflow_is_not_refused(uri):
    check_uri(uri)


def test_a_finished_run_says_what_changes_nothing_any_more_and_what_would(finished, tmp_path, capsys):
    config, folder = finished
    (folder / "recipe.yaml").write_text(to_yaml(config))
    launch(config)
    assert "changes nothing" not in capsys.readouterr().err
    there = [*TINY, f"storage_path={tmp_path}/runs"]
    asked = ["evaluate.suite=full", "evaluate.sets=[interp,./mine]", f"tracking.uri=sqlite:///{tmp_path}/other.db"]
    assert launch(load_run_config("digits", [*there, *asked])).metrics == {"test/accuracy": 0.5}
    said = capsys.readouterr().err
    assert f"evaluate.suite=full changes nothing: done has finished; python jobs/evaluate.py {folder}" in said
    assert "/mine]" in said
    assert f"python jobs/sync.py {folder} storage_path=" in said
    assert not (tmp_path / "other.db").exists()
