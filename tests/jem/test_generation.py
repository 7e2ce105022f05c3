import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from toys import small

from jem.config import DataConfig, SGLDConfig
from jem.data.augment import to_float
from jem.data.batches import BatchSource
from jem.data.sources import load
from jem.errors import ConfigError
from jem.evaluate import generation
from jem.evaluate.extractors import extractor_for
from jem.evaluate.generation import (
    DIAGNOSTICS,
    acceptance,
    chain_diagnostics,
    figures,
    fresh,
    log_marks,
    nearest,
)
from jem.evaluate.sets import uniform_noise
from jem.prior import uniform
from jem.randomness import generator as stream
from jem.sgld import sgld_chain, sgld_step
from jem.train import frozen_logits, start, train


def normal(n, d, generator, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, d, generator=generator, dtype=torch.float64)


def any_logits(n, classes=3):
    return torch.zeros(n, classes)


def of(x, y, **settings):
    return figures(x, any_logits(len(x)), y, **settings)


def quadratic(k=1.0):
    return lambda x: k * x.flatten(1).square().sum(dim=1) / 2


# Figures of features


def with_moments(n, mean, covariance, generator):
    """Points whose sample mean and covariance are exactly these."""
    z = torch.randn(n, len(mean), generator=generator, dtype=torch.float64).numpy()
    z = z - z.mean(axis=0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T
    return torch.from_numpy(z @ np.linalg.cholesky(covariance).T + mean)


def test_fid_of_gaussians_is_their_closed_form(generator):
    """Of covariances that commute: |mean - mean'|^2 + sum (sqrt a - sqrt b)^2 over the eigenvalues."""
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    turn = scipy.linalg.qr(np.random.RandomState(0).randn(3, 3))[0]
    x = with_moments(50, np.array([1.0, 0.0, -2.0]), turn @ np.diag(a) @ turn.T, generator)
    y = with_moments(80, np.array([0.0, 2.0, -2.0]), turn @ np.diag(b) @ turn.T, generator)
    assert of(x, y)["fid"] == pytest.approx(1 + 4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)


def test_fid_and_kid_are_those_of_an_independent_computation(generator):
    x, y = normal(60, 5, generator), normal(60, 5, generator, mean=0.3, std=1.4)
    found = of(x, y)
    a, b = x.numpy(), y.numpy()
    ca, cb = np.cov(a.T), np.cov(b.T)
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    assert found["fid"] == pytest.approx(gap + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real))
    kernel = [[(u @ v.T / 5 + 1) ** 3 for v in (a, b)] for u in (a, b)]
    within = [(k.sum() - np.trace(k)) / (60 * 59) for k in (kernel[0][0], kernel[1][1])]
    assert found["kid"] == pytest.approx(sum(within) - 2 * kernel[0][1].mean())
    assert found["kid_std"] == pytest.approx(0, abs=1e-12)  # every subset is the whole of both


@pytest.fixture
def registered():
    """torch-fidelity's own extractor of nothing: the features of image number i are row i of `table`."""
    from torch_fidelity import registry
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Table(FeatureExtractorBase):
        table = None

        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("all", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "all"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            rows = images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1].long()
            return tuple(self.table[rows] if name == "all" else self.table[rows][:, :3] for name in self.features_list)

    registry.register_feature_extractor("table", Table)
    yield Table
    del registry.FEATURE_EXTRACTORS_REGISTRY["table"]


class Numbered(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return torch.tensor([row // 256, row % 256], dtype=torch.uint8).expand(3, 1, 2).contiguous()


def test_all_figures_are_those_of_torch_fidelity_from_end_to_end_on_the_same_features(registered, generator):
    x, y = normal(150, 8, generator).float(), normal(320, 8, generator, mean=0.2, std=1.2).float()
    registered.table = torch.cat([x, y])
    from torch_fidelity import calculate_metrics

    expected = calculate_metrics(
        input1=Numbered(range(150)),
        input2=Numbered(range(150, 470)),
        feature_extractor="table",
        **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
        kid_subset_size=100,
        isc_splits=1,
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        save_cpu_ram=True,
    )
    found = figures(x, x[:, :3], y, kid_subset_size=100)
    assert found["kid_std"] > 0
    for name, key in generation.FIGURES.items():
        assert found[name] == pytest.approx(expected[key], rel=1e-5), name
    assert set(found) == {"fid", "kid", "kid_std", "is", "precision", "recall"}


def test_precision_and_recall_are_1_of_a_set_and_itself_and_0_of_sets_that_are_far_apart(generator):
    x = normal(50, 4, generator)
    same, far = of(x, x), of(x, x + 100)
    assert (same["precision"], same["recall"]) == (1, 1)
    assert (far["precision"], far["recall"]) == (0, 0)


def test_precision_is_of_the_samples_and_recall_of_the_reference(generator):
    """Samples of one of two clusters: each is real, and half of what is real is never made."""
    one, other = normal(60, 2, generator), normal(60, 2, generator, mean=50)
    found = of(normal(60, 2, generator, std=0.1), torch.cat([one, other]))
    assert found["precision"] == 1
    assert found["recall"] <= 0.5


def test_the_parts_that_balls_are_computed_in_change_nothing(generator, monkeypatch):
    x, y = normal(40, 3, generator), normal(70, 3, generator, mean=0.5)
    whole = of(x, y)
    monkeypatch.setattr(generation, "BALLS_AT_ONCE", 7)
    assert of(x, y) == whole
    assert 0 < whole["precision"] < 1


def test_balls_are_those_of_a_part_of_a_large_reference_and_all_else_is_of_the_whole(generator, monkeypatch):
    x, y = normal(40, 3, generator), normal(100, 3, generator, mean=0.5)
    whole, part = of(x, y), of(x, y[generation.at_random(100, 30)])
    monkeypatch.setattr(generation, "BALLS", 30)
    found = of(x, y)
    assert (found["precision"], found["recall"]) == (part["precision"], part["recall"])
    assert found["recall"] != whole["recall"]
    assert all(found[name] == whole[name] for name in ("fid", "kid", "is"))


def test_the_inception_score_is_the_number_of_classes_for_sure_and_even_answers_and_1_for_one_answer(generator):
    x = normal(30, 2, generator)
    sure = 1000 * torch.eye(3)[torch.arange(30) % 3]
    assert figures(x, sure, x)["is"] == pytest.approx(3)
    assert figures(x, sure[:1].expand(30, -1), x)["is"] == pytest.approx(1)


def test_the_inception_score_is_of_one_split():
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    logits = 1000 * torch.eye(3)[torch.arange(30) // 10]  # ten splits in this order would each score 1
    assert figures(x, logits, x)["is"] == pytest.approx(3)


def fid_of_fresh_chains(state, data, config):
    """Of chains of 60 steps, the same number from the same noise for every model, none of them chosen."""
    extractor = extractor_for(config.data, data.image_shape)
    reference, _ = extractor.features(to_float(data.train.images, torch.float32))
    begin = uniform((128, *data.image_shape), seeded())
    samples = fresh(frozen_logits(state.network, config), begin, 60, config.sgld, seeded(1))
    return figures(*extractor.features(samples), reference)["fid"]


def test_fid_falls_as_training_goes_on():
    """To less than half of an untrained network's, in the mean over 200 and 250 steps: it goes up and down between
    (docs/samples.md). Measured with seeds 0, 1 and 2: from 11.42, 11.41 and 11.46 to 2.24, 4.62 and 3.38."""
    config = small(
        batch_size=64,
        data__name="digits",
        data__noise_std=0.1,
        data__crop_padding=0,
        data__flip=False,
        model__name="small_conv",
        model__channels=[16, 32, 64, 64],
        model__activation="silu",
        optimizer__learning_rate=1e-3,
        sgld__steps=10,
        replay__capacity=1000,
    )
    data = load(config.data)
    source = BatchSource(data.train, config.data, config.batch_size, config.seed)
    state = start(config, data.image_shape, data.n_classes)
    untrained = fid_of_fresh_chains(state, data, config)
    trained = []
    for steps in (200, 250):
        for _ in train(state, source.at, config, steps):
            pass
        trained.append(fid_of_fresh_chains(state, data, config))
    assert sum(trained) / len(trained) < untrained / 2


def test_kid_of_two_halves_of_the_digits_is_near_0_and_that_of_noise_far_above(generator):
    data = load(DataConfig(name="digits"), ("train",)).train
    order = torch.randperm(len(data), generator=generator)
    features, logits = extractor_for(DataConfig(name="digits"), (1, 8, 8)).features(to_float(data.images[order]))
    a, b = features[::2], features[1::2]
    settings = {"kid_subset_size": 200}
    halves = figures(a, logits[::2], b, **settings)
    others = []  # halves of the same images say how much the KID of two halves varies
    for _ in range(12):
        p = torch.randperm(len(features), generator=generator)
        others.append(of(features[p[::2]], features[p[1::2]], **settings)["kid"])
    assert abs(halves["kid"]) < 4 * np.std(others)
    images = uniform_noise(torch.Size((len(a), 1, 8, 8)), generator)
    noise = figures(*extractor_for(DataConfig(name="digits"), (1, 8, 8)).features(images), b, **settings)
    assert noise["kid"] > 100 * np.std(others)
    assert noise["fid"] > 10 * halves["fid"]
    assert noise["precision"] < 0.1
    assert halves["precision"] > 0.7


def test_the_same_features_give_the_same_figures_whatever_the_global_generators(generator):
    x, y = normal(50, 4, generator), normal(90, 4, generator)
    torch.manual_seed(1)
    np.random.seed(1)
    first = of(x, y, kid_subset_size=20)
    torch.manual_seed(2)
    np.random.seed(2)
    assert of(x, y, kid_subset_size=20) == first


def test_too_few_features_or_some_that_are_not_finite_are_refused(generator):
    x, y = normal(10, 2, generator), normal(10, 2, generator)
    with pytest.raises(ValueError, match="samples: 3 features, must be at least 4"):
        of(x[:3], y)
    with pytest.raises(ValueError, match="the reference: 1 features"):
        of(x, y[:1])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="samples: features or logits are not finite"):
            of(torch.where(torch.arange(10)[:, None] == 3, bad, x), y)
        with pytest.raises(ValueError, match="samples: features or logits are not finite"):
            figures(x, any_logits(10) + bad, y)


def test_without_torch_fidelity_the_message_says_what_to_install(generator, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    x = normal(10, 2, generator)
    with pytest.raises(ConfigError, match="pip install torch-fidelity"):
        of(x, x)


# Nearest training images


def test_nearest_finds_a_planted_copy_at_distance_0_and_distances_are_on_the_scale_of_0_to_1(generator):
    train = torch.randint(0, 256, (40, 1, 4, 4), generator=generator, dtype=torch.uint8)
    samples = to_float(train[[7, 31]])
    distances, rows = nearest(samples, train)
    assert rows[:, 0].tolist() == [7, 31]
    assert distances[:, 0].tolist() == [0, 0]
    black, white = torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    assert nearest(to_float(black), white, k=1)[0].item() == pytest.approx(4)  # sqrt(16 pixels)


def test_nearest_is_that_of_all_distances_whatever_the_chunks(generator, monkeypatch):
    train = torch.rand(90, 1, 3, 3, generator=generator) * 2 - 1
    samples = torch.rand(35, 1, 3, 3, generator=generator) * 2 - 1
    exact = torch.cdist(samples.flatten(1).double(), train.flatten(1).double()) / 2
    expected, order = exact.sort(dim=1)
    for chunk in (generation.CHUNK, 200, 1):
        monkeypatch.setattr(generation, "CHUNK", chunk)
        distances, rows = nearest(samples, train, k=4)
        torch.testing.assert_close(distances, expected[:, :4])
        assert torch.equal(rows, order[:, :4])


def test_a_copy_that_leaves_the_range_of_images_is_still_a_copy():
    train = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert nearest(torch.tensor([-1.7, 3.0]).view(1, 1, 1, 2), train, k=1)[0].item() == 0


def test_nearest_refuses_what_has_no_answer():
    train = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="2 training images have no 3"):
        nearest(train, train)
    with pytest.raises(ValueError, match="not finite"):
        nearest(train / 0, train, k=1)


# Fresh chains


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 1, 0])])
def test_fresh_chains_are_sgld_chains(network, labels):
    """By hand: the energy is -logsumexp f(x), or -f(x)[y]."""
    start = uniform((5, 1, 2, 2), torch.Generator().manual_seed(3))
    sgld = SGLDConfig(steps=2, step_size=0.5, noise_scale=0.05)

    def energy(x):
        logits = network(x)
        return -logits.logsumexp(1) if labels is None else -logits[torch.arange(5), labels]

    expected, _ = sgld_chain(energy, start, SGLDConfig(steps=7, step_size=0.5, noise_scale=0.05), seeded())
    seen = []
    found = fresh(network, start, 7, sgld, seeded(), labels, lambda step, x: seen.append((step, x)))
    assert torch.equal(found, expected)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(seen[-1][1], expected)
    assert torch.equal(fresh(network, start, 0, sgld, seeded()), start)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


# Chains looked at


def test_marks_rise_by_1_2_and_5_to_100_times_the_length_and_hold_the_length():
    assert log_marks(20) == [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
    assert log_marks(7, (1, 10)) == [0, 1, 2, 5, 7, 10, 20, 50, 70]
    assert log_marks(3, (1,), (1,)) == [0, 1, 3]


def test_diagnostics_are_of_the_chain_at_each_mark(generator):
    sgld = SGLDConfig(step_size=0.1, noise_scale=0.05)
    start, marks = 3 * torch.randn(4, 1, 2, 3, generator=generator), [0, 1, 4]
    steps = []
    found = chain_diagnostics(quadratic(2.0), start, marks, sgld, seeded(), steps.append)
    x, positions, draws = start, [start], seeded()
    for _ in range(4):
        x, _ = sgld_step(quadratic(2.0), x, sgld, draws)
        positions.append(x)
    at = [positions[mark].flatten(1).double() for mark in marks]
    expected = {
        "energy": torch.stack([p.square().sum(1) for p in at], 1),
        "grad_norm": torch.stack([2 * p.norm(dim=1) for p in at], 1),
        "saturation": torch.stack([(p.abs() >= 2).double().mean(1) for p in at], 1),
    }
    assert tuple(found) == DIAGNOSTICS
    assert steps == [1, 2, 3, 4]
    assert 0 < found["saturation"].mean() < 1
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-5, rtol=1e-5)


def test_acceptance_is_looked_at_at_the_chains_own_temperature_and_at_1(generator):
    """Noise^2 / (2 step_size) = 0.2^2 / 0.1 = 0.4; each chance is the mean over 8 proposals of a stream of its own."""
    sgld, x = SGLDConfig(step_size=0.05, noise_scale=0.2), torch.randn(9, 5, generator=generator)
    found = chain_diagnostics(double_well, x, [0], sgld, seeded(7))
    draws = stream("cpu", 7, "acceptance")
    own, one = acceptance(double_well, x, (0.4, 1.0), sgld, draws, proposals=8)
    torch.testing.assert_close(found["acceptance_own"][:, 0], own)
    torch.testing.assert_close(found["acceptance_one"][:, 0], one)
    assert not torch.equal(own, one)


def test_looking_changes_no_chain(generator):
    """The last position is the same, however often it was looked at before."""
    sgld, start = SGLDConfig(step_size=0.1, noise_scale=0.05), torch.randn(4, 6, generator=generator)
    often = chain_diagnostics(quadratic(), start, [0, 1, 2, 3, 9], sgld, seeded())
    once = chain_diagnostics(quadratic(), start, [9], sgld, seeded())
    assert torch.equal(often["energy"][:, -1:], once["energy"])
    assert not torch.equal(often["energy"][:, -1], often["energy"][:, -2])


def test_saturation_is_counted_from_the_clamp(generator):
    start = torch.tensor([[1.0, -1.0, 0.99, 0.0]])
    for clamp, share in ((1.0, 0.5), (None, 0.0)):
        found = chain_diagnostics(quadratic(), start, [0], SGLDConfig(clamp=clamp), generator)
        assert found["saturation"].item() == share


@pytest.mark.parametrize("marks", [[], [0, 0], [5, 2], [-1, 3]])
def test_marks_that_do_not_rise_are_refused(marks, generator):
    with pytest.raises(ValueError, match="must be numbers of steps that rise"):
        chain_diagnostics(quadratic(), torch.zeros(1, 2), marks, SGLDConfig(), generator)


# Metropolis


def double_well(x):
    return (x.square() - 1).square().sum(dim=1)


def by_hand(x, noise, sgld, temperature):
    """The Metropolis-Hastings ratio of one chain and one move, as numbers; E = sum (x_i^2 - 1)^2."""

    def gradient(v):
        g = [4 * u * (u * u - 1) for u in v]
        c = sgld.gradient_clamp
        return [max(-c, min(c, u)) for u in g] if c else g

    def log_normal(v, mean):
        return sum(-((a - m) ** 2) / (2 * sgld.noise_scale**2) for a, m in zip(v, mean, strict=True))

    def drifted(v):
        return [u - sgld.step_size * g for u, g in zip(v, gradient(v), strict=True)]

    def energy(v):
        return sum((u * u - 1) ** 2 for u in v)

    there = [m + sgld.noise_scale * e for m, e in zip(drifted(x), noise, strict=True)]
    log_ratio = (
        -(energy(there) - energy(x)) / temperature + log_normal(x, drifted(there)) - log_normal(there, drifted(x))
    )
    return math.exp(min(0.0, log_ratio))


@pytest.mark.parametrize("gradient_clamp", [None, 0.7])
@pytest.mark.parametrize("temperature", [0.01, 0.3, 5.0])
def test_acceptance_is_the_metropolis_hastings_ratio(temperature, gradient_clamp):
    sgld = SGLDConfig(step_size=0.05, noise_scale=0.3, gradient_clamp=gradient_clamp)
    x = torch.randn(6, 3, generator=seeded(1), dtype=torch.float64)
    draws = seeded(2)
    noise = [torch.randn(x.shape, generator=draws, dtype=x.dtype) for _ in range(5)]
    expected = [sum(by_hand(x[i].tolist(), e[i].tolist(), sgld, temperature) for e in noise) / 5 for i in range(6)]
    (found,) = acceptance(double_well, x, (temperature,), sgld, seeded(2), proposals=5)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert 0.01 < found.mean() < 0.999


def test_moves_of_a_small_step_are_taken_at_the_chains_own_temperature_and_at_no_other(generator):
    """50 dimensions, at equilibrium: the chance falls with the step (MALA); a colder one refuses what goes up."""
    found = {}
    for step_size in (0.001, 0.1, 0.8):
        temperature = 0.3
        sgld = SGLDConfig(step_size=step_size, noise_scale=math.sqrt(2 * step_size * temperature))
        x = math.sqrt(temperature) * torch.randn(200, 50, generator=generator, dtype=torch.float64)
        found[step_size] = acceptance(quadratic(), x, (temperature, temperature / 30), sgld, generator)
    own, other = ([float(found[h][i].mean()) for h in found] for i in (0, 1))
    assert own[0] > 0.999
    assert own[0] > own[1] > own[2]
    assert own[2] < 0.5
    assert 0.4 < other[1] < 0.6


def test_acceptance_of_a_gaussian_is_as_theory_has_it(generator):
    """E = x^2 / 2 in one dimension, from x: the ratio's logarithm is -h/(4T) (x'^2 - x^2) for s^2 = 2 h T."""
    h, temperature = 0.5, 0.4
    sgld = SGLDConfig(step_size=h, noise_scale=math.sqrt(2 * h * temperature))
    x = torch.full((40_000, 1), 0.9, dtype=torch.float64)
    moved = 0.9 * (1 - h) + sgld.noise_scale * torch.randn(400_000, generator=generator, dtype=torch.float64)
    chance = (-h / (4 * temperature) * (moved.square() - 0.81)).clamp(max=0).exp()
    (found,) = acceptance(quadratic(), x, (temperature,), sgld, generator, proposals=4)
    error = float(chance.std()) / math.sqrt(160_000) + float(chance.std()) / math.sqrt(400_000)
    assert abs(found.mean() - chance.mean()) < 4 * error


def test_float32_chains_have_the_acceptance_of_float64_at_the_papers_temperature():
    """5e-5: differences of energies are divided by little, and the noise is 0.01. Over 400 moves of 30 chains."""
    x = 1e-2 * torch.randn(30, 64, generator=seeded(1))
    means = []
    for positions, seed in ((x, 2), (x.double(), 3)):
        found = acceptance(lambda z: 3 + quadratic(0.3)(z), positions, (5e-5,), SGLDConfig(), seeded(seed), 400)
        means.append(found[0])
    assert 0.2 < means[1].mean() < 0.9
    assert abs(means[0].mean() - means[1].mean()) < 4 * math.sqrt(2 * 0.25 / (400 * 30))


def test_a_chain_without_noise_has_no_acceptance():
    found = chain_diagnostics(quadratic(), torch.ones(2, 3), [0, 1], SGLDConfig(noise_scale=0.0), seeded())
    assert found["acceptance_own"].isnan().all()
    assert found["acceptance_one"].isnan().all()
    assert found["energy"].isfinite().all()
