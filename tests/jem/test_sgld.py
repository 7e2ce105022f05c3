import math

import pytest
import torch
from torch import nn

from jem.config import SGLDConfig
from jem.sgld import sgld_chain, sgld_step

CHAINS = 40_000


def quadratic(k=1.0):
    """E(x) = k |x|^2 / 2: its density is a Gaussian of variance 1 / k."""
    return lambda x: k * x.flatten(1).square().sum(dim=1) / 2


def settle(config, k, generator, steps):
    x = torch.zeros(CHAINS, 1, dtype=torch.float64)
    for _ in range(steps):
        x, _ = sgld_step(quadratic(k), x, config, generator)
    return x


def check_variance(x, expected):
    """The variance of n normal numbers has the standard error sigma^2 sqrt(2 / n)."""
    error = expected * math.sqrt(2 / x.numel())
    assert abs(x.square().mean().item() - expected) < 4 * error
    assert abs(x.mean().item()) < 4 * math.sqrt(expected / x.numel())


def test_one_noiseless_step_goes_down_the_gradient_by_step_size(generator):
    a = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    a = a + a.T
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    config = SGLDConfig(step_size=0.3, noise_scale=0.0)
    moved, _ = sgld_step(lambda z: ((z @ a) * z).sum(dim=1) / 2, x, config, generator)
    torch.testing.assert_close(moved, x - 0.3 * (x @ a), atol=1e-13, rtol=0)


@pytest.mark.parametrize("h", [0.2, 0.4, 1.5])
def test_stationary_variance_is_that_of_the_discretised_chain(h, generator):
    """x' = (1 - h) x + sqrt(2 h) eps settles at variance 1 / (1 - h / 2), not 1."""
    x = settle(SGLDConfig(step_size=h, noise_scale=math.sqrt(2 * h)), 1.0, generator, steps=60)
    check_variance(x, 1 / (1 - h / 2))


@pytest.mark.parametrize(
    ("config", "k"),
    [(SGLDConfig(), 0.5), (SGLDConfig(step_size=0.1, noise_scale=0.2), 3.0)],
    ids=["the paper's", "another"],
)
def test_decoupled_step_and_noise_sample_at_temperature_noise_squared_over_twice_the_step(config, k, generator):
    """The variance is T / k / (1 - step_size k / 2); T is 5e-5 with the paper's settings."""
    temperature = config.noise_scale**2 / (2 * config.step_size)
    x = settle(config, k, generator, steps=60)
    check_variance(x, temperature / k / (1 - config.step_size * k / 2))
    assert SGLDConfig().noise_scale ** 2 / (2 * SGLDConfig().step_size) == pytest.approx(5e-5)


@pytest.mark.parametrize("noise_scale", [math.sqrt(0.4), 0.8, 1.0])
def test_a_wrong_temperature_fails_the_check_of_the_variance(noise_scale, generator):
    """sqrt(h), 2 h and 1 in place of sqrt(2 h), and the variance of the undiscretised diffusion."""
    h = 0.4
    with pytest.raises(AssertionError):
        check_variance(settle(SGLDConfig(step_size=h, noise_scale=noise_scale), 1.0, generator, 60), 1 / (1 - h / 2))
    with pytest.raises(AssertionError):
        check_variance(settle(SGLDConfig(step_size=h, noise_scale=math.sqrt(2 * h)), 1.0, generator, 60), 1.0)


def test_noise_of_a_step_has_standard_deviation_noise_scale_and_no_memory(generator):
    config = SGLDConfig(noise_scale=0.3)
    x = torch.ones(200, 3, 8, 8, dtype=torch.float64)
    a, _ = sgld_step(lambda z: z.flatten(1).sum(dim=1) * 0, x, config, generator)
    b, _ = sgld_step(lambda z: z.flatten(1).sum(dim=1) * 0, x, config, generator)
    check_variance(a - x, 0.3**2)
    products = ((a - x) * (b - x)).flatten() / 0.3**2
    assert abs(products.mean()) < 4 / math.sqrt(products.numel())
    across = ((a - x)[1:] * (a - x)[:-1]).flatten() / 0.3**2  # two chains share no noise
    assert abs(across.mean()) < 4 / math.sqrt(across.numel())


def test_clamp_moves_new_positions_back_to_the_border_and_touches_no_others(generator):
    x = torch.tensor([[3.0, -3.0, 0.4]])
    config = SGLDConfig(step_size=0.5, noise_scale=0.0)
    free, _ = sgld_step(quadratic(), x, config, generator)
    held, _ = sgld_step(quadratic(), x, SGLDConfig(step_size=0.5, noise_scale=0.0, clamp=1.25), generator)
    assert free.tolist() == [[1.5, -1.5, pytest.approx(0.2)]]
    assert held.tolist() == [[1.25, -1.25, pytest.approx(0.2)]]


def test_gradient_clamp_bounds_each_component_of_a_steps_gradient_and_not_the_noise(generator):
    x = torch.tensor([[3.0, -3.0, 0.4]])
    config = SGLDConfig(step_size=0.5, noise_scale=0.0, gradient_clamp=1.25)
    moved, seen = sgld_step(quadratic(), x, config, generator)
    assert moved.tolist() == [[3.0 - 0.5 * 1.25, -3.0 + 0.5 * 1.25, pytest.approx(0.2)]]
    assert seen.grad_norm.item() == pytest.approx(x.norm().item())  # of the gradient before
    noisy, _ = sgld_step(quadratic(), x, SGLDConfig(noise_scale=100.0, gradient_clamp=1e-3), generator)
    assert (noisy - x).abs().max() > 1.25


def test_a_proximal_step_is_bounded_by_step_size_times_gradient_clamp_and_ends_within_the_clamp(generator):
    config = SGLDConfig(step_size=1.0, noise_scale=0.0, clamp=1.0, gradient_clamp=0.1, steps=1)
    x = torch.linspace(-1, 1, 9)[:, None]
    moved, _ = sgld_chain(quadratic(1e6), x, config, generator)
    torch.testing.assert_close(moved, x - 0.1 * x.sign())


def test_noise_too_is_clamped(generator):
    x, _ = sgld_chain(quadratic(), torch.zeros(100, 5), SGLDConfig(noise_scale=2.0, clamp=1.0), generator)
    assert x.abs().max() == 1.0


def test_a_chain_does_not_depend_on_those_it_is_moved_with(generator):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3)).double()
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    config = SGLDConfig(noise_scale=0.0, step_size=0.5, steps=5)

    def run(x):
        return sgld_chain(lambda z: -network(z).logsumexp(dim=1), x, config, generator)[0]

    together = run(x)
    torch.testing.assert_close(torch.cat([run(one[None]) for one in x]), together, atol=1e-12, rtol=0)
    torch.testing.assert_close(run(x.flip(0)).flip(0), together, atol=1e-12, rtol=0)


def test_start_is_left_as_it_was_and_no_parameter_gets_a_gradient(generator):
    network = nn.Linear(4, 3)
    x = torch.randn(6, 4, generator=generator)
    before = x.clone()
    with torch.no_grad():
        moved, transition = sgld_chain(lambda z: -network(z).logsumexp(dim=1), x, SGLDConfig(steps=2), generator)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert [p.grad for p in network.parameters()] == [None, None]
    assert not any(t.requires_grad for t in (moved, *transition))


def test_the_generator_alone_determines_a_chain():
    x = torch.zeros(3, 2)

    def run(seed):
        return sgld_chain(quadratic(), x, SGLDConfig(), torch.Generator().manual_seed(seed))[0]

    torch.manual_seed(1)
    first = run(7)
    torch.manual_seed(2)
    assert torch.equal(run(7), first)
    assert not torch.equal(run(8), first)


def test_a_chain_is_k_steps(generator):
    config = SGLDConfig(step_size=0.5, noise_scale=0.0, steps=3)
    x, last = sgld_chain(quadratic(), torch.tensor([[16.0, -8.0]]), config, generator)
    assert x.tolist() == [[2.0, -1.0]]
    assert last.energy.tolist() == [(4**2 + 2**2) / 2]  # of the last position but one


def test_energy_and_gradient_norm_are_of_the_position_a_step_starts_from(generator):
    _, seen = sgld_step(quadratic(2.0), torch.tensor([[3.0, 4.0]]), SGLDConfig(), generator)
    assert seen.energy.tolist() == [25.0]
    assert seen.grad_norm.tolist() == [10.0]
