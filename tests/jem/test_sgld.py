import math

import pytest
import torch
from torch import nn

from jem.config import ModelConfig, SGLDConfig
from jem.energy import SplitEnergy, energy_fn, split_energy_fn
from jem.errors import ConfigError
from jem.models import make_network
from jem.sgld import adapted_length, along, bounded, differentiate, pyld_step, sgld_chain, sgld_step

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


@pytest.mark.parametrize("k", [1e-6, 1.0, 1e6])
def test_a_normalised_step_is_step_size_long_down_the_gradient_however_steep(k, generator):
    x = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    config = SGLDConfig(step_size=0.3, noise_scale=0.0, normalize_gradient=True)
    moved, transition = sgld_step(quadratic(k), x, config, generator)
    lengths = x.flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, x * (1 - 0.3 / lengths)[:, None, None], atol=1e-12, rtol=0)
    torch.testing.assert_close(transition.grad_norm, k * lengths)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1.0, 1e20, 1e30])
def test_a_gradient_whose_square_is_no_float_is_normalised_too(scale, generator):
    x = scale * torch.randn(3, 4, generator=generator)
    norms = bounded(x, SGLDConfig(normalize_gradient=True)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(3))


def test_a_normalised_step_leaves_a_chain_at_rest_and_does_not_hide_a_lost_one(generator):
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [3.0, 4.0]])
    config = SGLDConfig(step_size=1.0, noise_scale=0.0, normalize_gradient=True)
    moved, _ = sgld_step(quadratic(1.0), x, config, generator)
    assert moved[0].tolist() == [0, 0]
    assert moved[1].isnan().all()
    torch.testing.assert_close(moved[2], torch.tensor([3 - 0.6, 4 - 0.8]))


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


def test_pylds_inner_moves_hold_the_gradient_at_the_first_layers_output(generator):
    """first(x) = x^2, rest(h) = a h: each move multiplies x by 1 - 2 step_size a, whatever h has become.

    With rest(h) = h^2 / 2 the held gradient is x_0^2, and each further move multiplies by 1 - 2 step_size x_0^2.
    """
    x = torch.rand(7, 3, generator=generator, dtype=torch.float64) + 0.5
    config = SGLDConfig(step_size=0.01, noise_scale=0.0, inner_steps=5)
    held = SplitEnergy(lambda x: x.square(), lambda h: (3 * h).sum(dim=1))
    moved, seen = pyld_step(held, x, config, generator)
    torch.testing.assert_close(moved, x * (1 - 0.06) ** 5)
    torch.testing.assert_close(seen.energy, 3 * x.square().sum(dim=1))
    torch.testing.assert_close(seen.grad_norm, (6 * x).norm(dim=1))
    moved, _ = pyld_step(SplitEnergy(lambda x: x.square(), lambda h: (h**2 / 2).sum(dim=1)), x, config, generator)
    torch.testing.assert_close(moved, x * (1 - 0.02 * x.square()) ** 5)
    free, _ = sgld_chain(
        lambda x: (x**4 / 2).sum(dim=1), x, SGLDConfig(steps=5, step_size=0.01, noise_scale=0.0), generator
    )
    assert not torch.allclose(moved, free), "SGLD follows the gradient as it changes"


@pytest.mark.parametrize("name", ["small_conv", "wide_resnet"])
def test_a_networks_halves_make_the_network_and_pylds_first_move_is_sglds(name, generator):
    network = make_network(ModelConfig(name=name, depth=10, width=1, channels=(3, 4), norm="layer"), (1, 8, 8), 3)
    network.eval().requires_grad_(False)
    x, labels = torch.rand(5, 1, 8, 8, generator=generator), torch.arange(5) % 3
    for given in (None, labels):
        split, whole = split_energy_fn(network, given), energy_fn(network, given)
        for mine, theirs in zip(differentiate(split, x), differentiate(whole, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    streams = [torch.Generator().manual_seed(1) for _ in range(2)]
    moved, seen = pyld_step(split_energy_fn(network), x, SGLDConfig(inner_steps=1), streams[0])
    expected, expected_seen = sgld_step(energy_fn(network), x, SGLDConfig(), streams[1])
    assert torch.equal(moved, expected)
    torch.testing.assert_close(seen, expected_seen, rtol=0, atol=0)


def test_the_halves_of_a_network_of_one_convolution_make_it_too(generator):
    network = make_network(ModelConfig(name="small_conv", channels=(3,), norm="act"), (1, 8, 8), 3)
    x = torch.rand(5, 1, 8, 8, generator=generator)
    first, rest = network.halves()
    assert torch.equal(rest(first(x)), network(x))


def test_through_a_linear_first_layer_moves_without_noise_add_up_to_one(generator):
    """What the docstring of pyld_step says of wide_resnet."""
    network = make_network(ModelConfig(name="wide_resnet", depth=10, width=1), (1, 8, 8), 3).double()
    x = torch.rand(5, 1, 8, 8, generator=generator, dtype=torch.float64)
    inner, _ = pyld_step(
        split_energy_fn(network), x, SGLDConfig(noise_scale=0.0, step_size=0.2, inner_steps=5), generator
    )
    once, _ = sgld_step(energy_fn(network), x, SGLDConfig(noise_scale=0.0, step_size=1.0), generator)
    torch.testing.assert_close(inner, once)


def test_every_inner_move_has_noise_and_both_clamps(generator):
    flat = SplitEnergy(lambda x: x, lambda h: h.sum(dim=1) * 0)
    config = SGLDConfig(noise_scale=0.1, inner_steps=5)
    x, _ = pyld_step(flat, torch.zeros(CHAINS, 1, dtype=torch.float64), config, generator)
    check_variance(x, 5 * 0.1**2)
    steep = SplitEnergy(lambda x: x, lambda h: -100 * h.sum(dim=1))
    config = SGLDConfig(step_size=0.1, noise_scale=0.0, inner_steps=3, gradient_clamp=1.0)
    torch.testing.assert_close(pyld_step(steep, torch.zeros(2, 1), config, generator)[0], torch.full((2, 1), 0.3))
    config = SGLDConfig(step_size=0.1, noise_scale=0.0, inner_steps=3, gradient_clamp=1.0, clamp=0.25)
    torch.testing.assert_close(pyld_step(steep, torch.zeros(2, 1), config, generator)[0], torch.full((2, 1), 0.25))


def test_pyld_leaves_the_weights_gradients_alone(generator):
    network = make_network(ModelConfig(name="small_conv", channels=(3, 4)), (1, 8, 8), 3)
    sgld_chain(split_energy_fn(network), torch.rand(5, 1, 8, 8), SGLDConfig(steps=2, inner_steps=3), generator)
    assert all(p.grad is None for p in network.parameters())


def test_a_schedule_goes_in_equal_ratios_and_differences_and_begins_again_with_each_visit():
    config = SGLDConfig(steps=5, step_size=1.0, final_step_size=0.0001, noise_scale=0.4, final_noise_scale=0.0)
    sizes = [along(config, i).step_size for i in range(5)]
    assert sizes == pytest.approx([1, 0.1, 0.01, 0.001, 0.0001])
    assert [along(config, i).noise_scale for i in range(5)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    assert [along(config, i) for i in range(5, 10)] == [along(config, i) for i in range(5)]
    assert [along(config, i, 3).step_size for i in range(3)] == pytest.approx([1, 0.01, 0.0001]), "a chain that adapts"
    plain = SGLDConfig()
    assert along(plain, 3) == plain
    assert along(SGLDConfig(steps=1, final_step_size=0.1), 0).step_size == 1.0


def test_a_chain_follows_its_schedule(generator):
    """From 0 on a flat energy the variance is the sum of the steps'; down a slope the way is the sum of step sizes."""
    config = SGLDConfig(steps=4, noise_scale=0.3, final_noise_scale=0.0)
    x, _ = sgld_chain(lambda z: z.sum(dim=1) * 0, torch.zeros(CHAINS, 1, dtype=torch.float64), config, generator)
    check_variance(x, 0.3**2 + 0.2**2 + 0.1**2)
    config = SGLDConfig(steps=3, step_size=1.0, final_step_size=0.01, noise_scale=0.0)
    x, _ = sgld_chain(lambda z: z.sum(dim=1), torch.zeros(2, 1), config, generator)
    torch.testing.assert_close(x, torch.full((2, 1), -1.11))


def test_chains_get_longer_while_the_model_outruns_them_and_shorter_again_within_bounds():
    config = SGLDConfig(steps=10, max_steps=40)
    length = torch.tensor(10.0)
    assert adapted_length(length, torch.tensor(0.0), config) == 10
    for gap, expected in ((-5.0, 40.0), (-0.02, 40.0), (0.3, 10.0)):
        for _ in range(300):
            before, length = length, adapted_length(length, torch.tensor(gap), config)
            assert length <= before if gap > 0 else length >= before
            assert length != before or length == expected
        assert length == expected
    one = adapted_length(torch.tensor(20.0), torch.tensor(-100.0), config)
    assert one == pytest.approx(20 * math.exp(0.05))
    one = adapted_length(torch.tensor(20.0), torch.tensor(0.1), config)
    assert one == pytest.approx(20 * math.exp(-0.05 * math.tanh(1)))
    for bad in (math.nan, math.inf):
        assert adapted_length(torch.tensor(20.0), torch.tensor(bad), config) == 20


def test_a_chain_of_another_length_is_that_long(generator):
    x, _ = sgld_chain(lambda z: z.sum(dim=1), torch.zeros(2, 1), SGLDConfig(noise_scale=0.0), generator, steps=7)
    torch.testing.assert_close(x, torch.full((2, 1), -7.0))
    with pytest.raises(ConfigError, match=r"max_steps.*must be greater than sgld\.steps"):
        SGLDConfig(steps=20, max_steps=20)
