"""Starting from a model that exists."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from worker_runs import fit, newest, prepared, tiny

from jem import checkpoint
from jem.errors import CheckpointError, DataError
from jem.models import make_network
from jem.world import World
from orchestrator.config import load_run_config
from orchestrator.final_model import write_model


@pytest.fixture
def classifier():
    """A plain classifier's tensors, for the tiny network on digits."""
    torch.manual_seed(7)
    return make_network(tiny().model, (1, 8, 8), 10).state_dict()


def weights(training):
    return training.state.network.state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def chains_of(folder, capacity=24):
    return checkpoint.read_chains(newest(folder), World(), capacity).chains


def test_a_checkpoint_gives_its_weights_and_its_chains(tmp_path):
    outcome = fit(tmp_path / "old")
    training = prepared(tmp_path / "new", init_from=outcome["checkpoint"])
    assert equal(weights(training), newest(tmp_path / "old").tensors("model.safetensors"))
    assert torch.equal(training.state.replay.chains, chains_of(tmp_path / "old"))
    assert training.state.step == 0
    assert not training.state.optimizer.state_dict()["state"], "moments are those of another training"


@pytest.mark.parametrize("final", ["best", "ema"])
def test_of_a_checkpoint_the_final_weights_are_taken(tmp_path, final):
    settings = ("optimizer.ema_decay=0.9", f"evaluate.{'final=best' if final == 'best' else 'ema=true'}", "steps=7")
    fit(tmp_path / "old", *settings, "evaluate.every=5")
    old = newest(tmp_path / "old")
    training = prepared(tmp_path / "new", "optimizer.ema_decay=0.5", init_from=old.directory.uri)
    assert equal(weights(training), old.tensors(f"{final}.safetensors"))
    assert equal(training.state.average.state_dict(), weights(training))


def test_chains_of_another_number_are_not_taken_over(tmp_path):
    outcome = fit(tmp_path / "old")
    new = prepared(tmp_path / "new", "replay.capacity=25", init_from=outcome["checkpoint"])
    assert len(new.state.replay.chains) == 25
    assert torch.equal(new.state.replay.chains, prepared(tmp_path / "x", "replay.capacity=25").state.replay.chains)
    assert equal(weights(new), newest(tmp_path / "old").tensors("model.safetensors"))


def test_a_classifiers_checkpoint_becomes_a_jem(tmp_path):
    outcome = fit(tmp_path / "old", recipe="digits_classifier")
    training = prepared(tmp_path / "new", init_from=outcome["checkpoint"])
    averages = newest(tmp_path / "old").tensors("ema.safetensors")  # what that recipe ends with
    assert equal(weights(training), averages)
    assert fit(tmp_path / "new", init_from=outcome["checkpoint"])["status"] == "finished"


FORMS = {
    "safetensors": lambda folder, tensors: save_file(tensors, folder / "net.safetensors") or "net.safetensors",
    "a folder": lambda folder, tensors: save_file(tensors, folder / "model.safetensors") or "",
    "pt": lambda folder, tensors: torch.save(tensors, folder / "net.pt") or "net.pt",
    "pt, wrapped and from DataParallel": lambda folder, tensors: (
        torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}, "epoch": 3}, folder / "net.pt")
        or "net.pt"
    ),
    "pt, under model_state_dict": lambda folder, tensors: (
        torch.save({"model_state_dict": tensors}, folder / "net.pth") or "net.pth"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_classifiers_tensors_are_taken(tmp_path, classifier, form):
    name = FORMS[form](tmp_path, classifier)
    training = prepared(tmp_path / "new", "optimizer.ema_decay=0.9", init_from=str(tmp_path / name))
    assert equal(weights(training), classifier)
    assert equal(training.state.average.state_dict(), classifier)


def seen_at_32(_config):
    images = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return {"train": (images, torch.arange(40) % 10)}


@pytest.mark.parametrize(
    ("chains", "conditional", "taken"),
    [(24, "false", True), (25, "false", False), (24, "true", False), (None, "false", False)],
)
def test_a_released_jem_gives_its_weights_and_its_chains_unless_ours_keep_a_class(tmp_path, chains, conditional, taken):
    net = ("model.name=wide_resnet", "model.depth=10", "model.width=1", "model.norm=none")
    data = ("data.name=test_initialize:seen_at_32", f"sgld.conditional={conditional}")
    fresh = prepared(tmp_path / "fresh", *net, *data)
    theirs = {
        key if key.startswith("class_output") else f"f.{key.replace('shortcut.', 'shortcut.0.')}": value + 1
        for key, value in weights(fresh).items()
    }
    buffer = None if chains is None else torch.rand(chains, 3, 32, 32)
    torch.save({"model_state_dict": theirs, "replay_buffer": buffer}, tmp_path / "jem.pt")
    training = prepared(tmp_path / "new", *net, *data, init_from=str(tmp_path / "jem.pt"))
    assert equal(weights(training), {key: value + 1 for key, value in weights(fresh).items()})
    assert torch.equal(training.state.replay.chains, buffer if taken else fresh.state.replay.chains)


def test_a_portable_model_with_a_prior_of_its_own_gives_its_weights(tmp_path):
    outcome = fit(tmp_path / "old", "replay.prior=gaussian", "evaluate.register=true")
    config = tiny("replay.prior=gaussian", "evaluate.register=true")
    model = write_model(tmp_path / "old", config, outcome, {"name": "tiny"})
    training = prepared(tmp_path / "new", "replay.prior=gaussian", init_from=str(tmp_path / "old" / model["path"]))
    assert equal(weights(training), newest(tmp_path / "old").tensors("model.safetensors"))


def test_the_name_of_a_bundled_model_goes_where_a_model_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = load_run_config("fashion_mnist", ["init_from=fashion_mnist"]).init_from
    assert (Path(found) / "model.safetensors").exists()
    Path("fashion_mnist").mkdir()
    assert load_run_config("fashion_mnist", ["init_from=fashion_mnist"]).init_from == f"{tmp_path}/fashion_mnist"


def test_a_run_that_goes_on_does_not_start_from_it_again(tmp_path, classifier):
    save_file(classifier, tmp_path / "net.safetensors")
    fit(tmp_path / "run", "steps=4", init_from=str(tmp_path / "net.safetensors"))
    training = prepared(tmp_path / "run", init_from=str(tmp_path / "net.safetensors"))
    assert training.state.step == 4
    assert not equal(weights(training), classifier)


def test_tensors_that_do_not_fit_are_named_with_both_shapes(tmp_path, classifier):
    wrong = dict(classifier)
    name, value = next(iter(wrong.items()))
    wrong[name] = torch.zeros(3, *value.shape[1:])
    last = list(wrong)[-1]
    wrong["extra"] = wrong.pop(last)
    save_file(wrong, tmp_path / "net.safetensors")
    with pytest.raises(DataError) as caught:
        prepared(tmp_path / "new", init_from=str(tmp_path / "net.safetensors"))
    message = str(caught.value)
    assert f"init_from={tmp_path}/net.safetensors: does not fit this network" in message
    assert f"{name} has shape {[3, *value.shape[1:]]}, {list(value.shape)} was expected" in message
    assert f"{last} is missing" in message
    assert "extra is unknown" in message


class Hostile:
    def __reduce__(self):
        return (open, ("executed", "w"))


def hostile(path):
    path.write_bytes(pickle.dumps({"weight": Hostile()}))


BAD = {
    "net.pt": (hostile, "is not a file of tensors"),
    "text.pt": (lambda path: path.write_text("hello"), "is not a file of tensors"),
    "text.safetensors": (lambda path: path.write_text("hello"), "is not a file of tensors"),
    "list.pt": (lambda path: torch.save([torch.zeros(1)], path), "is not a state_dict"),
    "absent.pt": (lambda _: None, "there is no"),
    "empty": (lambda path: path.mkdir(), "there is no"),
    "nonsense://a/b.pt": (lambda _: None, "not a location that pyarrow can open"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_holds_no_tensors_is_bad_data_and_is_not_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make, said = BAD[name]
    make(tmp_path / name)
    source = name if "://" in name else str(tmp_path / name)
    with pytest.raises(DataError, match=said) as caught:
        prepared(tmp_path / "new", init_from=source)
    assert source in str(caught.value)
    assert str(caught.value).startswith("init_from: ")
    assert not (tmp_path / "executed").exists()


def test_a_damaged_checkpoint_is_not_started_from(tmp_path):
    outcome = fit(tmp_path / "old")
    path = tmp_path / "old" / "checkpoints" / "12" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its contents are not what was written"):
        prepared(tmp_path / "new", init_from=outcome["checkpoint"])
