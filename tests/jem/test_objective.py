import math

import pytest
import torch

from jem.config import ObjectiveConfig
from jem.energy import energy_fn
from jem.objective import Counts, class_pool, contrastive_loss, detection, gradient_norms, jem_loss
from jem.world import World

WEIGHTS = {"p_y_given_x_weight": 0.7, "p_x_weight": 1.3, "p_x_y_weight": 0.4, "energy_l2": 0.2}
OFF = dict.fromkeys(WEIGHTS, 0.0)
TERMS = [OFF | {name: WEIGHTS[name]} for name in ("p_y_given_x_weight", "p_x_weight", "p_x_y_weight")]
TERMS += [OFF | {name: WEIGHTS[name] for name in ("p_y_given_x_weight", "energy_l2")}]  # alone it is no objective
C, FEATURES, DATA, SAMPLES, LABELLED = 4, 6, 5, 3, 2


@pytest.fixture
def problem(generator):
    """Features of data, samples and labelled images, their labels, and the weights W of logits = features W^T."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def labels(n):
        return torch.randint(C, (n,), generator=generator)

    return (
        normal(DATA, FEATURES),
        normal(SAMPLES, FEATURES),
        normal(LABELLED, FEATURES),
        labels(LABELLED),
        labels(SAMPLES),
        normal(C, FEATURES),
    )


def loss_of(problem, weights, rows=(slice(None),) * 3):
    data, samples, labelled, labels, sample_labels, w = problem
    a, b, c = rows
    logits = (data[a] @ w.T, samples[b] @ w.T, labelled[c] @ w.T)
    counts = Counts(DATA, SAMPLES, LABELLED)
    return jem_loss(*logits, labels[c], sample_labels[b], ObjectiveConfig(**weights), counts)


def gradient_by_hand(problem, weights):
    """With logits W phi: dE(x)/dW_y = -p(y|x) phi, dE(x, y')/dW_y = -[y = y'] phi."""
    data, samples, labelled, labels, sample_labels, w = problem

    def p(features):
        return (features @ w.T).softmax(dim=1)

    def e(features):
        return -(features @ w.T).exp().sum(dim=1).log()[:, None]

    def hot(labels):
        return torch.nn.functional.one_hot(labels, C).double()

    cross_entropy = (p(labelled) - hot(labels)).T @ labelled / LABELLED
    p_x = -p(data).T @ data / DATA + p(samples).T @ samples / SAMPLES
    p_x_y = -hot(labels).T @ labelled / LABELLED + hot(sample_labels).T @ samples / SAMPLES
    l2 = -(2 * e(data) * p(data)).T @ data / DATA - (2 * e(samples) * p(samples)).T @ samples / SAMPLES
    terms = dict(zip(WEIGHTS, (cross_entropy, p_x, p_x_y, l2), strict=True))
    return sum(weights[name] * term for name, term in terms.items())


@pytest.mark.parametrize("weights", [*TERMS, WEIGHTS], ids=[*WEIGHTS, "all"])
def test_gradient_of_each_weighted_term_is_the_one_derived_by_hand(problem, weights):
    problem[-1].requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(problem, weights).total, problem[-1])
    expected = gradient_by_hand([t.detach() for t in problem], weights)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_loss_is_the_weighted_sum_worked_out_by_hand():
    """Data with exp f = (1, 3) and (5, 1), labels 1, 1; one sample with exp f = (1, 1), of class 0."""
    data = torch.tensor([[1.0, 3.0], [5.0, 1.0]], dtype=torch.float64).log()
    samples, labels, of_class = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1, 1]), torch.tensor([0])
    loss = jem_loss(data, samples, data, labels, of_class, ObjectiveConfig(**WEIGHTS), Counts(2, 1, 2))
    cross_entropy = -(math.log(3 / 4) + math.log(1 / 6)) / 2
    energy_data, energy_samples = -(math.log(4) + math.log(6)) / 2, -math.log(2)
    joint_gap = -(math.log(3) + math.log(1)) / 2 - 0
    squares = (math.log(4) ** 2 + math.log(6) ** 2) / 2 + math.log(2) ** 2
    total = 0.7 * cross_entropy + 1.3 * (energy_data - energy_samples) + 0.4 * joint_gap + 0.2 * squares
    assert [t.item() for t in loss] == pytest.approx([total, cross_entropy, energy_data, energy_samples, 0.5, 0])


def test_defaults_are_the_papers_weights(problem):
    loss = loss_of(problem, {})
    torch.testing.assert_close(loss.total, loss.cross_entropy + loss.energy_data - loss.energy_samples)


@pytest.mark.parametrize("weights", [*TERMS, WEIGHTS], ids=[*WEIGHTS, "all"])
def test_ranks_parts_sum_to_the_whole_however_uneven_and_though_one_has_no_labelled_rows(problem, weights):
    whole = loss_of(problem, weights)
    first = (slice(0, 1), slice(0, 2), slice(0, 0))
    second = (slice(1, None), slice(2, None), slice(0, None))
    parts = [loss_of(problem, weights, rows) for rows in (first, second)]
    for name in whole._fields:
        torch.testing.assert_close(getattr(parts[0], name) + getattr(parts[1], name), getattr(whole, name))


def test_a_rank_without_labelled_rows_contributes_a_loss_that_can_be_differentiated(problem):
    problem[-1].requires_grad_(True)
    loss = loss_of(problem, TERMS[0], (slice(0, 2), slice(0, 2), slice(0, 0)))
    (gradient,) = torch.autograd.grad(loss.total, problem[-1])
    assert loss.total == 0
    assert gradient.abs().max() == 0


def test_the_kl_term_is_a_mean_over_its_chains_wherever_they_are(problem):
    data, samples, labelled, labels, sample_labels, w = problem
    logits, config = [features @ w.T for features in (data, samples, labelled)], ObjectiveConfig(kl_weight=0.3)
    without = loss_of(problem, {})
    energies, counts = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64), Counts(DATA, SAMPLES, LABELLED, 3)
    whole = jem_loss(*logits, labels, sample_labels, config, counts, energy_kl=energies)
    torch.testing.assert_close(whole.total, without.total + 0.3 * 3)
    assert whole.kl == 3
    parts = [jem_loss(*logits, labels, sample_labels, config, counts, energy_kl=e) for e in energies.split([2, 1])]
    torch.testing.assert_close(parts[0].kl + parts[1].kl, whole.kl)
    none = jem_loss(*logits, labels, sample_labels, config, counts, energy_kl=energies[:0])
    torch.testing.assert_close(none.total, without.total)


def test_semi_supervised_cross_entropy_is_a_mean_over_the_labelled_and_the_gap_over_all(problem):
    """Unlabelled images twice over change nothing; the labels' weight does not depend on their number."""
    data, samples, labelled, labels, sample_labels, w = problem
    logits = [features @ w.T for features in (data, samples, labelled)]
    once = jem_loss(*logits, labels, sample_labels, ObjectiveConfig(), Counts(DATA, SAMPLES, LABELLED))
    twice = jem_loss(
        logits[0].repeat(2, 1),
        *logits[1:],
        labels,
        sample_labels,
        ObjectiveConfig(),
        Counts(2 * DATA, SAMPLES, LABELLED),
    )
    torch.testing.assert_close(once, twice)


def test_a_classifiers_loss_has_no_term_of_samples(problem):
    data, _, _, _, _, w = problem
    none = torch.zeros(0, C, dtype=torch.float64)
    labels, no_labels = torch.tensor([0, 1, 2, 3, 0]), torch.zeros(0, dtype=torch.int64)
    loss = jem_loss(
        data @ w.T, none, data @ w.T, labels, no_labels, ObjectiveConfig(p_x_weight=0.0), Counts(DATA, 0, DATA)
    )
    torch.testing.assert_close(loss.total, torch.nn.functional.cross_entropy(data @ w.T, labels))
    assert loss.energy_samples == 0


# Without SGLD's samples, or without chains


def test_the_least_of_dats_loss_is_at_the_log_ratio_of_the_densities():
    """Of p and q over four states: E = log q - log p, and there the loss is 2 log 2 less twice their JS divergence."""
    p, q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.4, 0.1]], dtype=torch.float64)
    energies = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def loss(e):
        of_data, of_samples = detection(e, e)
        return (p * of_data).sum() + (q * of_samples).sum()

    optimizer = torch.optim.LBFGS([energies], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = loss(energies)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(energies.detach(), q.log() - p.log(), atol=1e-5, rtol=0)
    middle = (p + q) / 2
    js = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    assert math.isclose(loss(energies).item(), 2 * math.log(2) - 2 * js.item(), abs_tol=1e-9)


def test_dats_gradient_is_that_of_the_gap_with_every_image_weighed_by_how_far_it_is_from_told_apart(problem):
    problem[-1].requires_grad_(True)
    weights = OFF | {"p_x_weight": 1.3}
    found = loss_of(problem, weights | {"p_x_loss": "bce"}).total
    (gradient,) = torch.autograd.grad(found, problem[-1])
    data, samples, *_, w = [t.detach() for t in problem]
    sure = [torch.sigmoid(sign * -(x @ w.T).logsumexp(dim=1))[:, None] for x, sign in ((data, 1), (samples, -1))]
    of_data, of_samples = (
        (s * (x @ w.T).softmax(dim=1)).T @ x / len(x) for s, x in zip(sure, (data, samples), strict=True)
    )
    torch.testing.assert_close(gradient, 1.3 * (of_samples - of_data), atol=1e-12, rtol=0)


def test_the_norm_of_a_gaussians_score_is_the_distance_from_its_mean_over_its_variance(generator):
    """E(x) = |x - m|^2 / (2 v), so that ||d log p/dx|| = |x - m| / v, and its derivative in v is -|x - m| / v^2."""
    x = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)
    v = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    norms = gradient_norms(lambda z: (z - 0.3).square().flatten(1).sum(dim=1) / (2 * v), x)
    distances = (x - 0.3).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms.detach(), distances / v.detach())
    (slope,) = torch.autograd.grad(norms.sum(), v)
    torch.testing.assert_close(slope, -distances.sum() / v.detach() ** 2)


def test_the_approximate_mass_is_a_term_of_the_loss_whose_gradient_is_that_of_finite_differences(generator):
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, C)).double()
    x = torch.randn(DATA, 5, generator=generator, dtype=torch.float64)
    logits, labels, none = net(x).detach(), torch.zeros(DATA, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)

    def loss():
        mass = gradient_norms(energy_fn(net), x)
        config = ObjectiveConfig(p_x_weight=0, mass_weight=0.6)
        return jem_loss(logits, logits[:0], logits, labels, none, config, Counts(DATA, 0, DATA), mass=mass).total

    torch.autograd.backward(loss())
    for parameter in net.parameters():
        flat = parameter.detach().view(-1)
        for i in range(0, len(flat), 3):
            at = flat[i].item()
            ends = []
            for there in (at + 1e-5, at - 1e-5):
                flat[i] = there
                ends.append(loss().item())
            flat[i] = at
            gradient = 0.0 if parameter.grad is None else parameter.grad.view(-1)[i].item()
            assert math.isclose((ends[0] - ends[1]) / 2e-5, gradient, abs_tol=1e-8)


def test_the_contrastive_loss_is_that_of_a_softmax_over_the_images(generator):
    logits = torch.randn(LABELLED + DATA, C, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(C, (LABELLED + DATA,), generator=generator)
    found = contrastive_loss(logits, labels, class_pool(logits, labels, World()))
    expected = -logits.log_softmax(dim=0).gather(1, labels[:, None]).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)))


@pytest.mark.parametrize("far", [-3000.0, 0.0, 3000.0])
def test_a_pool_holds_logits_of_any_size(far, generator):
    logits = far + torch.randn(DATA, C, generator=generator, dtype=torch.float64)
    pool = class_pool(logits, torch.zeros(DATA, dtype=torch.int64), World())
    torch.testing.assert_close(pool.log_sum, logits.logsumexp(dim=0))
    assert pool.labelled.tolist() == [DATA, 0, 0, 0]


def test_the_contrastive_loss_does_not_care_for_what_is_added_to_a_class_everywhere(generator):
    """It is p(x|y): how likely y is, is left to cross-entropy."""
    logits = torch.randn(DATA, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(C, (DATA,), generator=generator)
    more = logits + torch.tensor([3.0, -2.0, 0.5, 7.0], dtype=torch.float64)
    one, other = (contrastive_loss(f, labels, class_pool(f, labels, World())) for f in (logits, more))
    torch.testing.assert_close(one, other)
