"""The KL term of improved contrastive divergence: its gradient, and what it costs nothing of."""

import copy
import math

import pytest
import torch
from torch import nn
from toys import labelled_batch, small, tensors_of

from jem.config import SGLDConfig
from jem.energy import energy_fn
from jem.kl import kl_energies, live_and_held
from jem.sgld import sgld_step
from jem.train import energies_of_last_step, loss_and_gradient, sample, start, train_step
from jem.world import World

SHAPE, CLASSES = (1, 4, 4), 3
H = 0.3


def batch(dtype=torch.float32, n=6):
    random = torch.Generator().manual_seed(0)
    return labelled_batch(torch.randn(n, *SHAPE, generator=random).to(dtype), torch.arange(n) % CLASSES)


def begin(**changes):
    config = small(**{"objective__kl_weight": 0.5, "model__name": "toys:mlp"} | changes)
    return config, start(config, SHAPE, CLASSES)


def quadratic(theta):
    """E(x) = theta x^2 / 2."""
    return lambda x: theta * x.square().sum(dim=1) / 2


def gradients(network):
    """Of all weights; one that the energy's gradient does not depend on, as the last bias of E(x, y), has none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in network.parameters()])


def test_of_a_quadratic_energy_the_gradient_is_minus_step_theta_x_times_x_prime(generator):
    """x' = x - h theta x + noise, and d/dtheta sg(theta) x'^2 / 2 = theta x' dx'/dtheta = -h theta x x'."""
    theta = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    config = SGLDConfig(step_size=H, noise_scale=0.5)
    after, _ = sgld_step(quadratic(theta.detach()), x, config, generator)
    energies = kl_energies(quadratic(theta), quadratic(theta.detach()), x, after, config)
    assert torch.equal(energies, quadratic(theta.detach())(after))
    (gradient,) = torch.autograd.grad(energies.mean(), theta)
    torch.testing.assert_close(gradient, (-H * theta * x * after).mean().detach(), atol=1e-14, rtol=0)


def test_over_the_noise_it_is_that_of_the_energy_the_step_leads_to_in_the_mean(generator):
    """E[-h theta x x'] = -h theta (1 - h theta) x^2 for the step's mean: down it, theta grows while h theta < 1."""
    theta, n = torch.tensor(1.0, dtype=torch.float64, requires_grad=True), 40_000
    x, config = torch.full((n, 1), 2.0, dtype=torch.float64), SGLDConfig(step_size=H, noise_scale=0.5)
    after, _ = sgld_step(quadratic(theta.detach()), x, config, generator)
    energies = kl_energies(quadratic(theta), quadratic(theta.detach()), x, after, config)
    (gradient,) = torch.autograd.grad(energies.mean(), theta)
    error = H * 2 * 0.5 / math.sqrt(n)
    assert abs(gradient.item() + H * (1 - H) * 4) < 4 * error


CLAMPS = {
    "free": {},
    "clamp": {"clamp": 0.9},
    "gradient_clamp": {"gradient_clamp": 0.05},
    "both": {"clamp": 0.9, "gradient_clamp": 0.05},
}


@pytest.mark.parametrize("clamps", CLAMPS.values(), ids=CLAMPS)
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 2, 1, 1])], ids=["E(x)", "E(x, y)"])
def test_gradient_in_all_weights_is_that_of_finite_differences(clamps, labels, generator):
    """The step is taken anew with each set of weights; the energy it leads to keeps those it had."""
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    config = SGLDConfig(step_size=0.8, noise_scale=0.3, **clamps)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64).clamp(-1, 1)
    names = [name for name, _ in network.named_parameters()]
    _, held = live_and_held(network, {}, labels)
    stopped = []

    def term(*weights):
        live = energy_fn(
            lambda z: torch.func.functional_call(network, dict(zip(names, weights, strict=True)), z), labels
        )
        after, _ = sgld_step(live, x, config, torch.Generator().manual_seed(1))
        stopped.append((after.abs() == config.clamp).double().mean() if config.clamp else 0)
        return kl_energies(live, held, x, after.detach(), config).mean()

    assert torch.autograd.gradcheck(term, tuple(p.detach().clone().requires_grad_() for p in network.parameters()))
    assert (0 < stopped[0] < 1) == ("clamp" in clamps)


def test_the_energy_it_leads_to_gives_its_weights_no_gradient_and_buffers_are_those_given():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    x = torch.randn(5, *SHAPE)
    live, held = live_and_held(network, buffers, None)
    expected = energy_fn(network)(x)
    network[2].running_mean += 100  # as a training pass may, before the backward pass
    assert torch.equal(live(x), expected)
    assert torch.equal(held(x), expected)
    assert not held(x).requires_grad
    live(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(("length", "size"), [(1, 1.0), (2, 0.1), (3, 0.1)])
def test_the_step_that_is_differentiated_is_the_chains_last_however_long_they_are(length, size):
    """A schedule from 1 to 0.1 along chains whose length adapts."""
    config, state = begin(sgld__steps=1, sgld__max_steps=3, sgld__step_size=1, sgld__final_step_size=0.1)
    state.chain_length = torch.tensor(float(length))
    assert sample(state, config, batch().images, 6).last.step_size == pytest.approx(size)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sgld__conditional": True},
        {"sgld__clamp": 0.5, "sgld__gradient_clamp": 0.01},
        {"model__name": "small_conv", "model__channels": [3, 4], "model__norm": "batch"},
        {"model__name": "small_conv", "model__channels": [3, 4], "optimizer__sam_rho": 0.3},
    ],
    ids=str,
)
def test_a_step_adds_the_terms_gradient_and_changes_nothing_else_of_it(settings):
    settings = {"precision": "float64", "optimizer__name": "sgd"} | settings
    config, state = begin(**settings)
    _, plain = begin(**settings)
    data = batch(torch.float64)
    samples = sample(plain, config, data.images, 6)
    buffers = {name: b.clone() for name, b in plain.network.named_buffers()}
    twin = copy.deepcopy(plain.network)
    energies = energies_of_last_step(twin, buffers, samples, config, World(), 6)
    energies.mean().backward()
    without = loss_and_gradient(plain.network, buffers, data, samples, small(**settings), World())
    info = train_step(state, data, config, World())
    assert info.loss[1:5] == without[1:5]
    assert torch.equal(info.loss.kl, energies.mean().detach())
    torch.testing.assert_close(info.loss.total, without.total + 0.5 * energies.mean().detach())
    if not config.optimizer.sam_rho:
        expected = gradients(plain.network) + 0.5 * gradients(twin)
        torch.testing.assert_close(gradients(state.network), expected, atol=1e-12, rtol=0)
        assert gradients(twin).abs().max() > 1e-5
    for mine, theirs in zip(state.network.buffers(), plain.network.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_without_batch_norm_the_term_is_the_samples_energy_where_they_stand():
    config, state = begin()
    info = train_step(state, batch(), config, World())
    torch.testing.assert_close(info.loss.kl, info.loss.energy_samples)


def test_in_both_passes_of_sam_the_network_is_in_eval_mode_for_the_term_as_for_the_chains():
    config, state = begin(optimizer__sam_rho=0.3, objective__kl_samples=2, sgld__steps=3)
    calls = []
    state.network.register_forward_hook(lambda network, x, _: calls.append((network.training, len(x[0]))))
    train_step(state, batch(), config, World())
    assert calls == [(False, 6)] * 3 + [(False, 2), (False, 2), (True, 12)] * 2


def test_in_bf16_gradients_are_finite_and_near_those_of_float32():
    seen = []
    for precision in ("float32", "bf16"):
        config, state = begin(precision=precision, model__name="small_conv", model__channels=[8, 8])
        samples = sample(begin(model__name="small_conv", model__channels=[8, 8])[1], config, batch().images, 6)
        energies_of_last_step(state.network, {}, samples, config, World(), 6).mean().backward()
        assert {p.grad.dtype for p in state.network.parameters()} == {torch.float32}
        seen.append(gradients(state.network))
        assert not train_step(state, batch(), config, World()).skipped
    assert (seen[1] - seen[0]).norm() < 0.1 * seen[0].norm()
    assert (seen[1] - seen[0]).norm() > 0


@pytest.mark.parametrize("wanted", [1, 2, 5, 7, None])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_ranks_differentiate_as_many_chains_together_as_are_asked_for(wanted, size):
    config = small(batch_size=7, replay__capacity=35, objective__kl_weight=1.0, objective__kl_samples=wanted)
    counts = []
    for world in (World(rank, size) for rank in range(size)):
        state = start(config, SHAPE, CLASSES, world)
        samples = sample(state, config, batch(n=7).images[world.share(7)], 7)
        counts.append(len(energies_of_last_step(state.network, {}, samples, config, world, 7)))
    assert sum(counts) == (wanted or 7)
    assert max(counts) - min(counts) <= 2


def test_a_chain_that_is_lost_skips_the_update():
    settings = {"model__name": "small_conv", "model__channels": [3], "sgld__step_size": 1e38, "sgld__steps": 2}
    config, state = begin(**settings, optimizer__ema_decay=0.5)
    before = tensors_of(state)
    info = train_step(state, batch(), config, World())
    assert info.skipped
    after = tensors_of(state)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
