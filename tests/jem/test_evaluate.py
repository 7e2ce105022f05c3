import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jem.config import EvaluateConfig
from jem.data.splits import DataSet, Split
from jem.errors import DivergedError
from jem.evaluate.calibration import Bins, confidence_bins, ece
from jem.evaluate.classification import accuracy, nll
from jem.evaluate.evaluate import BATCH, evaluate_fast, over_batches, validate
from jem.evaluate.ood import approx_mass, auroc, interpolations, log_px, max_py, uniform_noise
from jem.world import World

LIKE = torch.zeros(())


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


FOUR = logits_of([0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.45, 0.55])
LABELS = torch.tensor([0, 0, 0, 1])


def test_accuracy_and_nll_worked_out_by_hand():
    assert accuracy(FOUR, LABELS) == 0.75
    by_hand = -(math.log(0.9) + math.log(0.2) + math.log(0.7) + math.log(0.55)) / 4
    assert nll(FOUR, LABELS) == pytest.approx(by_hand)
    assert nll(FOUR + 300, LABELS) == pytest.approx(by_hand)


def test_nll_of_a_confident_mistake_is_the_gap_of_the_logits_and_not_infinite():
    assert nll(torch.tensor([[200.0, 0.0]]), torch.tensor([1])) == pytest.approx(200)


def test_ece_worked_out_by_hand():
    """Ten bins: .9 alone and right, .8 alone and wrong, .7 right, .55 right."""
    by_hand = (abs(1 - 0.9) + abs(0 - 0.8) + abs(1 - 0.7) + abs(1 - 0.55)) / 4
    assert ece(confidence_bins(FOUR, LABELS, 10)) == pytest.approx(by_hand)


def test_ece_weighs_bins_by_their_counts_and_errors_cancel_within_a_bin():
    """Two bins: three of confidence .6, .7, .8 of which two are right, and one of .4 (of 3 classes) that is wrong."""
    logits = logits_of([0.6, 0.2, 0.2], [0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.4, 0.35, 0.25])
    labels = torch.tensor([0, 0, 1, 2])
    by_hand = (3 * abs(2 / 3 - 0.7) + 1 * abs(0 - 0.4)) / 4
    assert ece(confidence_bins(logits, labels, 2)) == pytest.approx(by_hand)


def test_bins_are_20_open_below_and_closed_above_and_certainty_is_in_the_last():
    logits = logits_of([1.0, 0.0], [0.5, 0.5], [0.96, 0.04], [0.949, 0.051])
    bins = confidence_bins(logits, torch.zeros(4, dtype=torch.int64))
    assert bins.counts.nonzero().flatten().tolist() == [9, 18, 19]  # (.45, .5], (.9, .95], (.95, 1]
    assert bins.counts.tolist()[19] == 2
    assert len(bins.counts) == 20


def test_a_perfectly_calibrated_and_certain_model_has_ece_0_and_a_certain_and_wrong_one_1():
    certain = logits_of([1.0, 0.0], [1.0, 0.0])
    assert ece(confidence_bins(certain, torch.tensor([0, 0]))) == 0
    assert ece(confidence_bins(certain, torch.tensor([1, 1]))) == 1


def test_bins_of_two_parts_add_up_to_those_of_the_whole(generator):
    logits = 3 * torch.randn(101, 5, generator=generator)
    labels = torch.randint(5, (101,), generator=generator)
    parts = [confidence_bins(logits[rows], labels[rows]) for rows in (slice(0, 40), slice(40, None))]
    whole = confidence_bins(logits, labels)
    summed = Bins(*(a + b for a, b in zip(*parts, strict=True)))
    torch.testing.assert_close(summed, whole)
    assert ece(summed) == pytest.approx(ece(whole))
    assert whole.counts.sum() == 101


def test_ece_estimates_how_far_confidence_is_off(generator):
    """p(right) = .8 said as .9: ECE .1 within 4 standard errors, here with every prediction in one bin."""
    n = 20_000
    labels = (torch.rand(n, generator=generator) > 0.8).long()
    got = ece(confidence_bins(logits_of([0.9, 0.1]).repeat(n, 1), labels))
    assert abs(got - 0.1) < 4 * math.sqrt(0.8 * 0.2 / n)


def test_nan_has_no_calibration():
    with pytest.raises(DivergedError, match="NaN"):
        confidence_bins(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))


def by_pairs(inside, outside):
    """The chance that a random inside score exceeds a random outside one; a tie is half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    return sum(pairs) / len(pairs)


SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=15)


@settings(deadline=None)
@given(SCORES, SCORES, st.sampled_from([0.0, 1000.0, -1e6]), st.sampled_from([1.0, 1e-6, 1e6]))
def test_auroc_counts_pairs_with_ties_half_whatever_the_scores_offset_and_scale(inside, outside, offset, scale):
    scores = [torch.tensor(s, dtype=torch.float64) * scale + offset for s in (inside, outside)]
    assert auroc(*scores) == pytest.approx(by_pairs(inside, outside))
    assert auroc(*reversed(scores)) == pytest.approx(1 - by_pairs(inside, outside))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_auroc_refuses_scores_that_are_no_numbers_and_says_what_to_do(bad):
    with pytest.raises(DivergedError, match="earlier checkpoint"):
        auroc(torch.tensor([0.0, bad]), torch.tensor([1.0]))


def test_scores_are_log_p_of_x_and_log_max_p_of_y():
    logits = logits_of([1.0, 3.0], [2.0, 6.0], [0.0, 0.5])
    torch.testing.assert_close(log_px(logits).exp(), torch.tensor([4.0, 8.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(max_py(logits).exp(), torch.tensor([0.75, 0.75, 1.0], dtype=torch.float64))


def test_max_p_of_y_still_orders_predictions_that_float32_rounds_to_certainty():
    confident = torch.tensor([[20.0, 0.0], [30.0, 0.0]])
    assert confident.softmax(dim=1).max(dim=1).values.tolist() == [1.0, 1.0]
    a, b = max_py(confident).tolist()
    assert a < b < 0


def test_approx_mass_is_minus_the_norm_of_the_gradient_of_log_p_in_closed_form(generator):
    """f(x)[y] = -|x - m_y|^2 / 2: d log p / dx = sum_y p(y|x) (m_y - x)."""
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 1, 2, 2, generator=generator, dtype=torch.float64)

    def network(x):
        return -(x.flatten(1)[:, None] - means).square().sum(dim=2) / 2

    gradient = network(x).softmax(dim=1) @ means - x.flatten(1)
    with torch.no_grad():
        mass = approx_mass(network, x)
    torch.testing.assert_close(mass, -gradient.norm(dim=1))
    assert not x.requires_grad


def test_interpolations_are_midpoints_with_the_image_before():
    images = torch.tensor([0.0, 2.0, 6.0])[:, None, None, None]
    assert interpolations(images).flatten().tolist() == [3.0, 1.0, 4.0]


def test_uniform_noise_has_the_moments_of_a_uniform_on_minus_one_to_one(generator):
    x = uniform_noise(torch.Size((100, 1, 10, 10)), generator)
    assert abs(x.mean()) < 4 * math.sqrt(1 / 3 / x.numel())
    assert abs((x**2).mean() - 1 / 3) < 4 * math.sqrt((1 / 5 - 1 / 9) / x.numel())


class Alone(World):
    """A rank whose sum waits for nobody: the test adds up."""

    def sum(self, values):
        return values.clone()


def gathered(function, images, config, size):
    return sum(over_batches(function, images, config, Alone(r, size), LIKE, "test") for r in range(size))


@pytest.mark.parametrize("noise_std", [0.0, 0.5])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_figures_of_images_are_the_same_bits_however_many_ranks_compute_them(size, noise_std, generator):
    images = torch.randn(2 * BATCH + 30, 1, 4, 4, generator=generator)
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 3)
    config = EvaluateConfig(noise_std=noise_std)
    calls = []

    def network(x):
        calls.append(len(x))
        return layer(x.flatten(1))

    alone = gathered(network, images, config, 1)
    assert calls == [BATCH, BATCH, 30]
    calls.clear()
    assert torch.equal(gathered(network, images, config, size), alone)
    assert len(calls) <= max(3, size) + size  # not everybody computes everything
    if not noise_std:
        torch.testing.assert_close(alone, layer(images.flatten(1)).detach())


def test_noise_on_evaluated_images_has_its_standard_deviation_and_every_set_its_own():
    images = torch.zeros(2 * BATCH, 1, 4, 4)
    config = EvaluateConfig(noise_std=0.5)
    a, b = (over_batches(lambda x: x.flatten(1), images, config, World(), LIKE, key) for key in ("a", "b"))
    n = a.numel()
    assert abs(a.square().mean() - 0.25) < 4 * 0.25 * math.sqrt(2 / n)
    assert abs((a * b).mean()) < 4 * 0.25 / math.sqrt(n)
    assert abs((a[:BATCH] * a[BATCH:]).mean()) < 4 * 0.25 / math.sqrt(n / 2)


def checkerboard(n, generator):
    """Two classes: the brightness of the left half says which."""
    labels = torch.arange(n) % 2
    images = torch.randint(0, 40, (n, 1, 4, 4), generator=generator)
    images[:, :, :, :2] += (215 * labels)[:, None, None, None]
    return Split(images.to(torch.uint8), labels)


def test_the_fast_suite_finds_a_good_classifier_and_density_and_reports_every_figure(generator):
    """The network knows the data: log p(x) is high where the halves are flat, as no noise and no mixture is."""
    split = checkerboard(60, generator)
    data = DataSet("toy", split, split, split, ("dark", "light"))

    def network(x):
        left, right = x[:, 0, :, :2].flatten(1), x[:, 0, :, 2:].flatten(1)
        value = torch.tensor([-0.84, 0.84])
        return -20 * ((left[:, None] - value[None, :, None]) ** 2).sum(2) - 20 * ((right + 0.84) ** 2).sum(1)[:, None]

    metrics = evaluate_fast(network, data, EvaluateConfig(), World(), LIKE)
    names = {f"ood/{s}/{score}/auroc" for s in ("interp", "uniform") for score in ("log_px", "max_py", "approx_mass")}
    assert set(metrics) == names | {"test/accuracy", "test/nll", "test/ece"}
    assert metrics["test/accuracy"] == 1
    assert metrics["test/nll"] < 1e-3
    assert metrics["ood/uniform/log_px/auroc"] == 1  # in-distribution is positive, scores rise with it
    assert metrics["ood/interp/log_px/auroc"] == 1
    assert metrics["ood/interp/max_py/auroc"] > 0.9
    assert metrics["ood/uniform/approx_mass/auroc"] > 0.9
    validated = validate(network, split, EvaluateConfig(), World(), LIKE)
    assert {f"test/{k}": v for k, v in validated.items()} == {k: v for k, v in metrics.items() if "test" in k}
