import math

import pytest
import torch

from jem.config import EvaluateConfig
from jem.evaluate.evaluate import BATCH, over_batches, over_random_batches
from jem.evaluate.passes import Part
from jem.evaluate.scores import refinement
from jem.world import World

LIKE = torch.zeros(())


def gathered(function, images, config, size):
    return sum(over_batches(function, images, config, Part(r, size), LIKE, "test") for r in range(size))


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
        ranks = (Part(rank, size) for rank in range(size))
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
