"""From a finished run to the folder of its final model."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from worker_runs import HOOKED, Hooks, fit, newest, tiny

from jem.data.sources import load
from jem.errors import CheckpointError, DivergedError
from jem.evaluate.calibration import confidence_bins, ece
from jem.files import Location
from jem.predict import Predictor, read_card
from orchestrator.final_model import calibrate, examples, summary, write_model
from orchestrator.training import Training

REGISTER = "evaluate.register=true"


def finished(folder, *settings):
    """(the workers' outcome, the event, the card, the model) of a run in `folder`."""
    outcome = fit(folder, *settings, REGISTER)
    assert outcome["status"] == "finished", outcome["message"]
    event = write_model(folder, tiny(*settings, REGISTER), outcome, {"name": "tiny", "folder": str(folder)})
    model = Predictor.load(folder / event["path"])
    return outcome, event, model.card, model


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ((), "model"),
        (("optimizer.ema_decay=0.9", "evaluate.ema=true"), "ema"),
        (("evaluate.final=best", "evaluate.every=2"), "best"),
        (("precision=float64", "evaluate.noise_std=0.5"), "model"),
    ],
)
def test_the_folder_answers_as_the_run_was_measured(tmp_path, settings, weights):
    """On images without noise, whatever the run was evaluated on: such will be asked about."""
    outcome, event, card, model = finished(tmp_path, *settings)
    split = load(tiny().data).validation
    answer = model(split.images.permute(0, 2, 3, 1))
    right = answer.index == split.labels.numpy()
    p = answer.probabilities[np.arange(len(right)), split.labels.numpy()]
    figures = card.info["validation"]
    assert figures["accuracy"] == pytest.approx(right.mean())
    assert figures["nll"] == pytest.approx(-np.log(p).mean())
    assert figures["ece"] == pytest.approx(
        ece(confidence_bins(torch.from_numpy(answer.probabilities).log(), split.labels))
    )
    assert np.count_nonzero(answer.in_distribution) == math.ceil(0.95 * len(right))
    assert card.threshold == answer.log_density[answer.in_distribution].min()
    manifest = newest(tmp_path)
    assert (outcome["weights"], card.info["weights"], card.info["step"]) == (weights, weights, manifest.step)
    assert card.digest == event["digest"] == manifest.files[f"{weights}.safetensors"]["sha256"]
    assert card.info["data_digest"] == manifest.info["data_digest"]
    assert event == {
        "step": manifest.step,
        "path": f"models/{card.digest[:12]}",
        "digest": card.digest,
        "name": "jem-digits",
        "champion": "nll",
    }


def test_the_card_says_what_the_model_takes_and_is(tmp_path):
    _, event, card, _ = finished(tmp_path, "evaluate.input_layout=NCHW", "evaluate.input_dtype=float32")
    images = examples(tmp_path / event["path"], card)
    assert (images.shape, images.dtype) == ((3, 1, 8, 8), np.float32)
    np.testing.assert_allclose(images * 255, load(tiny().data).validation.images[:3])
    assert card.expects in summary(card)
    assert card.config == json.loads(json.dumps(tiny().science))
    assert card.classes == tuple("0123456789")


def test_the_same_again_changes_nothing_and_a_damaged_one_is_replaced(tmp_path):
    outcome, event, card, _ = finished(tmp_path)
    folder = tmp_path / event["path"]

    def digests():
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    before, times = digests(), {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = tiny(REGISTER), outcome, {"name": "tiny", "folder": str(tmp_path)}
    assert write_model(tmp_path, *again) == event
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    (folder / "model.json").write_text("{")
    assert write_model(tmp_path, *again) == event
    assert digests() == before
    assert read_card(folder) == card


def test_more_steps_leave_the_model_before_as_it_was(tmp_path):
    """It may not be in MLflow yet."""
    _, first, card, _ = finished(tmp_path)
    _, second, _, _ = finished(tmp_path, "steps=16")
    assert first["path"] != second["path"]
    assert read_card(tmp_path / first["path"]) == card


def test_a_run_that_is_read_out_again_by_its_workers_has_the_same_calibration(tmp_path):
    """A driver that died after training: the same command gets the same model."""
    one, other = (fit(tmp_path, REGISTER, attempt=n)["calibrated"] for n in (1, 2))
    np.testing.assert_array_equal(one.pop("examples"), other.pop("examples"))
    assert one == other


def test_nothing_is_measured_for_a_model_that_is_not_registered(tmp_path):
    assert fit(tmp_path)["calibrated"] is None


def test_a_final_model_that_is_not_finite_is_a_run_that_diverged(tmp_path, monkeypatch):
    measure = Training.calibrate

    def late(training):
        Hooks.output = staticmethod(hostile)
        measure(training)

    monkeypatch.setattr(Training, "calibrate", late)
    outcome = fit(tmp_path, HOOKED, REGISTER, "steps=4")
    assert (outcome["status"], outcome["exit_code"]) == ("diverged", 4)
    with pytest.raises(DivergedError):
        calibrate(torch.full((3, 2), math.nan), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, 2, 2))


def hostile(out):
    return out * math.nan


def test_a_damaged_checkpoint_makes_no_model(tmp_path):
    outcome = fit(tmp_path, REGISTER)
    path = Location.of(outcome["checkpoint"]) / "model.safetensors"
    path.write(path.read()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        write_model(tmp_path, tiny(REGISTER), outcome, {})
    assert not list((tmp_path / "models").rglob("model.json"))
