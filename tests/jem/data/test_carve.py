import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jem.data.carve import carve
from jem.errors import ConfigError, DataError


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_parts_are_disjoint_cover_all_and_have_the_size_asked_for(data):
    n_classes = data.draw(st.integers(1, 5))
    labels = np.array(data.draw(st.lists(st.integers(0, n_classes - 1), min_size=2 * n_classes, max_size=60)))
    most = len(labels) - len(np.unique(labels))
    size = data.draw(st.integers(1, most))
    rest, taken = carve(labels, np.arange(len(labels)), size, "validation")
    assert len(taken) == size
    assert sorted([*rest, *taken]) == list(range(len(labels)))
    assert set(labels[rest]) == set(labels)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(20, 200), min_size=2, max_size=5), st.integers(10, 100))
def test_each_class_gives_its_share_to_within_one_image(counts, percent):
    labels = np.repeat(np.arange(len(counts)), counts)
    size = max(1, len(labels) * percent // 250)
    _, taken = carve(labels, np.arange(len(labels)), size, "validation")
    assert np.all(np.abs(np.bincount(labels[taken], minlength=len(counts)) - size * np.array(counts) / len(labels)) < 1)


def test_membership_is_that_of_the_hash_written_down_here():
    """A change of this list moves images between training and validation of everyone's runs."""
    _, taken = carve(np.arange(40) % 2, np.arange(40), 6, "validation")
    assert taken.tolist() == GOLDEN


def test_the_two_purposes_choose_independently():
    labels = np.zeros(1000, dtype=np.int64)
    first, second = (set(carve(labels, np.arange(1000), 500, p)[1].tolist()) for p in ("test", "validation"))
    # hypergeometric: mean 250, variance 500 * .5 * .5 * 500 / 999
    assert abs(len(first & second) - 250) < 4 * (500 * 0.25 * 500 / 999) ** 0.5


def test_a_validation_size_that_empties_a_class_is_a_mistake_of_the_configuration():
    with pytest.raises(ConfigError, match=r"data.validation_size: is 9, must be 1 to 8"):
        carve(np.arange(10) % 2, np.arange(10), 9, "validation")


def test_one_image_a_class_cannot_be_split():
    with pytest.raises(DataError, match="2 images of 2 classes are too few"):
        carve(np.arange(2), np.arange(2), 1, "validation")


GOLDEN = [4, 11, 13, 20, 36, 37]
