import importlib
import sys

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn

from jem.config import ModelConfig
from jem.errors import ConfigError, DataError
from jem.evaluate import baselines
from jem.evaluate.ood import auroc
from jem.evaluate.scores import log_px, max_py
from jem.models import make_network


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.SiLU(), nn.Linear(12, 3))


@pytest.fixture
def images(generator):
    return torch.randn(80, 1, 4, 4, generator=generator)


@pytest.fixture
def labels():
    return torch.arange(80) % 3


@torch.no_grad()
def features_of(network, images):
    return baselines.features(network)(images)


def test_energy_is_log_px_by_another_name_and_msp_has_the_order_of_max_py(network, images):
    logits = network(images).detach()
    torch.testing.assert_close(baselines.energy(logits), log_px(logits.double()))
    torch.testing.assert_close(baselines.msp(logits).log(), max_py(logits))


def test_features_are_what_the_head_makes_into_logits(network, images):
    z = features_of(network, images)
    assert z.shape == (80, 12)
    torch.testing.assert_close(baselines.head(network)(z), network(images))
    assert not baselines.head(network)._forward_hooks


@pytest.mark.parametrize("config", [ModelConfig(), ModelConfig(name="wide_resnet", depth=10, width=1)])
def test_our_networks_have_features(config, generator):
    network = make_network(config, (1, 8, 8), 5)
    images = torch.randn(4, 1, 8, 8, generator=generator)
    torch.testing.assert_close(baselines.head(network)(features_of(network, images)), network(images))


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Softmax(dim=1)),
        nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()),
    ],
)
def test_a_network_that_does_not_end_in_a_linear_layer_is_refused(network, images):
    with pytest.raises(ConfigError, match="linear layer"):
        features_of(network, images)


def test_odin_is_the_papers_formula(network, images):
    x = images.double().requires_grad_(True)
    network = network.double()
    log_p = (network(x) / 1000).log_softmax(dim=1).amax(dim=1)
    (gradient,) = torch.autograd.grad(-log_p.sum(), x)
    moved = x.detach() - 0.0028 * gradient.sign()
    expected = (network(moved) / 1000).softmax(dim=1).amax(dim=1).detach()
    found = baselines.odin(network, images.double())
    torch.testing.assert_close(found, expected)
    assert len(found.unique()) == 80  # no ties, though all are near 1 / 3
    with torch.no_grad():
        torch.testing.assert_close(baselines.odin(network, images.double()), expected)
    assert all(p.grad is None for p in network.parameters())


def test_mahalanobis_is_the_distance_to_the_nearest_mean_in_float64(network, images, labels, generator):
    train = features_of(network, images)
    test = features_of(network, torch.randn(30, 1, 4, 4, generator=generator))
    z = train.double()
    means = torch.stack([z[labels == y].mean(dim=0) for y in range(3)])
    centred = z - means[labels]
    precision = torch.linalg.inv(centred.T @ centred / len(z))
    apart = test.double()[:, None] - means
    expected = -0.5 * torch.einsum("nki,ij,nkj->nk", apart, precision, apart).amin(dim=1)
    found = baselines.mahalanobis(train, labels)(test)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)  # the ridge
    theirs = -baselines.detectors().Mahalanobis(None).fit_features(train, labels).predict_features(test)
    torch.testing.assert_close(found / len(z), theirs.double(), rtol=1e-3, atol=0)  # of the sum of squares: a scale


def test_mahalanobis_of_redundant_features_still_finds_outliers(generator):
    """Each feature ten times over and more features than images: the covariance cannot be inverted."""
    labels = torch.arange(60) % 2
    inside = (torch.randn(120, 8, generator=generator) + 4 * (torch.arange(120) % 2)[:, None]).repeat(1, 10)
    outside = (3 * torch.randn(60, 8, generator=generator)).repeat(1, 10)
    score = baselines.mahalanobis(inside[:60], labels)
    assert score(inside).isfinite().all()
    assert auroc(score(inside[60:]), score(outside)) > 0.95


def test_mahalanobis_needs_an_image_of_each_class(network, images, labels):
    with pytest.raises(DataError, match="no training image of class 1"):
        baselines.mahalanobis(features_of(network, images), 2 * labels)


def test_vim_is_the_papers_formula(network, images, generator):
    train = features_of(network, images).double()
    test = features_of(network, torch.randn(30, 1, 4, 4, generator=generator)).double()
    weight, bias = (p.detach().double() for p in baselines.head(network).parameters())
    weight, bias = weight - weight.mean(dim=0), bias - bias.mean()
    origin = -torch.linalg.pinv(weight) @ bias
    _, _, directions = torch.linalg.svd(train - origin, full_matrices=True)
    residual = directions[6:].T  # beyond the first half of 12 dimensions

    def virtual(z):
        return ((z - origin) @ residual).norm(dim=1)

    alpha = (train @ weight.T + bias).amax(dim=1).mean() / virtual(train).mean()
    expected = (test @ weight.T + bias).logsumexp(dim=1) - alpha * virtual(test)
    found = baselines.vim(train.float(), baselines.head(network))(test.float())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_vim_does_not_depend_on_the_level_of_the_logits(network, images, generator):
    """p(y|x) does not either; of a JEM the level is log p(x), and may be below 0."""
    train, test = features_of(network, images), features_of(network, torch.randn(30, 1, 4, 4, generator=generator))
    head = baselines.head(network)
    before = baselines.vim(train, head)(test)
    with torch.no_grad():
        head.bias -= 10
    torch.testing.assert_close(baselines.vim(train, head)(test), before, rtol=1e-3, atol=1e-4)


def test_vim_takes_a_head_without_a_bias(images):
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Linear(12, 3, bias=False))
    z = features_of(network, images)
    assert baselines.vim(z, baselines.head(network))(z).isfinite().all()


def test_knn_is_the_distance_to_the_kth_neighbour_of_unit_features(network, images, generator):
    train = features_of(network, images)
    test = features_of(network, torch.randn(30, 1, 4, 4, generator=generator))
    a, b = (nn.functional.normalize(z.double()) for z in (train, test))
    expected = torch.cdist(b, a).sort(dim=1).values[:, 49]
    torch.testing.assert_close(-baselines.knn(train)(test), expected)
    distance, _ = NearestNeighbors(n_neighbors=3).fit(a.numpy()).kneighbors(b.numpy())
    torch.testing.assert_close(-baselines.knn(train, k=3)(test), torch.from_numpy(distance[:, -1]))
    with pytest.raises(DataError, match=r"49 training images, k = 50"):
        baselines.knn(train[:49])


def test_knn_searches_a_share_of_many_features_and_so_many_fewer_neighbours(network, images, generator):
    train = features_of(network, images)  # of 80
    test = features_of(network, torch.randn(30, 1, 4, 4, generator=generator))
    a, b = (nn.functional.normalize(z.double()) for z in (train[::4], test))
    expected = torch.cdist(b, a).sort(dim=1).values[:, 9]
    torch.testing.assert_close(-baselines.knn(train, k=40, most=20)(test), expected)


def test_far_features_score_low_by_every_baseline_of_features(network, images, labels, generator):
    """In-distribution near the training features, outside far off in a direction they never take."""
    train = torch.randn(80, 12, generator=generator) * torch.linspace(1, 0.01, 12) + 2
    test = torch.randn(80, 12, generator=generator) * torch.linspace(1, 0.01, 12) + 2
    far = test + torch.randn(80, 12, generator=generator)
    made = (baselines.mahalanobis(train, labels), baselines.vim(train, baselines.head(network)), baselines.knn(train))
    for score in made:
        assert auroc(score(test), score(far)) > 0.9
        assert score(test).dtype == torch.float64


def test_without_pytorch_ood_the_module_loads_and_its_scores_say_what_to_install(monkeypatch, network, images, labels):
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    module = importlib.reload(baselines)
    z = features_of(network, images)
    calls = [
        lambda: module.msp(z),
        lambda: module.energy(z),
        lambda: module.odin(network, images),
        lambda: module.vim(z, module.head(network)),
        lambda: module.knn(z),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"pip install pytorch-ood"):
            call()
