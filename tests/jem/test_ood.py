import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_ood.metrics import functional as pytorch_ood
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from jem.errors import DivergedError
from jem.evaluate.intervals import bootstrap, estimate
from jem.evaluate.ood import (
    METRICS,
    aupr_in,
    aupr_out,
    auroc,
    figures,
    fpr95,
    roc,
    statistic,
    threshold_at_tpr,
    with_intervals,
)


def by_pairs(inside, outside):
    """The chance that a random inside score exceeds a random outside one; a tie is half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    return sum(pairs) / len(pairs)


SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=15)


@given(SCORES, SCORES, st.sampled_from([0.0, 1000.0, -1e6]), st.sampled_from([1.0, 1e-6, 1e6]))
def test_auroc_counts_pairs_with_ties_half_whatever_the_scores_offset_and_scale(inside, outside, offset, scale):
    scores = [torch.tensor(s, dtype=torch.float64) * scale + offset for s in (inside, outside)]
    assert auroc(*scores) == pytest.approx(by_pairs(inside, outside))
    assert auroc(*reversed(scores)) == pytest.approx(1 - by_pairs(inside, outside))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_auroc_refuses_scores_that_are_no_numbers_and_says_what_to_do(bad):
    with pytest.raises(DivergedError, match="earlier checkpoint"):
        auroc(torch.tensor([0.0, bad]), torch.tensor([1.0]))


def labelled(inside, outside):
    """Is it in-distribution, and the scores, for scikit-learn."""
    return np.r_[np.ones(len(inside)), np.zeros(len(outside))], np.r_[inside, outside]


def doubles(scores):
    return torch.tensor(scores, dtype=torch.float64)


@settings(max_examples=40)
@given(SCORES, SCORES, st.sampled_from([0.0, 20.0]))
def test_all_figures_are_those_of_scikit_learn_with_ties_and_in_tiny_sets(inside, outside, offset):
    inside, outside = doubles(inside) + offset, doubles(outside) + offset
    truth, scores = labelled(inside, outside)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    expected = {
        "auroc": roc_auc_score(truth, scores),
        "aupr_in": average_precision_score(truth, scores),
        "aupr_out": average_precision_score(1 - truth, -scores),
        "fpr95": fpr[(tpr >= 0.95).argmax()],
    }
    assert figures(inside, outside) == pytest.approx(expected)
    assert (aupr_in(inside, outside), aupr_out(inside, outside)) == pytest.approx(
        (expected["aupr_in"], expected["aupr_out"])
    )
    of_ones = estimate(statistic(inside, outside), (len(inside), len(outside)))
    assert of_ones.tolist() == pytest.approx([expected[name] for name in METRICS])


@given(SCORES, SCORES)
def test_auroc_is_that_of_pytorch_ood_and_so_is_fpr95_of_the_question_asked_the_other_way_round(inside, outside):
    """There the others are positive and scores rise with them: fpr95 of ours is that of the negated, swapped sets."""
    labels = torch.tensor([0] * len(inside) + [-1] * len(outside))
    scores = doubles(inside + outside)
    assert auroc(doubles(inside), doubles(outside)) == pytest.approx(pytorch_ood.auroc(-scores, labels).item())
    swapped = pytorch_ood.fpr_at_tpr(scores, -1 - labels, 0.95)
    assert fpr95(doubles(inside), doubles(outside)) == pytest.approx(swapped.item())


@settings(max_examples=40)
@given(SCORES, SCORES)
def test_monotone_maps_change_nothing_and_swapping_the_sets_turns_auroc_and_aupr_around(inside, outside):
    inside, outside = doubles(inside), doubles(outside)
    found = figures(inside, outside)
    for monotone in (torch.exp, torch.atan, lambda s: 3 * s**3 - 7):
        assert figures(monotone(inside), monotone(outside)) == found
    swapped = figures(-outside, -inside)  # what was low and outside is now high and inside
    assert swapped["auroc"] == pytest.approx(found["auroc"])
    assert (swapped["aupr_in"], swapped["aupr_out"]) == pytest.approx((found["aupr_out"], found["aupr_in"]))
    assert figures(outside, inside)["auroc"] == pytest.approx(1 - found["auroc"])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 2), (30, 90)])
def test_constant_scores_tell_nothing(n, m):
    found = figures(torch.full((n,), 20.0), torch.full((m,), 20.0))
    share = n / (n + m)
    assert found == pytest.approx({"auroc": 0.5, "aupr_in": share, "aupr_out": 1 - share, "fpr95": 1})


def test_float32_scores_near_20_are_told_apart(generator):
    inside, outside = (20 + shift + 0.01 * torch.randn(500, generator=generator) for shift in (0.007, 0))
    assert auroc(inside, outside) == pytest.approx(by_pairs(inside.tolist(), outside.tolist()))
    assert 0.65 < auroc(inside, outside) < 0.73


@pytest.mark.parametrize("n", [1, 2, 19, 20, 21, 40])
def test_the_threshold_accepts_95_in_100_and_a_higher_one_would_not(n, generator):
    inside, outside = torch.randn(n, generator=generator).round(decimals=1), torch.randn(50, generator=generator)
    threshold = threshold_at_tpr(inside)
    assert (inside >= threshold).double().mean() >= 0.95
    assert (inside > threshold).double().mean() < 0.95
    assert (outside >= threshold).double().mean().item() == pytest.approx(fpr95(inside, outside))


def test_the_roc_curve_is_that_of_scikit_learn(generator):
    inside, outside = (torch.randn(60, generator=generator).round(decimals=1) for _ in range(2))
    fpr, tpr, thresholds = roc_curve(*labelled(inside, outside), drop_intermediate=False)
    found = roc(inside, outside)
    torch.testing.assert_close(found.fpr, torch.from_numpy(fpr))
    torch.testing.assert_close(found.tpr, torch.from_numpy(tpr))
    torch.testing.assert_close(found.thresholds, torch.from_numpy(thresholds[1:]).double())


def test_resampled_figures_are_those_of_the_resampled_sets(generator):
    inside, outside = torch.randn(30, generator=generator).round(), torch.randn(20, generator=generator).round()
    sizes = (30, 20)
    samples = bootstrap(statistic(inside, outside), sizes, torch.Generator().manual_seed(1), resamples=100)

    def counts(a, b):
        return torch.cat([a, b], dim=1)

    drawn = bootstrap(counts, sizes, torch.Generator().manual_seed(1), resamples=100).long()
    for sample, count in zip(samples.tolist(), drawn, strict=True):
        expected = figures(inside.repeat_interleave(count[:30]), outside.repeat_interleave(count[30:]))
        assert dict(zip(METRICS, sample, strict=True)) == pytest.approx(expected)


def delong_standard_error(inside, outside):
    """DeLong et al. (1988): from the variances of each image's own share of the AUROC."""
    above = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside)
    return math.sqrt(above.mean(dim=1).var() / len(inside) + above.mean(dim=0).var() / len(outside))


def test_the_interval_of_auroc_is_as_wide_as_delong_has_it(generator):
    inside, outside = torch.randn(300, generator=generator) + 1, torch.randn(200, generator=generator)
    found = with_intervals(inside, outside, generator)
    assert list(found) == list(METRICS)
    assert {name: each.value for name, each in found.items()} == figures(inside, outside)
    assert found["auroc"].value == auroc(inside, outside)
    width = 2 * 1.96 * delong_standard_error(inside, outside)
    assert found["auroc"].high - found["auroc"].low == pytest.approx(width, rel=0.1)
    assert all(each.low < each.value < each.high for each in found.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("function", [figures, roc, lambda a, b: with_intervals(a, b, torch.Generator())])
def test_scores_that_are_no_numbers_are_refused_everywhere(function, bad):
    with pytest.raises(DivergedError, match="not finite"):
        function(torch.tensor([0.0, 1.0]), torch.tensor([bad]))
    with pytest.raises(DivergedError, match="not finite"):
        threshold_at_tpr(torch.tensor([bad, 0.0]))


def test_an_empty_set_is_refused():
    for inside, outside in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="both are needed"):
            auroc(torch.zeros(inside), torch.zeros(outside))
