"""Evaluations of trained models, by every name that a model has; kept, compared, told to MLflow."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console
from worker_runs import fit, log_of, newest, tiny

from jem.config import ModelConfig
from jem.data.sources import load
from jem.errors import CheckpointError, ConfigError, DataError
from jem.evaluate.evaluate import validate
from jem.files import Location
from jem.models import make_network
from jem.predict import Predictor
from jem.settings import Entry
from jem.world import World
from orchestrator import evaluation, opened
from orchestrator.evaluate_on import _check
from orchestrator.evaluation import evaluate_model, report_of
from orchestrator.final_model import write_model
from orchestrator.opened import open_model
from orchestrator.outbox import Point
from orchestrator.ray_cluster import Cluster
from orchestrator.report_upload import _points
from orchestrator.runs import RunRecord, read_record, write_config

FAST = "evaluate.suite=fast"
GENTLE = (
    *("evaluate.suite=full", "evaluate.sets=[interp,uniform]"),
    *("evaluate.attack.images=30", "evaluate.attack.refine=[0,1]", "evaluate.attack.copies=2"),
    *("evaluate.attack.steps=3", "evaluate.attack.min_norm_steps=5", "evaluate.attack.queries=5"),
    *("evaluate.generate.samples=40", "evaluate.generate.chains=2", "evaluate.generate.lengths=[1,10]"),
)


def trained(storage, name, *settings):
    """A finished run, as its driver leaves it."""
    root = storage / name
    config = tiny("evaluate.register=true", f"name={name}", *settings)
    outcome = fit(root, "evaluate.register=true", f"name={name}", *settings)
    RunRecord(name, config.science, config.digest, "finished").save(Location.of(root))
    write_config(Location.of(root), config)
    return root, outcome


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs of the same data, another seed and no chains in the second."""
    storage = tmp_path_factory.mktemp("storage")
    first, outcome = trained(storage, "one")
    second, _ = trained(storage, "two", "objective.p_x_weight=0", "seed=1")
    return storage, first, second, outcome


@pytest.fixture
def runs(made, tmp_path):
    """Copies that a test may do with as it likes."""
    for path in made[1:3]:
        shutil.copytree(path, tmp_path / "runs" / path.name)
    return tmp_path / "runs"


def say():
    return Console(file=io.StringIO(), width=120)


def evaluated(model, *settings, against=None, console=None):
    return evaluate_model(str(model), against and str(against), list(settings), console or say())


@pytest.fixture
def tables(migrated, runs):
    """MLflow's database beside the runs, with nothing in it."""
    shutil.copyfile(migrated, runs / "mlflow.db")


@pytest.fixture(scope="module")
def measured(made, tmp_path_factory):
    """(evaluations, result) of the first run under the settings GENTLE, in one process: half a minute."""
    run = tmp_path_factory.mktemp("measured") / "one"
    shutil.copytree(made[1], run)
    result = evaluated(run, *GENTLE)
    return run / "evaluations", result


def points(runs, result):
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    keys = client.get_run(result.run_id).data.metrics
    return [(m.key, m.step, m.value) for key in keys for m in client.get_metric_history(result.run_id, key)]


def test_models_of_different_data_are_not_compared_and_nothing_is_measured_first(made, monkeypatch):
    _, first, second, _ = made
    opened = {str(first): open_model(str(first), [FAST]), str(second): open_model(str(second), [FAST])}
    opened[str(second)] = replace(opened[str(second)], data_digest="f" * 64)
    monkeypatch.setattr(evaluation, "open_model", lambda source, _: opened[source])
    monkeypatch.setattr(evaluation, "report_of", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(ConfigError, match=r"--against: the models are of different data .*digest ffffffffffff"):
        evaluate_model(str(first), str(second), [FAST], Console(file=io.StringIO()))


def test_the_fast_suite_measures_the_sets_that_are_asked_for(runs):
    done = report_of(open_model(str(runs / "one"), [FAST, "evaluate.sets=[constant]", f"storage_path={runs}"]))
    assert set(done.report["ood"]) == {"constant"}
    assert set(done.report["ood"]["constant"]["scores"]) == {"log_px", "max_py", "approx_mass"}


def test_a_run_is_evaluated_once_and_then_read_and_mlflow_has_every_figure_once(runs, tables, monkeypatch):
    uri = f"sqlite:///{runs / 'mlflow.db'}"
    experiment = MlflowClient(uri).create_experiment("jem", str(runs / "mlartifacts"))
    own = MlflowClient(uri).create_run(experiment, run_name="one").info.run_id
    MlflowClient(uri).log_metric(own, "test/accuracy", 0.125, step=12)  # of the suite at the end of the training
    record = read_record(Location.of(runs / "one"))
    record.mlflow = {"uri": uri, "experiment": "jem", "run_id": own}
    record.save(Location.of(runs / "one"))
    first = evaluated(runs / "one", FAST)
    assert first.run_id == own
    assert (first.status, first.name, first.step, first.cached) == ("finished", "one", 12, False)
    report = json.loads(Path(first.report).read_text())
    assert Path(first.report).is_relative_to(runs / "one" / "evaluations")
    assert report["metrics"] == first.metrics
    assert {"reliability.png", "confusion.png", "ood.png", "model_card.md"} <= {
        path.name for path in Path(first.report).parent.iterdir()
    }
    config = tiny()
    data, opened = load(config.data), open_model(str(runs / "one"))
    by_hand = validate(opened.network(), data.test, config.evaluate, World(), torch.zeros(()))
    assert by_hand == {key: first.metrics[key if key.startswith("ood/") else f"test/{key}"] for key in by_hand}

    def never(*_, **__):
        raise AssertionError("it was measured before")

    monkeypatch.setattr(evaluation, "evaluate", never)
    again = evaluated(runs / "one" / "checkpoints" / "12", FAST)
    assert (again.cached, again.metrics, again.run_id) == (True, first.metrics, first.run_id)
    sent = [(key, 12, value) for key, value in first.metrics.items()]
    assert sorted(points(runs, first)) == sorted([*sent, ("test/accuracy", 12, 0.125)])
    assert MlflowClient(uri).get_run(own).data.metrics == first.metrics, "the newest is shown"
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    folder = f"evaluations/{Path(first.report).parent.name}"
    assert f"{folder}/report.json" in [file.path for file in client.list_artifacts(first.run_id, folder)]
    with pytest.raises(AssertionError):
        evaluated(runs / "one", FAST, "evaluate.noise_std=0.1")


def test_all_names_of_a_model_lead_to_the_same_figures(runs, made):
    *_, outcome = made
    checkpoint = runs / "one" / "checkpoints" / "12"
    config = tiny("evaluate.register=true", "name=one")
    event = write_model(runs / "one", config, outcome | {"checkpoint": str(checkpoint)}, {"name": "one"})
    folder = runs / "one" / event["path"]
    reports = []
    for name in (runs / "one", checkpoint, folder):
        opened = open_model(str(name), [FAST, f"storage_path={runs / 'elsewhere'}"])
        assert (opened.step, opened.weights, opened.digest) == (
            12,
            "model",
            newest(runs / "one").files["model.safetensors"]["sha256"],
        )
        reports.append(report_of(opened).report)
    assert reports[0]["metrics"] == reports[1]["metrics"] == reports[2]["metrics"]
    answers = Predictor.load(folder)(load(config.data).test.images.permute(0, 2, 3, 1).numpy())
    labels = load(config.data).test.labels.numpy()
    assert np.mean(answers.index == labels) == pytest.approx(reports[0]["metrics"]["test/accuracy"])
    assert answers.log_density.shape == labels.shape
    assert Predictor.load(folder).card.temperature == reports[0]["temperature"]["value"]
    assert Predictor.load(folder).card.threshold == reports[0]["threshold"]["log_px"]


def test_two_models_are_compared_on_the_same_images(runs, tables):
    text = io.StringIO()
    result = evaluated(runs / "one", FAST, against=runs / "two", console=Console(file=text, width=160))
    rows = json.loads(Path(result.against).read_text())["rows"]
    one, two = (report_of(open_model(str(runs / name), [FAST])).report for name in ("one", "two"))
    accuracy = next(row for row in rows if row["metric"] == "accuracy")
    assert accuracy["values"] == [one["test"]["accuracy"], two["test"]["accuracy"]]
    assert result.difference["accuracy"] == accuracy["difference"]
    assert accuracy["difference"][0] == pytest.approx(one["test"]["accuracy"][0] - two["test"]["accuracy"][0])
    assert {"against.png", "against_reliability.png"} <= {path.name for path in Path(result.against).parent.iterdir()}
    row = next(line for line in text.getvalue().splitlines() if line.split()[:1] == ["accuracy"])
    printed = [f"{one['test']['accuracy'][0]:.4f} [", f"{two['test']['accuracy'][0]:.4f} ["]
    assert all(part in row for part in [*printed, f"{accuracy['difference'][0]:+.4f} ["]), row
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    folder = f"evaluations/{Path(result.against).parent.name}"
    assert f"{folder}/against.json" in [file.path for file in client.list_artifacts(result.run_id, folder)]


def test_an_evaluation_waits_for_what_an_autoscaler_brings_and_refuses_what_nobody_will(capsys):
    _check(Cluster(False, 0, 0), 2, "auto")
    assert "workers=2, the cluster has 0 CPUs at present: waiting for more" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is 2, the cluster has 1 CPUs; lower it"):
        _check(Cluster(True, 1, 0), 2, "auto")


@pytest.mark.ray
def test_figures_are_the_same_bits_on_two_ray_workers_as_on_none(runs, tables, measured):
    _, alone = measured
    outputs = (Path(alone.report).parent / "outputs.safetensors").read_bytes()
    spread = evaluated(runs / "one", *GENTLE, "workers=2")
    assert not spread.cached
    assert spread.metrics == alone.metrics
    assert (Path(spread.report).parent / "outputs.safetensors").read_bytes() == outputs
    assert {key.split("/")[1] for key in spread.metrics if key.startswith("ood/")} == {"interp", "uniform"}
    assert "robust_k1/l2/1/worst/accuracy" in spread.metrics


def test_attacks_and_samples_of_two_models_are_on_one_plot_and_in_mlflow_with_the_extractors_hash(
    runs, tables, measured
):
    shutil.copytree(measured[0], runs / "one" / "evaluations")
    text = io.StringIO()
    result = evaluated(runs / "one", *GENTLE, against=runs / "two", console=Console(file=text, width=160))
    report, against = (json.loads(Path(path).read_text()) for path in (result.report, result.against))
    assert list(report["robust"]["k"]) == ["0", "1"]
    assert {"fresh", "buffer", "test"} == set(report["gen"]["samplers"])
    rows = {row["metric"]: row for row in against["rows"] if row["group"] == "robust"}
    row = rows["robust/l2/0.5/worst/accuracy"]
    assert row["values"][0] == report["robust"]["k"]["0"]["norms"]["l2"]["accuracy"]["worst"][1]
    assert row["difference"][0] == pytest.approx(row["values"][0][0] - row["values"][1][0])
    assert "robust_k1/l2/0.5/worst/accuracy" not in rows  # the classifier refines nothing
    assert "accuracy under the strongest attack" in text.getvalue()
    drawn = {path.name for path in Path(result.report).parent.iterdir()}
    names = {"robustness", "adversarials", "distal", "chains", "samples_buffer", "neighbours_fresh"}
    assert {f"{name}.png" for name in names} <= drawn
    assert "against_robustness.png" in {path.name for path in Path(result.against).parent.iterdir()}
    seen = {key: value for key, _, value in points(runs, result)}
    assert seen["gen/buffer/fid_lenet"] == report["gen"]["samplers"]["buffer"]["figures"]["fid"]
    assert seen["robust/linf/0.1/transfer/accuracy"] == against["transfer"]["linf"]["b_on_a"][3][0]
    tags = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}").get_run(result.run_id).data.tags
    assert tags["gen.lenet"] == f"digits sha256:{report['gen']['extractor']['sha256']}"


def test_mlflow_that_is_away_costs_no_figure_and_gets_them_the_next_time(runs):
    blocked = runs / "blocked"
    blocked.write_text("a file where a folder should be")
    uri = f"tracking.uri=sqlite:///{blocked}/mlflow.db"
    first = evaluated(runs / "one", FAST, uri)
    assert first.status == "finished"
    assert "the same command sends it again" in first.message
    blocked.unlink()
    again = evaluated(runs / "one", FAST, uri)
    assert (again.message, again.cached) == ("", True)
    client = MlflowClient(f"sqlite:///{blocked}/mlflow.db")
    assert client.get_run(again.run_id).data.metrics == pytest.approx(first.metrics)


def released(path):
    """A file in the layout of the paper's code (see tests/jem/test_released.py for what is read from it)."""
    torch.manual_seed(0)
    network = make_network(ModelConfig(name="wide_resnet", depth=10, width=1), (3, 32, 32), 10)
    ours = {key.replace("shortcut.", "shortcut.0."): value for key, value in network.state_dict().items()}
    theirs = {key if key.startswith("class_output") else f"f.{key}": value for key, value in ours.items()}
    heads = {"energy_output.weight": torch.zeros(1, 64), "energy_output.bias": torch.zeros(1)}
    torch.save({"model_state_dict": theirs | heads, "replay_buffer": torch.zeros(4, 3, 32, 32)}, path)


def forty(_config):
    images = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.arange(40) % 10
    parts = {"train": slice(0, 20), "validation": slice(20, 30), "test": slice(30, 40)}
    return {name: (images[rows], labels[rows]) for name, rows in parts.items()}


def test_a_released_checkpoint_is_evaluated_and_its_mlflow_run_is_its_own(tmp_path):
    released(tmp_path / "jem.pt")
    settings = ("data.name=test_evaluation:forty", FAST, f"storage_path={tmp_path}")
    result = evaluated(tmp_path / "jem.pt", *settings)
    assert (result.name, result.step, result.cached, result.message) == ("jem", None, False, "")
    again = evaluated(tmp_path / "jem.pt", *settings)
    assert (again.cached, again.run_id) == (True, result.run_id)
    assert sorted(points(tmp_path, result)) == sorted((key, 0, value) for key, value in result.metrics.items())
    with pytest.raises(DataError, match="10 classes"):
        evaluated(tmp_path / "jem.pt", "data.name=cifar100", FAST)
    assert torch.equal(open_model(str(tmp_path / "jem.pt"), settings[:1]).buffer(), torch.zeros(4, 3, 32, 32))


def test_a_run_is_a_model_by_its_name_too(made, monkeypatch):
    storage, first, _, _ = made
    assert open_model("one", [f"storage_path={storage}"]).digest == open_model(str(first)).digest
    monkeypatch.chdir(storage)
    assert open_model("one").source == "one", "a folder that is there"
    monkeypatch.chdir(first)
    with pytest.raises(ConfigError, match="two does not exist"):
        open_model("two")


def test_a_report_that_could_not_be_written_is_not_made(made, tmp_path, monkeypatch):
    readable = [*made[:2], tmp_path]
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) not in readable)
    monkeypatch.setattr(evaluation, "load", lambda _: pytest.fail("the data were opened"))
    with pytest.raises(ConfigError, match=r"storage_path: the report would go to .*cannot be written by this user"):
        evaluated(made[1], FAST, f"storage_path={tmp_path}/runs")


def test_a_models_name_is_that_of_the_data_it_was_trained_with_wherever_these_are_now(made):
    _, first, _, _ = made
    assert open_model(str(first), ["data.root=/elsewhere/copy7"]).config.registered_name == "jem-digits"
    kept = {"data.name": "parquet", "data.root": "/train/photos", "workers": 1, "steps": 4, "seed": 0}
    moved = opened._config(kept, {"data.root": Entry("/mnt/copy7")}, opened.FREE)
    assert (moved.data.root, moved.registered_name) == ("/mnt/copy7", "jem-photos")
    asked = opened._config(kept, {"evaluate.model_name": Entry("mine")}, opened.FREE)
    assert asked.registered_name == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sgld.steps=3",), "sgld.steps: is not to be changed"),
        (("evaluate.suit=fast",), r"evaluate.suit: no such setting; did you mean 'evaluate.suite'\?"),
        (("evaluate.suite=none",), "evaluate.suite"),
        (("evaluate.suite=quick",), "evaluate.suite"),
        (("workers=0",), "workers"),
        (("evaluate.suite=full", "evaluate.sets=[unifrom]"), "uniform"),
        (("evaluate.suite=full", "evaluate.sets=[digits]"), "digits"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_written(runs, arguments, said):
    with pytest.raises(ConfigError, match=said):
        evaluated(runs / "one", *arguments)
    assert not (runs / "one" / "evaluations").exists()
    assert not (runs / "mlflow.db").exists()


def test_what_is_no_model_is_said_to_be_none(tmp_path, runs):
    for name in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="checkpoint directory"):
            open_model(str(name))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_model(str(tmp_path / "empty"))
    weights = runs / "one" / "checkpoints" / "12" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        evaluated(runs / "one", FAST)
    assert not (runs / "one" / "evaluations").exists()


def test_data_that_are_not_those_of_the_training_are_named(runs, monkeypatch):
    manifest = runs / "one" / "checkpoints" / "12" / "manifest.json"
    opened = open_model(str(manifest.parent), [FAST])
    with pytest.raises(DataError, match=r"data\.root"):
        report_of(replace(opened, data_digest="0" * 64))


def test_a_training_that_ends_with_the_full_suite_scores_the_buffer_that_it_leaves(tmp_path):
    outcome = fit(tmp_path / "run", *GENTLE)
    again = report_of(open_model(str(tmp_path / "run"), GENTLE)).report
    assert outcome["report"]["gen"]["samplers"]["buffer"] == again["gen"]["samplers"]["buffer"]
    assert list(outcome["report"]["robust"]["k"]) == ["0", "1"]
    tags = [event["tags"] for event in log_of(tmp_path / "run", "tags")]
    assert {"gen.lenet": f"digits sha256:{again['gen']['extractor']['sha256']}"} in tags


@pytest.mark.usefixtures("tables")
def test_an_evaluation_of_a_run_that_mlflow_has_lost_is_a_run_of_its_own_that_ends(runs):
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    lost = client.create_run("0").info.run_id
    record = read_record(Location.of(runs / "one"))
    record.mlflow = {"uri": f"sqlite:///{runs / 'mlflow.db'}", "experiment": "jem", "run_id": lost}
    record.save(Location.of(runs / "one"))
    client.delete_run(lost)
    result = evaluated(runs / "one", FAST)
    run = client.get_run(result.run_id)
    assert (result.run_id != lost, run.info.status) == (True, "FINISHED")
    assert run.data.tags["evaluated"] == str(runs / "one")
    assert run.data.params["seed"] == "0"
    assert run.data.metrics == pytest.approx(result.metrics)


def test_mlflow_shows_the_newest_of_several_evaluations():
    """Accuracies on a hundred images are alike now and then: the last one is not left out for an older one's sake."""
    sent = [Point("robust/linf/0.1/worst/accuracy", value, time, 40) for time, value in ((1, 0.42), (2, 0.55))]
    run = SimpleNamespace(created=False, history=lambda: sent)
    report = {"settings": {"noise_std": 0.0}}

    def points(value, step=40):
        return [p.value for p in _points(run, report, {"robust/linf/0.1/worst/accuracy": value}, step)]

    assert points(0.42) == [0.42]
    assert points(0.55) == []
    assert points(0.55, step=80) == [0.55]
