"""The models that come with the project: small, whole, of no one's machine, and as good as their reports say."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from jem.data.sources import load
from jem.errors import DataError
from jem.predict import CARD, Predictor, read_card
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
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (MODELS / name / "model_card.md").read_text())
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
    assert opened.prior().sample is not None
    assert sum(p.numel() for p in opened.network().parameters()) > 0
    found = Predictor.load(MODELS / name)(examples(MODELS / name, card))
    assert np.isfinite(found.log_density).all()


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
