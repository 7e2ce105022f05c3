import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from jem.errors import DivergedError
from jem.evaluate import classification
from jem.evaluate.classification import (
    accuracy,
    brier,
    confusion_matrix,
    nll,
    per_class,
    per_class_intervals,
    with_intervals,
)


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


FOUR = logits_of([0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.45, 0.55])
LABELS = torch.tensor([0, 0, 0, 1])


def test_accuracy_and_nll_worked_out_by_hand():
    assert accuracy(FOUR, LABELS) == 0.75
    by_hand = -(math.log(0.9) + math.log(0.2) + math.log(0.7) + math.log(0.55)) / 4
    assert nll(FOUR, LABELS) == pytest.approx(by_hand)
    assert nll(FOUR + 300, LABELS) == pytest.approx(by_hand)


def test_nll_of_a_confident_mistake_is_the_gap_of_the_logits_and_not_infinite():
    assert nll(torch.tensor([[200.0, 0.0]]), torch.tensor([1])) == pytest.approx(200)


def test_brier_worked_out_by_hand_is_over_all_classes_and_2_at_worst():
    by_hand = (2 * 0.1**2 + 2 * 0.8**2 + 2 * 0.3**2 + 2 * 0.45**2) / 4
    assert brier(FOUR, LABELS) == pytest.approx(by_hand)
    assert brier(FOUR + 20, LABELS) == pytest.approx(by_hand)
    certain = torch.tensor([[800.0, 0.0, 0.0]])
    assert brier(certain, torch.tensor([1])) == 2
    assert brier(certain, torch.tensor([0])) == 0


PREDICTIONS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12)


@given(PREDICTIONS)
def test_confusion_and_per_class_figures_are_those_of_scikit_learn_down_to_one_image(pairs):
    labels, predicted = (torch.tensor(part) for part in zip(*pairs, strict=True))
    logits = 3.0 * torch.nn.functional.one_hot(predicted, 4) + 20
    confusion = confusion_matrix(logits, labels)
    classes = range(4)
    assert confusion.tolist() == metrics.confusion_matrix(labels, predicted, labels=classes).tolist()
    found = per_class(confusion)
    oracle = metrics.precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=math.nan)
    for ours, theirs in zip((found.precision, found.recall, found.f1, found.support), oracle, strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(theirs).double(), equal_nan=True)
    for y in classes:
        one_against_rest = metrics.accuracy_score(labels == y, predicted == y)
        assert found.accuracy[y].item() == pytest.approx(one_against_rest)


@pytest.mark.parametrize("n", [1, 2, 5, 200])
def test_accuracy_nll_and_brier_are_those_of_scikit_learn(n, generator):
    logits = 20 + 3 * torch.randn(n, 4, generator=generator)
    labels = torch.randint(4, (n,), generator=generator)
    p = logits.double().softmax(dim=1).numpy()
    classes = [0, 1, 2, 3]
    assert accuracy(logits, labels) == pytest.approx(metrics.accuracy_score(labels, p.argmax(axis=1)))
    assert nll(logits, labels) == pytest.approx(metrics.log_loss(labels, p, labels=classes))
    theirs = metrics.brier_score_loss(labels, p, labels=classes, scale_by_half=False)
    assert brier(logits, labels) == pytest.approx(theirs)


def test_an_interval_holds_the_figure_and_is_as_wide_as_the_binomial_says(generator):
    n = 400
    labels = torch.zeros(n, dtype=torch.int64)
    logits = torch.tensor([1.0, 0.0]).repeat(n, 1)
    logits[:80] = torch.tensor([0.0, 1.0])
    found = with_intervals(logits, labels, generator)
    value, low, high = found["accuracy"]
    assert value == accuracy(logits, labels) == 0.8
    standard_error = math.sqrt(0.8 * 0.2 / n)
    assert low == pytest.approx(0.8 - 1.96 * standard_error, abs=0.2 * standard_error)
    assert high == pytest.approx(0.8 + 1.96 * standard_error, abs=0.2 * standard_error)
    assert found["nll"].value == nll(logits, labels)
    assert found["brier"].value == brier(logits, labels)


def test_per_class_intervals_are_those_of_the_resampled_confusion_matrices(generator):
    logits = torch.randn(60, 3, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    found = per_class_intervals(logits, labels, torch.Generator().manual_seed(1))
    assert list(found) == ["accuracy", "precision", "recall", "f1"]
    counts = classification.bootstrap(lambda counts: counts, (60,), torch.Generator().manual_seed(1)).long()
    rows = [torch.arange(60).repeat_interleave(c) for c in counts]
    f1 = torch.stack([per_class(confusion_matrix(logits[r], labels[r])).f1 for r in rows])
    for y, (value, low, high) in enumerate(found["f1"]):
        assert value == pytest.approx(per_class(confusion_matrix(logits, labels)).f1[y].item())
        assert [low, high] == pytest.approx(f1[:, y].quantile(torch.tensor([0.025, 0.975]).double()).tolist())


def test_a_class_without_images_has_no_recall_and_the_others_do(generator):
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = per_class_intervals(logits, torch.tensor([0, 1]), generator)
    assert [recall.value for recall in found["recall"][:2]] == [1, 1]
    assert all(math.isnan(figure) for figure in found["recall"][2])


def test_nan_is_refused():
    bad, label = torch.tensor([[math.nan, 0.0]]), torch.tensor([0])
    for figure in (brier, confusion_matrix):
        with pytest.raises(DivergedError, match="NaN"):
            figure(bad, label)
    with pytest.raises(DivergedError, match="earlier checkpoint"):
        with_intervals(bad, label, torch.Generator())
