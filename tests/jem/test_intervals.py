import math

import pytest
import torch

from jem.evaluate.intervals import (
    CHUNK,
    bootstrap,
    draw_counts,
    estimate,
    mean_of,
    percentile_intervals,
    reflected_intervals,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_counts_are_draws_with_replacement(generator):
    counts = draw_counts(50, 2000, generator)
    assert (counts.sum(dim=1) == 50).all()
    assert counts.mean() == 1
    assert abs(counts.var() - (1 - 1 / 50)) < 0.02  # binomial(50, 1 / 50)
    assert abs((counts == 0).double().mean() - (1 - 1 / 50) ** 50) < 0.005


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    values = torch.randn(30, generator=seeded())
    a, b, c = (bootstrap(mean_of(values), (30,), seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_resampled_means_scatter_by_the_standard_error(generator):
    values = torch.randn(200, 2, generator=generator)
    samples = bootstrap(mean_of(values), (200,), generator)
    assert samples.shape == (1000, 2)
    expected = values.double().std(dim=0, correction=0) / math.sqrt(200)
    torch.testing.assert_close(samples.std(dim=0), expected, rtol=4 / math.sqrt(2 * 1000), atol=0)
    torch.testing.assert_close(samples.mean(dim=0), values.double().mean(dim=0), rtol=0, atol=0.01)


def test_intervals_hold_the_true_mean_about_95_times_in_100(generator):
    held = 0
    for _ in range(300):
        values = torch.rand(40, generator=generator)
        samples = bootstrap(mean_of(values), (40,), generator, resamples=300)
        (found,) = percentile_intervals(values.double().mean(), samples)
        held += found.low <= 0.5 <= found.high
    assert abs(held / 300 - 0.94) < 4 * math.sqrt(0.95 * 0.05 / 300)  # the percentile interval is a little short at 40


def test_two_samples_are_drawn_independently(generator):
    samples = bootstrap(lambda a, b: torch.stack([a[:, 0], b[:, 0]], dim=1), (20, 20), generator)
    assert abs(torch.corrcoef(samples.T)[0, 1]) < 4 / math.sqrt(1000)


def test_the_figure_of_the_data_is_the_statistic_of_ones():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert estimate(mean_of(values), (3,)).item() == 3


def test_large_sets_are_resampled_in_parts(generator):
    n = CHUNK // 2
    seen = []
    bootstrap(lambda counts: seen.append(len(counts)) or counts.sum(dim=1), (n,), generator, resamples=3)
    assert seen == [2, 1]


def test_undefined_resamples_are_left_out():
    samples = torch.tensor([1.0, math.nan, 2.0, 3.0], dtype=torch.float64)
    (found,) = percentile_intervals(torch.tensor(2.0, dtype=torch.float64), samples)
    assert found == pytest.approx((2, 1.05, 2.95))


def test_reflected_intervals_lean_the_other_way_stay_within_0_and_1_and_hold_the_figure():
    samples = torch.linspace(0.4, 0.8, 1001, dtype=torch.float64)  # its middle 95 %: .41 to .79
    value = torch.tensor(0.5, dtype=torch.float64)
    assert reflected_intervals(value, samples)[0] == pytest.approx((0.5, 1 - 0.79, 1 - 0.41))
    assert reflected_intervals(value - 0.3, samples)[0] == pytest.approx((0.2, 0, 0.2))
    assert reflected_intervals(value + 0.3, samples)[0] == pytest.approx((0.8, 0.8, 1))


def test_an_empty_sample_is_refused(generator):
    with pytest.raises(ValueError, match="at least one"):
        bootstrap(lambda a, b: a + b, (3, 0), generator)
