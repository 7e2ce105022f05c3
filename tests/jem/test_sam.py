"""SAM and ASAM: where the gradient is taken, and that nothing but the gradient comes of it."""

import copy
import math

import pytest
import torch
from torch import nn
from toys import labelled_batch, small, tensors_of

from jem.config import OptimizerConfig
from jem.optim import BufferGuard
from jem.sam import ascend, sharpness_aware
from jem.train import loss_and_gradient, sample, start, train, train_step
from jem.world import World

SHAPE, CLASSES, RHO = (1, 4, 4), 3, 0.3
SAM = OptimizerConfig(sam_rho=RHO)
ASAM = OptimizerConfig(sam_rho=RHO, sam_adaptive=True)


def batch(seed=0):
    random = torch.Generator().manual_seed(seed)
    return labelled_batch(torch.randn(6, *SHAPE, generator=random), torch.arange(6) % CLASSES)


def noisy(config, image_shape, n_classes):
    """Dropout, and running statistics."""
    layers = [nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.5)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(12, n_classes))


def begin(**changes):
    config = small(**{"model__name": "toys:mlp", "optimizer__sam_rho": RHO} | changes)
    return config, start(config, SHAPE, CLASSES)


def layers(generator, d=1.0):
    """f(x) = W2 W1 x, which writing it with d W1 and W2 / d leaves as it is."""
    network = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        for layer, scale in zip(network, (d, 1 / d), strict=True):
            layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
    return network


def gradient_of(network, x):
    network.zero_grad()
    network(x).square().sum().backward()
    return [p.grad.clone() for p in network.parameters()]


def moved(network, x, config):
    """Weights before, and how far they go up."""
    gradient_of(network, x)
    before = [p.detach().clone() for p in network.parameters()]
    ascend(list(network.parameters()), config)
    return before, [p.detach() - w for p, w in zip(network.parameters(), before, strict=True)]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_on_a_quadratic_the_gradient_is_that_of_the_point_rho_up_the_gradient(generator):
    """L(w) = w A w / 2: A (w + rho A w / |A w|)."""
    a = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    a, w = a @ a.T, torch.randn(5, generator=generator, dtype=torch.float64)
    network = nn.ParameterList([w[:2].clone(), w[2:].clone()])

    def backward():
        at = torch.cat([p.detach() for p in network])
        for parameter, gradient in zip(network, (a @ at).split([2, 3]), strict=True):
            parameter.grad = gradient
        return at @ a @ at / 2

    seen = sharpness_aware(backward, network, SAM)
    up = w + RHO * a @ w / (a @ w).norm()
    torch.testing.assert_close(flat([p.grad for p in network]), a @ up, atol=1e-12, rtol=0)
    assert torch.equal(flat(network), w)
    assert seen == w @ a @ w / 2


def test_sam_goes_rho_up_the_whole_gradient_and_asam_rho_in_units_of_the_weights(generator):
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    network = layers(generator)
    g = flat(gradient_of(network, x))
    before, eps = moved(network, x, SAM)
    torch.testing.assert_close(flat(eps), RHO * g / g.norm(), atol=1e-14, rtol=0)
    network = layers(torch.Generator().manual_seed(5))
    g = flat(gradient_of(network, x))
    before, eps = moved(network, x, ASAM)
    w = flat(before)
    torch.testing.assert_close(flat(eps), RHO * w.square() * g / (w * g).norm(), atol=1e-14, rtol=0)
    assert (flat(eps) / w).norm().item() == pytest.approx(RHO)


@pytest.mark.parametrize("config", [SAM, ASAM], ids=["SAM", "ASAM"])
def test_writing_the_same_function_with_other_weights_changes_sams_step_and_not_asams(config):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    d, (plain, scaled) = 4.0, [layers(torch.Generator().manual_seed(1), d) for d in (1.0, 4.0)]
    torch.testing.assert_close(plain(x), scaled(x))
    (_, eps), (_, theirs) = moved(plain, x, config), moved(scaled, x, config)
    same = [torch.allclose(b, s * a, atol=1e-13) for a, b, s in zip(eps, theirs, (d, 1 / d), strict=True)]
    assert same == [config is ASAM] * 2
    assert torch.allclose(plain(x), scaled(x)) == (config is ASAM)


@pytest.mark.parametrize("config", [SAM, ASAM], ids=["SAM", "ASAM"])
def test_a_gradient_of_zero_leaves_the_weights(config):
    network = layers(torch.Generator().manual_seed(1))
    _, eps = moved(network, torch.zeros(6, 4, dtype=torch.float64), config)
    assert not flat(eps).any()


@pytest.mark.parametrize("settings", [{}, {"optimizer__sam_adaptive": True}], ids=["SAM", "ASAM"])
def test_a_step_applies_the_gradient_of_the_point_above_and_tells_the_loss_where_it_stands(settings):
    config, state = begin(precision="float64", **settings)
    twin, data = copy.deepcopy(state.network), batch()
    data = type(data)(data.images.double(), *list(vars(data).values())[1:])
    samples = sample(start(config, SHAPE, CLASSES), config, data.images, 6)
    info = train_step(state, data, config, World())
    loss = loss_and_gradient(twin, {}, data, samples, config, World())
    ascend(list(twin.parameters()), config.optimizer)
    above = loss_and_gradient(twin, {}, data, samples, config, World())
    assert info.loss == loss
    assert above.total > loss.total + 1e-3
    expected = flat([p.grad for p in twin.parameters()])
    assert torch.equal(flat([p.grad for p in state.network.parameters()]), expected)
    torch.testing.assert_close(info.grad_norm, expected.norm())


def test_both_passes_drop_the_same_and_only_the_first_moves_running_statistics():
    config, state = begin(model__name="test_sam:noisy")
    _, plain = begin(model__name="test_sam:noisy", optimizer__sam_rho=0.0)
    dropped = []
    state.network[4].register_forward_hook(lambda module, _, out: dropped.append(out == 0) if module.training else None)
    for step, (given, settings) in enumerate(((state, config), (plain, small(model__name="test_sam:noisy")))):
        (info,) = train(given, lambda _: batch(), settings, 1)
        assert not info.skipped, step
    first, second = dropped
    assert first.float().mean() > 0.3
    assert torch.equal(first, second)
    for mine, theirs in zip(state.network.buffers(), plain.network.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert state.network[2].num_batches_tracked == 1


def test_what_is_drawn_after_the_step_is_what_would_be_without_sam():
    after = []
    for rho in (0.0, RHO):
        config, state = begin(model__name="test_sam:noisy", optimizer__sam_rho=rho)
        list(train(state, lambda _: batch(), config, 1))
        after.append(torch.rand(3))
    assert torch.equal(*after)


BAD = {"nan": math.nan, "infinite": math.inf, "an overflow of its norm": 3e38}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("config", [SAM, ASAM], ids=["SAM", "ASAM"])
def test_a_first_gradient_that_is_no_direction_makes_the_second_no_number(bad, config):
    network = nn.Linear(3, 2)
    nn.init.ones_(network.weight)
    before, calls = copy.deepcopy(network.state_dict()), []

    def backward():
        network.zero_grad()
        network(torch.ones(1, 3)).sum().backward()
        if not calls:
            network.weight.grad[0] = BAD[bad]
        calls.append(network.weight.detach().clone())

    sharpness_aware(backward, network, config)
    assert calls[1].isnan().all()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("at", ["first", "second"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_gradient_that_is_not_finite_in_either_pass_leaves_weights_moments_averages_and_statistics(at, optimizer):
    changes = {"model__name": "test_sam:noisy", "optimizer__name": optimizer, "optimizer__ema_decay": 0.5}
    config, state = begin(**changes)
    train_step(state, batch(), config, World())
    before, passes = tensors_of(state), []
    poisoned = {"first": 0, "second": 1}[at]

    def poison(module, _, out):
        if not module.training:
            return None
        passes.append(None)
        return out * math.nan if len(passes) - 1 == poisoned else out

    hook = state.network.register_forward_hook(poison)
    info = train_step(state, batch(seed=1), config, World())
    hook.remove()
    assert info.skipped
    assert len(passes) == 2
    assert {key: torch.equal(value, before[key]) for key, value in tensors_of(state).items()} == dict.fromkeys(
        before, True
    )
    assert not train_step(state, batch(seed=2), config, World()).skipped


def test_there_is_nothing_to_save():
    """A run that stops and one that does not go the same way: all is a function of weights, batch and step."""
    config, state = begin(model__name="test_sam:noisy")
    list(train(state, lambda step: batch(seed=step), config, 2))
    halfway = copy.deepcopy(state)
    halfway.generator = state.generator.clone_state()
    list(train(state, lambda step: batch(seed=step), config, 4))
    torch.manual_seed(77)
    other = start(config, SHAPE, CLASSES)
    for mine, theirs in ((other.network, halfway.network), (other.optimizer, halfway.optimizer)):
        mine.load_state_dict(theirs.state_dict())
    other.replay, other.generator, other.step = halfway.replay, halfway.generator, halfway.step
    list(train(other, lambda step: batch(seed=step), config, 4))
    for mine, theirs in zip(other.network.state_dict().values(), state.network.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_update_that_is_skipped_takes_the_first_passs_statistics_back():
    network = nn.BatchNorm1d(2)
    guard, before = BufferGuard(network), copy.deepcopy(network.state_dict())

    def backward():
        network.zero_grad()
        network(torch.randn(8, 2)).square().sum().backward()

    sharpness_aware(backward, network, SAM)
    assert network.num_batches_tracked == 1
    guard.settle(torch.tensor(True), 1)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
