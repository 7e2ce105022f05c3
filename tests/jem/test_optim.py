import copy
import math

import pytest
import torch
from torch import nn

from jem.config import OptimizerConfig
from jem.optim import (
    BufferGuard,
    averaged_copy,
    guarded_update,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    update_average,
)

RATE = 0.1
ADAM = OptimizerConfig(learning_rate=RATE, warmup_steps=0)
SGD = OptimizerConfig(name="sgd", learning_rate=RATE, warmup_steps=0)


def point(*values):
    """A network whose only weights are these."""
    network = nn.Linear(len(values), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([values]))
    return network


def update(network, optimizer, config, gradient, rate=RATE):
    network.weight.grad = torch.tensor([gradient], dtype=torch.float64)
    return guarded_update(optimizer, config, rate)


def test_learning_rate_rises_linearly_to_its_value_and_never_is_0():
    config = OptimizerConfig(learning_rate=0.8, warmup_steps=4)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_learning_rate_is_multiplied_by_decay_rate_from_each_decay_step_on():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, decay_steps=(2, 4), decay_rate=0.3)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx([1, 1, 0.3, 0.3, 0.09, 0.09])
    assert learning_rate(OptimizerConfig(), 999) == learning_rate(OptimizerConfig(), 10**6) == 1e-4
    assert learning_rate(OptimizerConfig(), 0) == pytest.approx(1e-7)  # 1000 warm-up steps


def test_two_updates_of_adam_are_those_worked_out_by_hand():
    """m = .9 m + .1 g, v = .999 v + .001 g^2, both divided by 1 - beta^t."""
    network = point(1.0)
    optimizer = make_optimizer(network, ADAM)
    w, m, v = 1.0, 0.0, 0.0
    for t, g in ((1, 0.5), (2, -2.0)):
        update(network, optimizer, ADAM, [g])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w -= RATE * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert network.weight.item() == pytest.approx(w, rel=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_two_updates_of_sgd_with_weight_decay_are_those_worked_out_by_hand(momentum):
    config = OptimizerConfig(name="sgd", momentum=momentum, weight_decay=0.1, warmup_steps=0)
    network = point(1.0)
    optimizer = make_optimizer(network, config)
    w, m = 1.0, 0.0
    for g, rate in ((0.5, 0.1), (-2.0, 0.01)):
        update(network, optimizer, config, [g], rate)
        m = momentum * m + g + 0.1 * w
        w -= rate * m
        assert network.weight.item() == pytest.approx(w, rel=1e-12)


@pytest.mark.parametrize(("clip", "factor"), [(None, 1.0), (10.0, 1.0), (2.5, 0.5), (0.5, 0.1)])
def test_gradient_is_scaled_to_the_clip_norm_where_it_is_longer_and_its_own_norm_is_reported(clip, factor):
    config = OptimizerConfig(name="sgd", momentum=0.0, clip_norm=clip, warmup_steps=0)
    network = point(0.0, 0.0)
    norm, skipped = update(network, make_optimizer(network, config), config, [3.0, -4.0])
    assert norm == 5.0
    assert not skipped
    assert network.weight[0].tolist() == pytest.approx([-0.3 * factor, 0.4 * factor], rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("earlier", [0, 2])
def test_a_non_finite_gradient_moves_neither_weights_nor_moments_and_training_goes_on_as_if_it_had_not_been(
    bad, clip, config, earlier
):
    config = OptimizerConfig(name=config.name, clip_norm=clip, warmup_steps=0)
    network, twin = point(1.0, 2.0), point(1.0, 2.0)
    optimizers = [make_optimizer(n, config) for n in (network, twin)]
    for _ in range(earlier):
        for n, o in zip((network, twin), optimizers, strict=True):
            update(n, o, config, [0.3, 0.4])
    _, skipped = update(network, optimizers[0], config, [0.1, bad])
    assert skipped
    assert torch.equal(network.weight, twin.weight)
    for n, o in zip((network, twin), optimizers, strict=True):
        _, skipped = update(n, o, config, [0.3, -0.4])
        assert not skipped
    assert torch.equal(network.weight, twin.weight)
    mine, theirs = (optimizer_tensors(n, o) for n, o in zip((network, twin), optimizers, strict=True))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_averaged_weights_are_the_exponential_moving_average_worked_out_by_hand():
    network = point(1.0)
    average = averaged_copy(network)
    expected = 1.0
    for value in (2.0, 5.0, -3.0):
        with torch.no_grad():
            network.weight.fill_(value)
        update_average(average, network, 0.9, torch.tensor(False))
        expected = 0.9 * expected + 0.1 * value
        assert average.weight.item() == pytest.approx(expected, rel=1e-12)
    update_average(average, network, 0.9, torch.tensor(True))  # a skipped update is no update
    assert average.weight.item() == pytest.approx(expected, rel=1e-12)
    assert not average.weight.requires_grad


def test_buffers_of_the_average_are_those_of_the_network():
    network = nn.Sequential(nn.BatchNorm1d(2))
    average = averaged_copy(network)
    network(torch.randn(8, 2))
    update_average(average, network, 0.9, torch.tensor(False))
    assert torch.equal(average[0].running_mean, network[0].running_mean)


def test_a_skipped_update_and_an_overflow_leave_the_running_statistics_as_they_were():
    network = nn.BatchNorm1d(2)
    network(torch.randn(8, 2))
    before = copy.deepcopy(network.state_dict())
    for poison, skipped in ((math.nan, True), (1.0, True), (1e30, False)):  # 1e30^2 is infinite in float32
        guard = BufferGuard(network)
        network(torch.randn(8, 2) * poison)
        guard.settle(torch.tensor(skipped), 1)
        finite = all(value.isfinite().all() for value in network.state_dict().values())
        assert finite
        if skipped:
            assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
def test_optimizer_tensors_put_into_a_new_optimizer_continue_bit_for_bit(config):
    network = point(1.0, 2.0)
    optimizer = make_optimizer(network, config)
    for gradient in ([0.1, 3.0], [-2.0, 0.5]):
        update(network, optimizer, config, gradient)
    twin = copy.deepcopy(network)
    other = make_optimizer(twin, config)
    tensors = {key: value.clone() for key, value in optimizer_tensors(network, optimizer).items()}
    assert set(tensors) == {
        f"{k}/weight" for k in (("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq"))[config is ADAM]
    }
    load_optimizer_tensors(twin, other, tensors)
    for n, o in ((network, optimizer), (twin, other)):
        update(n, o, config, [0.7, -0.2])
    assert torch.equal(network.weight, twin.weight)


@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
def test_tensors_of_an_optimizer_that_never_moved_undo_what_another_saw(config):
    network = point(1.0, 2.0)
    optimizer = make_optimizer(network, config)
    start = {key: value.clone() for key, value in optimizer_tensors(network, optimizer).items()}
    update(network, optimizer, config, [0.1, 3.0])
    load_optimizer_tensors(network, optimizer, start)
    now = optimizer_tensors(network, optimizer)
    assert now.keys() == start.keys()
    assert all(torch.equal(now[key], start[key]) for key in start)
