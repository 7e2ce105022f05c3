import math

import pytest
import torch

from jem.config import EvaluateConfig
from jem.data.splits import DataSet, Split
from jem.evaluate.evaluate import BATCH, evaluate_fast, outliers, over_batches, over_random_batches, validate
from jem.evaluate.scores import refinement
from jem.world import World

LIKE = torch.zeros(())


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


def refine(x, generator):
    return refinement(lambda x: x.flatten(1).sin(), x, generator)


@pytest.mark.parametrize("size", [2, 3])
def test_scores_that_draw_are_the_same_bits_however_many_ranks_compute_them(size, generator):
    images = torch.randn(2 * BATCH + 30, 1, 4, 4, generator=generator)

    def gathered(size):
        ranks = (Alone(rank, size) for rank in range(size))
        return sum(over_random_batches(refine, images, EvaluateConfig(), rank, LIKE, "test") for rank in ranks)

    alone = gathered(1)
    assert alone.shape == (len(images), 2)
    assert torch.equal(gathered(size), alone)


def test_every_batch_and_every_set_has_draws_of_its_own():
    images = torch.zeros(2 * BATCH, 1)

    def draws(key):
        def function(x, generator):
            return torch.randn(x.shape, generator=generator)[:, 0]

        return over_random_batches(function, images, EvaluateConfig(), World(), LIKE, key)

    a, b = draws("a"), draws("b")
    assert torch.equal(a, draws("a"))
    for x, y in ((a, b), (a[:BATCH], a[BATCH:])):
        assert abs((x * y).mean()) < 4 / math.sqrt(len(x))


def test_made_sets_are_the_same_at_every_call_and_differ_from_each_other(generator):
    test = torch.rand(9, 1, 4, 4, generator=generator)
    assert torch.equal(outliers("uniform", test), outliers("uniform", test))
    assert not torch.equal(outliers("uniform", test), outliers("constant", test))


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
