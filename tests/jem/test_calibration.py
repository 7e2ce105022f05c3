import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from netcal.metrics import ECE, MCE

from jem.errors import DivergedError
from jem.evaluate import calibration_intervals
from jem.evaluate.calibration import (
    Bins,
    classwise_bins,
    confidence_bins,
    ece,
    ece_classwise,
    ece_equal_mass,
    equal_mass_bins,
    mce,
    reliability,
)
from jem.evaluate.calibration_intervals import METRICS, figures, statistic, with_intervals
from jem.evaluate.intervals import bootstrap, estimate


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


FOUR = logits_of([0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.45, 0.55])
LABELS = torch.tensor([0, 0, 0, 1])


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


def brute_force_bins(confidence, correct, n_bins):
    """[(confidences, rights) of each equal-width bin that holds any]"""
    bins = {}
    for p, right in zip(confidence.tolist(), correct.tolist(), strict=True):
        bins.setdefault(max(0, math.ceil(p * n_bins) - 1), []).append((p, right))
    return [np.array(members).T for members in bins.values()]


def made(n, generator, scale=3.0, classes=5):
    """Logits near 20, as those of an energy model are."""
    logits = 20 + scale * torch.randn(n, classes, generator=generator)
    return logits, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 100, 1000])
def test_ece_and_mce_are_those_of_netcal_and_of_brute_force_saturated_or_not(n, scale, generator):
    logits, labels = made(n, generator, scale)
    p = logits.double().softmax(dim=1)
    if scale == 100 and n == 1000:
        assert (p.amax(dim=1) == 1).sum() > 500
    bins = confidence_bins(logits, labels)
    members = brute_force_bins(p.amax(dim=1), p.argmax(dim=1) == labels, 20)
    gaps = [abs((confidence - right).mean()) for confidence, right in members]
    assert ece(bins) == pytest.approx(sum(len(m[0]) * gap for m, gap in zip(members, gaps, strict=True)) / n)
    assert mce(bins) == pytest.approx(max(gaps))
    top, right = p.amax(dim=1).numpy(), (p.argmax(dim=1) == labels).long().numpy()
    assert ece(bins) == pytest.approx(ECE(20).measure(top, right))
    assert mce(bins) == pytest.approx(MCE(20).measure(top, right))
    if n >= 100:  # of the labels of a few images netcal takes those of two classes for yes and no
        assert ece(bins) == pytest.approx(ECE(20).measure(p.numpy(), labels.numpy()))


def test_ece_of_equal_masses_is_that_of_netcal_where_the_bins_divide_the_images(generator):
    logits, labels = made(1000, generator, scale=1.0)
    p = logits.double().softmax(dim=1).numpy()
    theirs = ECE(20, equal_intervals=False).measure(p, labels.numpy())
    assert ece_equal_mass(logits, labels) == pytest.approx(theirs)


def test_bins_of_equal_mass_hold_neighbours_in_confidence_and_are_worked_out_by_hand():
    """Four images in two bins: .55 right and .7 right, .8 wrong and .9 right."""
    assert ece_equal_mass(FOUR, LABELS, 2) == pytest.approx((abs(2 - 1.25) + abs(1 - 1.7)) / 4)
    bins = equal_mass_bins(FOUR, LABELS, 2)
    torch.testing.assert_close(bins, Bins(*torch.tensor([[2, 2], [1.25, 1.7], [2, 1]]).double()))


def test_an_image_on_a_cut_is_shared_by_the_bins_on_either_side():
    """Three images in two bins of mass 1.5: half of the middle one in each."""
    logits = logits_of([0.6, 0.4], [0.7, 0.3], [0.9, 0.1])
    bins = equal_mass_bins(logits, torch.tensor([1, 0, 0]), 2)
    torch.testing.assert_close(bins, Bins(*torch.tensor([[1.5, 1.5], [0.95, 1.25], [0.5, 1.5]]).double()))


@given(st.permutations(range(8)))
def test_no_order_of_images_of_equal_confidence_changes_bins_of_equal_mass(order):
    logits = logits_of(*[[1.0, 0.0]] * 5, *[[0.8, 0.2]] * 3)
    labels = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1])
    rows = torch.tensor(order)
    expected = equal_mass_bins(logits, labels, 3)
    torch.testing.assert_close(equal_mass_bins(logits[rows], labels[rows], 3), expected)
    torch.testing.assert_close(expected.counts, torch.full((3,), 8 / 3, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_with_fewer_images_than_bins_each_image_stands_for_itself(n, generator):
    logits, labels = made(n, generator)
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    expected = ((predicted == labels).double() - confidence).abs().mean().item()
    assert ece_equal_mass(logits, labels) == pytest.approx(expected)


def test_classwise_ece_is_the_mean_of_each_class_probability_in_bins_of_its_own(generator):
    logits, labels = made(300, generator)
    p = logits.double().softmax(dim=1)
    gaps = []
    for y in range(5):
        members = brute_force_bins(p[:, y], labels == y, 20)
        gaps.append(sum(len(m[0]) * abs((m[0] - m[1]).mean()) for m in members) / 300)
        theirs = ECE(20).measure(p[:, y].numpy(), (labels == y).long().numpy())
        assert ece(classwise_bins(logits, labels)[y]) == pytest.approx(gaps[-1]) == pytest.approx(theirs)
    assert ece_classwise(logits, labels) == pytest.approx(np.mean(gaps))


ROWS = st.lists(st.tuples(st.lists(st.floats(-30, 30), min_size=3, max_size=3), st.integers(0, 2)), min_size=1)


@given(ROWS, st.randoms(use_true_random=False))
def test_no_order_of_images_changes_their_calibration_errors_which_bound_each_other(rows, random):
    logits = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    labels = torch.tensor([label for _, label in rows])
    found = figures(logits, labels)
    assert 0 <= found["ece"] <= found["mce"] + 1e-12
    assert found["mce"] <= 1 + 1e-12
    top, predicted = logits.softmax(dim=1).max(dim=1)
    assert found["ece"] >= abs((predicted == labels).double().mean() - top.mean()) - 1e-12
    assert found["ece_equal_mass"] >= abs((predicted == labels).double().mean() - top.mean()) - 1e-12
    order = list(range(len(rows)))
    random.shuffle(order)
    assert figures(logits[order], labels[order]) == pytest.approx(found, abs=1e-9)


@given(st.lists(st.tuples(st.lists(st.integers(-30, 30), min_size=3, max_size=3), st.integers(0, 2)), min_size=1))
def test_calibration_does_not_depend_on_an_offset_of_the_logits(rows):
    logits = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    labels = torch.tensor([label for _, label in rows])
    assert figures(logits + 20, labels) == figures(logits, labels)  # integers: nothing is rounded


@given(ROWS, st.integers(0, 10))
def test_bins_of_shards_add_up_to_those_of_the_whole(rows, at):
    logits = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    labels = torch.tensor([label for _, label in rows])
    a, b = (confidence_bins(logits[part], labels[part]) for part in (slice(None, at), slice(at, None)))
    whole = confidence_bins(logits, labels)
    torch.testing.assert_close(Bins(*(x + y for x, y in zip(a, b, strict=True))), whole)
    assert torch.equal(a.counts + b.counts, whole.counts)


def test_a_reliability_diagram_has_the_bins_that_are_not_empty(generator):
    diagram = reliability(confidence_bins(FOUR, LABELS, 10))
    torch.testing.assert_close(diagram.low, torch.tensor([0.5, 0.6, 0.7, 0.8]).double())
    torch.testing.assert_close(diagram.high, torch.tensor([0.6, 0.7, 0.8, 0.9]).double())
    torch.testing.assert_close(diagram.confidence, torch.tensor([0.55, 0.7, 0.8, 0.9]).double())
    assert diagram.accuracy.tolist() == [1, 1, 0, 1]
    assert diagram.counts.tolist() == [1, 1, 1, 1]
    diagram = reliability(confidence_bins(*made(500, generator)))
    assert ((diagram.low < diagram.confidence) & (diagram.confidence <= diagram.high)).all()
    assert diagram.counts.sum() == 500


@pytest.mark.parametrize("n", [1, 5, 60])
def test_the_statistic_that_is_resampled_is_the_figure_itself(n, generator):
    logits, labels = made(n, generator, scale=20.0)
    of_ones = estimate(statistic(logits, labels), (n,))
    assert dict(zip(METRICS, of_ones.tolist(), strict=True)) == pytest.approx(figures(logits, labels))


def test_resampled_figures_are_those_of_the_resampled_images(generator):
    logits, labels = made(40, generator, scale=20.0)
    samples = bootstrap(statistic(logits, labels), (40,), torch.Generator().manual_seed(1), resamples=50)
    counts = bootstrap(lambda counts: counts, (40,), torch.Generator().manual_seed(1), resamples=50)
    for sample, count in zip(samples, counts.long(), strict=True):
        rows = torch.arange(40).repeat_interleave(count)
        expected = figures(logits[rows], labels[rows])
        assert dict(zip(METRICS, sample.tolist(), strict=True)) == pytest.approx(expected)


def test_intervals_hold_the_figures_and_narrow_with_the_number_of_images(generator):
    widths = []
    for n in (100, 1600):
        logits, labels = made(n, generator)
        found = with_intervals(logits, labels, generator)
        assert {name: each.value for name, each in found.items()} == figures(logits, labels)
        assert all(each.low <= each.value <= each.high for each in found.values())
        widths.append({name: each.high - each.low for name, each in found.items()})
    for name in ("ece", "brier", "nll"):
        assert widths[0][name] / widths[1][name] == pytest.approx(4, rel=0.3)


def test_nan_is_refused_everywhere(generator):
    logits, labels = made(5, generator)
    logits[3, 1] = math.nan
    for function in (figures, equal_mass_bins, classwise_bins):
        with pytest.raises(DivergedError, match=r"NaN.*earlier checkpoint"):
            function(logits, labels)
    with pytest.raises(DivergedError, match="NaN"):
        calibration_intervals.with_intervals(logits, labels, generator)
