"""Registering a final model with a real MLflow on SQLite."""

from __future__ import annotations

import json
import shutil

import pytest
from made_models import portable

from jem.errors import DataError
from orchestrator.outbox import Model, Point
from orchestrator.register import logged_model, register

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def store(migrated, tmp_path_factory):
    """(client, run id, artifacts)."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("register")
    shutil.copyfile(migrated, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("jem", f"{folder}/artifacts")
    return client, client.create_run(experiment).info.run_id


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """MLflow's defaults would be found in the working directory."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "mlflow.db").exists(), "the process' own MLflow was asked"


@pytest.fixture
def registered(store, tmp_path, request):
    """Register a model of these weights and figures under the test's own name; (version, champion text)."""
    client, run_id = store
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)

    def function(seed=0, champion="nll", through=client, metrics=(), description=None, **figures):
        card = portable(tmp_path / str(seed), seed, **figures)
        item = Model(str(seed), 7, name, champion, card.digest, metrics)
        found = register(through, run_id, tmp_path / str(seed), item, description)
        assert found.model.startswith(f"models:/{name}/")
        return int(found.model.rsplit("/", 1)[1]), found.champion

    function.name = name
    function.champion = lambda: int(client.get_model_version_by_alias(name, "champion").version)
    return function


def test_a_version_has_all_that_its_users_ask_for(store, registered):
    from mlflow.models import Model as MLmodel

    client, run_id = store
    before = client.get_run(run_id).info
    point = Point("test/accuracy", 0.75, 1000, 7)
    assert registered(0, metrics=(point,), description="what it is") == (1, "yes: the first one (validation nll 0.5)")
    assert registered.champion() == 1
    after = client.get_run(run_id)
    assert (after.info.status, after.info.end_time) == (before.status, before.end_time)
    version = client.get_model_version(registered.name, 1)
    assert (version.run_id, version.description, version.status) == (run_id, "what it is", "READY")
    assert version.tags["jem.data"] == "d" * 64
    assert {k: float(v) for k, v in version.tags.items() if k.startswith("jem.validation.")} == {
        "jem.validation.accuracy": 0.9,
        "jem.validation.nll": 0.5,
        "jem.validation.ece": 0.1,
    }
    model = logged_model(client, run_id, version.tags["jem.checkpoint"])
    assert str(model.status) == "READY"
    assert [(m.key, m.value, m.step) for m in model.metrics] == [("test/accuracy", 0.75, 7)]
    assert model.params["model.name"] == "small_conv"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": registered.name, "version": 1}]
    assert [output.model_id for output in after.outputs.model_outputs] == [model.model_id]
    assert [(p.value, p.timestamp, p.step) for p in client.get_metric_history(run_id, "test/accuracy")] == [
        (0.75, 1000, 7)
    ]
    described = MLmodel.load(version.source)
    (images,) = described.signature.inputs.inputs
    assert (str(images.type), images.shape) == ("uint8", (-1, 4, 6, 3))
    columns = ["label", "probability", "probabilities", "log_density", "in_distribution"]
    assert described.signature.outputs.input_names() == columns
    assert (described.run_id, described.model_id) == (run_id, model.model_id)
    assert described.saved_input_example_info is not None
    with open(f"{version.source}/requirements.txt") as file:
        requirements = file.read().split()
    assert {line.split("==")[0] for line in requirements} >= {"mlflow", "torch", "numpy", "safetensors"}
    assert all(line.count("==") == 1 and "+" not in line for line in requirements)


def test_the_same_weights_are_registered_once(store, registered):
    client, _ = store
    first = registered(3)
    made = len(client.search_model_versions(f"name = '{registered.name}'"))
    assert registered(3) == first
    assert len(client.search_model_versions(f"name = '{registered.name}'")) == made == 1
    assert registered(4)[0] == 2


@pytest.mark.parametrize(
    ("metric", "held", "new", "moves"),
    [
        ("nll", 0.5, 0.4, True),
        ("nll", 0.5, 0.6, False),
        ("nll", 0.5, 0.5, False),
        ("ece", 0.1, 0.05, True),
        ("accuracy", 0.9, 0.95, True),
        ("accuracy", 0.9, 0.85, False),
    ],
)
def test_the_champion_is_the_best_on_validation_and_moves_only_for_a_better_one(registered, metric, held, new, moves):
    registered(10, champion=metric, **{metric: held})
    version, why = registered(11, champion=metric, **{metric: new})
    assert registered.champion() == (version if moves else 1)
    assert why == f"{'yes' if moves else 'no'}: validation {metric} {new:g}, version 1 has {held:g}"


def test_models_that_were_validated_on_other_data_are_not_compared(registered):
    registered(20)
    _, why = registered(21, data="e" * 64, nll=0.01)
    assert registered.champion() == 1
    assert why == "no: version 1 was validated on other data, so nll cannot be compared; move the alias by hand"


def test_a_champion_of_somebody_elses_is_left_in_place(store, registered):
    client, run_id = store
    client.create_registered_model(registered.name)
    client.create_model_version(registered.name, "/elsewhere", run_id, tags={"jem.data": "d" * 64})
    client.set_registered_model_alias(registered.name, "champion", "1")
    assert registered(25)[1].startswith("no: version 1 has no validation nll")
    assert registered.champion() == 1


def test_an_alias_that_was_moved_by_hand_is_not_moved_back_by_a_repeat(store, registered):
    client, _ = store
    registered(30)
    assert registered(31, nll=0.1)[0] == registered.champion() == 2
    client.set_registered_model_alias(registered.name, "champion", "1")
    assert registered(31, nll=0.1)[0] == 2
    assert registered.champion() == 1


def test_who_asks_for_another_figure_is_compared_again_by_it(store, registered):
    registered(32, nll=0.2, ece=0.09)
    assert registered(33, nll=0.1, ece=0.11)[1].startswith("yes")
    assert registered(32, champion="ece", nll=0.2, ece=0.09) == (1, "yes: validation ece 0.09, version 2 has 0.11")
    assert registered.champion() == 1
    assert registered(33, nll=0.1, ece=0.11) == (2, "no: version 1 is by now")
    client, _ = store
    client.set_registered_model_alias(registered.name, "champion", "2")
    registered(32, champion="ece", nll=0.2, ece=0.09)
    assert registered.champion() == 2, "a repeat moves nothing"


class Failing:
    """A client whose n-th change is made and then not answered, or not even made."""

    def __init__(self, client, n, made):
        self.client, self.n, self.made, self.changes = client, n, made, 0

    def __getattr__(self, name):
        method = getattr(self.client, name)
        if name.startswith(("get_", "search_")):
            return method

        def change(*arguments, **named):
            self.changes += 1
            if self.changes == self.n and not self.made:
                raise ConnectionError(name)
            answer = method(*arguments, **named)
            if self.changes == self.n:
                raise ConnectionError(name)
            return answer

        return change


@pytest.mark.parametrize("made", [True, False])
def test_wherever_it_breaks_off_the_next_call_ends_with_one_version_one_model_and_its_alias(store, registered, made):
    client, run_id = store
    points = (Point("test/nll", 0.5, 1000, 7),)
    n = broken = 0
    while broken == n:
        n += 1
        card_seed = 100 * (1 + made) + n
        try:
            registered(card_seed, through=Failing(client, n, made), metrics=points, nll=1 / card_seed)
        except ConnectionError:
            broken += 1
        version, why = registered(card_seed, metrics=points, nll=1 / card_seed)
        assert version == n == len(client.search_model_versions(f"name = '{registered.name}'"))
        assert why.startswith("yes")
        assert registered.champion() == n
        digest = client.get_model_version(registered.name, version).tags["jem.checkpoint"]
        found = client.search_logged_models(
            [client.get_run(run_id).info.experiment_id], f"tags.`jem.checkpoint` = '{digest}'"
        )
        assert [str(model.status) for model in found] == ["READY"]
        assert [m.key for m in found[0].metrics] == ["test/nll"]
        assert "mlflow.modelVersions" in found[0].tags
        outputs = [output.model_id for output in client.get_run(run_id).outputs.model_outputs]
        assert outputs.count(found[0].model_id) == 1
    assert broken >= 7


def test_the_same_weights_that_take_other_images_are_another_version(store, tmp_path):
    client, run_id = store
    made = []
    for folder, layout in (("a", "NHWC"), ("b", "NCHW"), ("c", "NHWC")):
        card = portable(tmp_path / folder, seed=99, layout=layout)
        item = Model(folder, 7, "toys", "nll", card.digest, ())
        made.append(register(client, run_id, tmp_path / folder, item).model)
    assert made == ["models:/toys/1", "models:/toys/2", "models:/toys/1"]


def test_a_folder_that_holds_no_model_is_said_to(store, tmp_path):
    client, run_id = store
    with pytest.raises(DataError, match="holds no model"):
        register(client, run_id, tmp_path, Model("x", 1, "none", "nll", "ab"))
