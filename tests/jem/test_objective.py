import math

import pytest
import torch

from jem.config import ObjectiveConfig
from jem.objective import Counts, jem_loss

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
