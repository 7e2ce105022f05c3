"""The models that come with the project: small, whole, of no one's machine, and as good as their reports say."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

from jem.data.augment import to_float
from jem.data.sources import load
from jem.errors import DataError
from jem.predict import CARD, Predictor, read_card
from jem.train import frozen_logits
from orchestrator.bundled import MODELS, bundled_models, place_of
from orchestrator.final_model import EXAMPLES, examples
from orchestrator.opened import open_model

pytestmark = pytest.mark.timeout(180)
MIB = 2**20
TESTED = 2_000


@pytest.fixture(params=bundled_models())
def name(request):
    return request.param


def test_there_is_one():
    assert "fashion_mnist" in bundled_models()


def test_it_is_small_and_names_no_machine(name):
    files = list((MODELS / name).iterdir())
    assert sum(path.stat().st_size for path in files) < 25 * MIB
    assert {CARD, EXAMPLES, "model.safetensors", "model_card.md", "report.json"} <= {path.name for path in files}
    for path in files:
        if path.suffix in (".json", ".md"):
            assert not re.search(r"(/home/|/tmp/|/root/|/work/|/Users/)", path.read_text()), path.name
    card = (MODELS / name / "model_card.md").read_text()
    assert "## How to use it" in card
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card)
    assert len(shown) >= 5
    assert set(shown) <= {path.name for path in files}, "the pictures of the card"


def test_a_file_of_its_name_in_the_working_directory_comes_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_of(name) == str(MODELS / name)
    (tmp_path / name).mkdir()
    assert place_of(name) == name


def test_it_opens_by_its_name_and_its_network_is_what_predicts(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened, card = open_model(name), read_card(MODELS / name)
    assert (opened.name, opened.digest, opened.data_digest) == (name, card.digest, card.info["data_digest"])
    assert opened.run is None
    assert opened.served == dataclasses.asdict(card), "for the report's model card"
    given = examples(MODELS / name, card)
    logits = frozen_logits(opened.network(), opened.config)(
        to_float(torch.from_numpy(given).permute(0, 3, 1, 2), torch.float32)
    )
    found = Predictor.load(MODELS / name)(given)
    np.testing.assert_allclose(found.log_density, logits.detach().double().logsumexp(dim=1).numpy(), rtol=0, atol=0.05)
    labels = torch.arange(len(card.classes))
    starts = opened.prior().sample(labels, torch.Generator().manual_seed(0))
    assert starts.shape == (len(labels), *card.image_shape)
    assert starts.isfinite().all()


def test_its_accuracy_and_what_it_calls_known_are_those_of_its_report(name):
    config = open_model(name).config
    try:
        data = load(config.data)
    except DataError as error:
        pytest.skip(f"its data are not here: {error}")
    report = json.loads((MODELS / name / "report.json").read_text())
    images, labels = data.test.images[:TESTED], data.test.labels[:TESTED]
    model = Predictor.load(MODELS / name)
    found = model(images.permute(0, 2, 3, 1).numpy())
    right = np.array([model.card.classes[int(y)] for y in labels]) == np.array(found.label)
    for measured, said in (
        (right.mean(), report["metrics"]["test/accuracy"]),
        (found.in_distribution.mean(), report["threshold"]["test_accepted"][0]),
    ):
        assert abs(measured - said) < 4 * math.sqrt(said * (1 - said) / len(images)), "4 binomial deviations"
