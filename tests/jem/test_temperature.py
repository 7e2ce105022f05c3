import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from jem.errors import DivergedError
from jem.evaluate.calibration import confidence_bins, ece
from jem.evaluate.classification import nll
from jem.evaluate.temperature import HIGHEST, LOWEST, fit_temperature


def drawn(n, generator, temperature, classes=5):
    """Logits near 20, and labels of which softmax(logits / temperature) are the probabilities."""
    logits = 20 + 4 * torch.randn(n, classes, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(temperature, generator):
    logits, labels = drawn(20_000, generator, temperature)
    found = fit_temperature(logits, labels)
    assert found.value == pytest.approx(temperature, rel=0.05)
    assert found.reason == "fitted"
    assert found.ece_after < 0.015
    if temperature != 1:
        assert found.ece_after < found.ece_before / 3
        assert found.nll_after < found.nll_before


def test_one_image_right_at_gap_a_and_one_wrong_at_gap_b_in_closed_form():
    """Two right by g and one wrong by g: sigmoid(g / T) = 2 / 3, so T = g / log 2."""
    logits = torch.tensor([[6.0, 0.0], [6.0, 0.0], [6.0, 0.0]])
    found = fit_temperature(logits, torch.tensor([0, 0, 1]))
    assert found.value == pytest.approx(6 / math.log(2), rel=1e-12)
    assert found.nll_after == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 3)


ROWS = st.lists(st.tuples(st.lists(st.integers(-40, 40), min_size=3, max_size=3), st.integers(0, 2)), min_size=1)


@given(ROWS, st.sampled_from([1e-6, 0.1, 1.0, 1e4]))
def test_scaling_never_raises_the_nll_it_was_fitted_on_and_keeps_every_answer(rows, scale):
    logits = scale * torch.tensor([row for row, _ in rows], dtype=torch.float64)
    labels = torch.tensor([label for _, label in rows])
    found = fit_temperature(logits, labels)
    assert LOWEST * (1 - 1e-9) <= found.value <= HIGHEST * max(1, 80 * scale)
    assert found.nll_after <= found.nll_before
    assert found.nll_before == nll(logits, labels)
    assert found.nll_after == nll(logits / found.value, labels)
    assert found.ece_after == ece(confidence_bins(logits / found.value, labels))
    assert torch.equal(logits.argmax(dim=1), (logits / found.value).argmax(dim=1))
    assert fit_temperature(logits, labels) == found


@given(ROWS)
def test_no_other_temperature_has_a_lower_nll(rows):
    logits = 0.1 * torch.tensor([row for row, _ in rows], dtype=torch.float64)
    labels = torch.tensor([label for _, label in rows])
    found = fit_temperature(logits, labels)
    assume(found.reason == "fitted")
    search = minimize_scalar(lambda t: nll(logits / math.exp(t), labels), bounds=(-6.9, 6.9), method="bounded")
    assert found.nll_after <= search.fun + 1e-9


def test_validation_images_that_are_all_right_leave_the_confidence_alone():
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    found = fit_temperature(logits, torch.tensor([0, 1]))
    assert found.value == 1
    assert "misclassified" in found.reason
    assert found.nll_after == found.nll_before


def test_logits_that_point_away_from_the_labels_are_flattened():
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    found = fit_temperature(logits, torch.tensor([1, 0]))
    assert found.value == 3 * HIGHEST
    assert found.nll_after == pytest.approx(math.log(2), abs=2e-3)


@pytest.mark.parametrize("scale", [1e3, 1e5, 1e9])
def test_large_logits_that_tell_something_are_fitted_however_large(scale, generator):
    logits, labels = drawn(2000, generator, 1.0)
    found, usual = fit_temperature(logits * scale, labels), fit_temperature(logits, labels)
    assert (found.reason, found.value) == ("fitted", pytest.approx(usual.value * scale, rel=1e-6))
    assert found.nll_after == pytest.approx(usual.nll_after, rel=1e-6)


def test_what_cannot_be_fitted_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="validation split"):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    for bad in (math.nan, math.inf):
        with pytest.raises(DivergedError, match="not finite"):
            fit_temperature(torch.tensor([[bad, 0.0]]), torch.tensor([0]))
