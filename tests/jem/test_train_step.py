import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from toys import labelled_batch, small

from jem.data.batches import Batch
from jem.errors import ConfigError
from jem.train import frozen_logits, looks, prepare_first_step, sample, start, train, train_step
from jem.world import World

SHAPE, CLASSES, HERE = (1, 4, 4), 3, torch.device("cpu")


class Probe(nn.Module):
    """Linear logits; remembers how it was called: (training, rows, dtype)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, CLASSES)
        self.calls = []

    def forward(self, x):
        out = self.linear(x.flatten(1))
        self.calls.append((self.training, len(x), x.dtype, out.dtype))
        return out


def probe(config, image_shape, n_classes):
    return Probe()


def begin(world=World(), **changes):  # noqa: B008
    config = small(**{"model__name": "test_train_step:probe"} | changes)
    return config, start(config, SHAPE, CLASSES, world, HERE)


def batch(n=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    return labelled_batch(torch.randn(n, *SHAPE, generator=random), torch.arange(n) % CLASSES)


def test_chains_run_k_times_in_eval_mode_then_data_and_samples_go_once_together_in_train_mode():
    config, state = begin(sgld__steps=4)
    train_step(state, batch(), config, World())
    f32 = torch.float32
    assert state.network.calls == [(False, 6, f32, f32)] * 4 + [(True, 12, f32, f32)]


def test_labelled_images_join_the_same_forward_pass():
    config, state = begin()
    whole = batch()
    train_step(state, Batch(whole.images, None, whole.images[:2], whole.labels[:2], 6, 2), config, World())
    assert state.network.calls[-1][:2] == (True, 6 + 6 + 2)


def test_images_of_p_x_and_the_same_rows_augmented_join_one_forward_pass_and_each_has_its_terms():
    """Cross-entropy and accuracy are those of the augmented images; energies, joint ones too, of the others."""
    config, state = begin(objective__p_x_y_weight=0.5, sgld__conditional=True, data__augment_p_x=False)
    plain, augmented = batch(seed=1), batch(seed=2)
    both = Batch(plain.images, plain.labels, augmented.images, plain.labels, 6, 6)
    twin = copy.deepcopy(state.network)
    info = train_step(state, both, config, World())
    assert state.network.calls[-1][:2] == (True, 6 + 6 + 6)
    chains = sample(begin(sgld__conditional=True)[1], config, plain.images, 6)
    with torch.no_grad():
        seen = [twin(images) for images in (plain.images, chains.images, augmented.images)]
    torch.testing.assert_close(info.loss.cross_entropy, nn.functional.cross_entropy(seen[2], plain.labels))
    assert info.loss.accuracy == (seen[2].argmax(dim=1) == plain.labels).float().mean()
    energies = [-logits.logsumexp(dim=1).mean() for logits in seen[:2]]
    torch.testing.assert_close([info.loss.energy_data, info.loss.energy_samples], energies)
    joint = [-f[range(6), y].mean() for f, y in zip(seen, (plain.labels, chains.labels), strict=False)]
    total = info.loss.cross_entropy + energies[0] - energies[1] + 0.5 * (joint[0] - joint[1])
    torch.testing.assert_close(info.loss.total, total)


def test_a_classifier_runs_no_chains_and_costs_one_forward_pass_of_the_batch():
    config, state = begin(objective__p_x_weight=0.0)
    info = train_step(state, batch(), config, World())
    assert [call[:2] for call in state.network.calls] == [(True, 6)]
    assert state.replay is None
    assert info.loss.total == info.loss.cross_entropy
    assert info.chain_grad_norm == info.loss.energy_samples == 0


def test_in_bf16_the_network_computes_in_it_and_positions_energies_and_weights_stay_in_float32():
    config, state = begin(precision="bf16")
    info = train_step(state, batch(), config, World())
    assert {call[2:] for call in state.network.calls} == {(torch.float32, torch.bfloat16)}
    kept = [state.replay.chains, info.loss.total, info.chain_grad_norm, state.network.linear.weight]
    assert {t.dtype for t in kept} == {torch.float32}
    moved = state.replay.chains[state.replay.chains != state.replay.chains.bfloat16().float()]
    assert len(moved) > 0.9 * state.replay.chains.numel()  # not rounded on the way
    assert frozen_logits(state.network, config)(batch().images).dtype == torch.float32


def test_a_conditional_chain_climbs_the_logit_of_its_own_class_and_a_free_one_their_logsumexp():
    for conditional in (True, False):
        config, state = begin(
            sgld__conditional=conditional,
            sgld__steps=1,
            sgld__noise_scale=0.0,
            sgld__step_size=2.0,
            replay__reinit_prob=0,
        )
        before = state.replay.chains.clone()
        sample(state, config, batch().images, 6)
        weight = state.network.linear.weight.detach()
        labels = state.replay.labels(torch.arange(len(before)))
        share = nn.functional.one_hot(labels, CLASSES).float()
        if not conditional:
            share = state.network.linear(before.flatten(1)).softmax(dim=1).detach()
        moved = (state.replay.chains != before).flatten(1).any(dim=1)
        assert moved.sum() == 6
        expected = before.flatten(1) + 2.0 * share @ weight
        torch.testing.assert_close(state.replay.chains.flatten(1)[moved], expected[moved])


def test_a_chain_that_is_lost_leaves_its_slot_and_skips_the_update():
    config, state = begin(sgld__step_size=1e38, sgld__steps=2, optimizer__ema_decay=0.5)
    with torch.no_grad():
        state.network.linear.weight *= 1e3
    weights, chains = state.network.linear.weight.clone(), state.replay.chains.clone()
    info = train_step(state, batch(), config, World())
    assert info.lost_chains == 6
    assert info.skipped
    assert torch.equal(state.network.linear.weight, weights)
    assert torch.equal(state.replay.chains, chains)
    assert state.step == 1


def test_bad_data_skip_an_update_but_chains_move_on():
    config, state = begin()
    bad = batch()
    bad.images[0, 0, 0, 0] = math.nan
    weights, chains = state.network.linear.weight.clone(), state.replay.chains.clone()
    info = train_step(state, bad, config, World())
    assert info.skipped
    assert info.lost_chains == 0
    assert torch.equal(state.network.linear.weight, weights)
    assert not torch.equal(state.replay.chains, chains)
    assert state.replay.chains.isfinite().all()
    assert not train_step(state, batch(), config, World()).skipped


def test_training_ends_at_its_number_of_steps_and_asks_for_each_batch_by_its_step():
    config, state = begin(optimizer__warmup_steps=4, optimizer__learning_rate=0.4)
    asked = []

    def batch_at(step):
        asked.append(step)
        return batch(seed=step)

    infos = list(train(state, batch_at, config, 3))
    assert asked == [0, 1, 2]
    assert [info.step for info in infos] == [1, 2, 3]
    assert [info.learning_rate for info in infos] == pytest.approx([0.1, 0.2, 0.3])
    assert len(list(train(state, batch_at, config, 5))) == 2
    assert list(train(state, batch_at, config, 5)) == []
    assert asked == [0, 1, 2, 3, 4]


def test_weights_start_the_same_on_every_rank_and_chains_are_each_ranks_own():
    states = [begin(World(rank, 3))[1] for rank in range(3)]
    for other in states[1:]:
        assert torch.equal(states[0].network.linear.weight, other.network.linear.weight)
        assert not torch.equal(states[0].replay.chains[:3], other.replay.chains[:3])
    assert not torch.equal(begin(seed=1)[1].network.linear.weight, states[0].network.linear.weight)


def test_starting_leaves_the_global_generator_alone_and_does_not_depend_on_it():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = begin()[1].network.linear.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(begin()[1].network.linear.weight, first)


def test_a_step_draws_from_the_states_generator_only():
    def run():
        config, state = begin()
        for step in range(3):
            train_step(state, batch(seed=step), config, World())
        return state.replay.chains

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(2)
    assert torch.equal(run(), first)


def test_figures_of_a_step_are_means_over_its_images_and_chains():
    """All chains are drawn and take one step; |grad E(x)| = |sum_y p(y|x) W_y|."""
    config, state = begin(replay__capacity=6, replay__reinit_prob=0.0, sgld__noise_scale=0.0, sgld__steps=1)
    linear, before = state.network.linear, state.replay.chains.clone().flatten(1)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    info = train_step(state, batch(), config, World())

    def energy(x):
        return -(x.flatten(1) @ weight.T + bias).logsumexp(dim=1).mean()

    gradient = (before @ weight.T + bias).softmax(dim=1) @ weight
    torch.testing.assert_close(info.chain_grad_norm, gradient.norm(dim=1).mean())
    torch.testing.assert_close(info.loss.energy_data, energy(batch().images))
    torch.testing.assert_close(info.loss.energy_samples, energy(state.replay.chains))
    whole = torch.cat([p.grad.flatten() for p in linear.parameters()])
    torch.testing.assert_close(info.grad_norm, whole.norm())
    assert info.reinit_share == 0
    config, state = begin(replay__reinit_prob=1.0)
    assert train_step(state, batch(), config, World()).reinit_share == 1


def looked(chains, data=None, n_global=None, **changes):
    data = torch.zeros_like(chains) if data is None else data
    config = small(data__noise_std=0.1, **changes)
    return [figure.item() for figure in looks(chains, data, config, n_global or len(chains))]


def test_saturated_is_what_lies_twice_as_far_out_as_data_or_at_the_clamp():
    chains = torch.tensor([0.0, 1.9, -1.9, 2.0, -2.1, 1e30, 1.0, -1.0]).reshape(2, 1, 2, 2)
    assert looked(chains)[0] == 3 / 8
    assert looked(chains.clamp(-1, 1), sgld__clamp=1.0)[0] == 7 / 8
    assert looked(chains * math.nan)[0] == 0  # lost, which is counted elsewhere


def test_chains_at_the_clamp_are_not_saturated_where_as_much_of_the_data_is():
    """A black half, with its noise of 0.1: 97.7 % of it are counted, from -0.8 down."""
    random = torch.Generator().manual_seed(0)
    black = torch.cat([torch.full((500, 1, 4, 8), -1.0), torch.zeros(500, 1, 4, 8)], dim=2)
    data = black + 0.1 * torch.randn(black.shape, generator=random)
    assert abs(looked(black, data, sgld__clamp=1.0)[0] - 0.5 * 0.0228) < 0.005
    assert abs(looked(black.sign().abs() * 2 - 1, data, sgld__clamp=1.0)[0] - 0.51) < 0.005
    assert looked(black, data)[0] == 0  # without a clamp
    assert looked(black, black, sgld__clamp=1.0, data__augment_p_x=False)[0] == 0  # data without noise
    grey = torch.full_like(black, -0.9)
    assert looked(grey, grey, sgld__clamp=1.0, data__augment_p_x=False)[0] == 0
    assert looked(grey, grey, sgld__clamp=1.0)[0] == -1


def test_contrast_is_the_variance_within_an_image_not_between_images():
    greys = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 1, 2, 2)
    halves = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(1, 1, 2, 2).expand(6, 1, 2, 2)
    assert looked(greys, halves)[1:] == [0, 1]
    assert looked(3 * halves, greys)[1:] == [9, 0]


def test_what_chains_look_like_sums_over_ranks_to_the_mean_over_all():
    random = torch.Generator().manual_seed(0)
    chains, data = 2 * torch.randn(2, 7, 1, 4, 4, generator=random)
    parts = [looked(chains[rows], data[rows], 7) for rows in (slice(0, 3), slice(3, 7))]
    assert [sum(figure) for figure in zip(*parts, strict=True)] == pytest.approx(looked(chains, data))


def test_a_step_looks_at_its_chains_after_they_moved():
    config, state = begin(replay__capacity=6, replay__reinit_prob=0.0, sgld__noise_scale=5.0)
    before, images = state.replay.chains.clone(), batch().images
    info = train_step(state, batch(), config, World())
    seen = (info.chain_saturation, info.chain_contrast, info.data_contrast)
    torch.testing.assert_close(seen, looks(state.replay.chains, images, config, 6))
    assert info.chain_contrast > 4 * looks(before, images, config, 6)[1]


BATCH_NORM = {"model__name": "small_conv", "model__channels": [3, 5], "model__norm": "batch"}


def test_with_batch_norm_sampling_leaves_running_statistics_and_no_chain_depends_on_the_others():
    config, state = begin(**BATCH_NORM, replay__capacity=6, replay__reinit_prob=0.0, sgld__noise_scale=0.0)
    for step in range(3):
        train_step(state, batch(seed=step), config, World())
    buffers, chains = copy.deepcopy(dict(state.network.named_buffers())), state.replay.chains.clone()
    assert (buffers["1.running_var"] != 1).all()
    moved = []
    for others in (chains[1:], 3 * chains[1:].flip(0)):
        state.replay.chains = torch.cat([chains[:1], others])
        sample(state, config, batch().images, 6)
        moved.append(state.replay.chains.clone())
        for name, buffer in state.network.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
    torch.testing.assert_close(moved[0][0], moved[1][0], atol=1e-6, rtol=0)
    assert not torch.equal(moved[0][0], chains[0])


@pytest.mark.parametrize("labelled", [0, 2])
def test_with_batch_norm_running_statistics_are_of_data_samples_and_labelled_images_together(labelled):
    config, state = begin(**BATCH_NORM)
    twin, whole = copy.deepcopy(state.network), batch()
    data = whole
    if labelled:
        data = Batch(whole.images, None, 2 * whole.images[:labelled], whole.labels[:labelled], 6, labelled)
    samples = sample(begin(**BATCH_NORM)[1], config, whole.images, 6)
    train_step(state, data, config, World())
    seen = twin[0](torch.cat([whole.images, samples.images, 2 * whole.images[:labelled]]))
    variance, mean = torch.var_mean(seen, dim=(0, 2, 3))
    torch.testing.assert_close(state.network[1].running_mean, 0.1 * mean)
    torch.testing.assert_close(state.network[1].running_var, 0.9 + 0.1 * variance)


def test_the_average_starts_at_the_weights_that_act_norm_left():
    _, state = begin(model__name="small_conv", model__channels=[3], model__norm="act", optimizer__ema_decay=0.9)
    prepare_first_step(state, 5 + 3 * batch().images)
    mine, theirs = state.network.state_dict(), state.average.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (mine["1.scale"] != 1).all()


def test_too_few_chains_for_the_ranks_or_for_the_classes_they_keep_are_refused_on_every_rank():
    for rank in range(5):
        with pytest.raises(ConfigError, match=r"replay.capacity: is 8, must be at least 12 so that each of 5 ranks"):
            begin(World(rank, 5), batch_size=7, replay__capacity=8)
    with pytest.raises(ConfigError, match=r"replay.capacity: is 2, must be at least 3 with sgld.conditional"):
        begin(batch_size=2, replay__capacity=2, sgld__conditional=True)
    begin(batch_size=2, replay__capacity=2)


@pytest.mark.parametrize("settings", [{}, {"objective__p_x_loss": "bce"}, {"objective__p_x_y_weight": 0.5}], ids=str)
def test_chains_that_keep_a_class_count_as_often_as_it_comes_among_the_images(settings):
    """Of 7 chains, of classes 0 1 2 0 1 2 0: by hand."""
    config, state = begin(batch_size=7, replay__capacity=7, sgld__conditional=True, **settings)
    data, twin = batch(7), copy.deepcopy(state.network)
    shares = torch.tensor([0.5, 0.5], dtype=torch.float64)  # the last class comes not at all
    info = train_step(state, dataclasses.replace(data, class_shares=shares), config, World())
    samples = sample(begin(batch_size=7, replay__capacity=7, sgld__conditional=True)[1], config, data.images, 7)
    weights = torch.tensor([0.5 / (3 / 7), 0.5 / (2 / 7), 0.0])[samples.labels]
    with torch.no_grad():
        of_data, of_samples = twin(data.images), twin(samples.images)
    energies = [-logits.logsumexp(dim=1) for logits in (of_data, of_samples)]
    mean = (weights * energies[1]).mean()
    torch.testing.assert_close(info.loss.energy_samples, mean)
    expected = nn.functional.cross_entropy(of_data, data.labels)
    if config.objective.p_x_loss == "bce":
        terms = nn.functional.softplus(energies[0]).mean() + (weights * nn.functional.softplus(-energies[1])).mean()
        expected = expected + terms
    else:
        expected = expected + energies[0].mean() - mean
    if config.objective.p_x_y_weight:
        joint = -of_data[range(7), data.labels].mean() + (weights * of_samples[range(7), samples.labels]).mean()
        expected = expected + 0.5 * joint
    torch.testing.assert_close(info.loss.total, expected)
