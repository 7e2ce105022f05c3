import re
import sys

import image_fakes as fakes
import numpy as np
import pytest
import torch

from jem.config import DataConfig
from jem.data.sources import describe, load
from jem.data.splits import DataSet, Split
from jem.errors import ConfigError, DataError

IMAGES = fakes.pixels(40, 3, 6, 6)
LABELS = np.arange(40) % 4


def mine(_config):
    return fakes.dataset()


def only_train(config):
    return {"train": (IMAGES, LABELS), "classes": [f"{config.options['word']} {c}" for c in range(4)]}


def with_test(_config):
    return {"train": (torch.from_numpy(IMAGES), LABELS.tolist()), "test": (IMAGES[:7], LABELS[:7])}


def returns(value):
    """The name of a function that returns `value`."""
    sys.modules[__name__].answer = lambda _config: value
    return DataConfig(name=f"{__name__}:answer")


def test_a_function_may_return_a_data_set():
    assert load(DataConfig(name=f"{__name__}:mine")).digest == fakes.dataset().digest
    assert len(load(DataConfig(name=f"{__name__}:mine"), ("test",)).train) == 0


def test_a_function_may_return_train_alone_and_reads_its_options():
    data = load(DataConfig(name=f"{__name__}:only_train", options={"word": "kind"}, validation_size=4))
    assert [len(split) for split in data.splits.values()] == [28, 4, 8]
    assert data.classes == ("kind 0", "kind 1", "kind 2", "kind 3")


def test_arrays_may_lie_in_any_order_of_axes_and_bytes():
    """BGR made RGB, labels of a file from another machine."""
    first = load(returns({"train": (IMAGES[:, ::-1], LABELS.astype(">i4"))}))
    plain = load(returns({"train": (IMAGES[:, ::-1].copy(), LABELS)}))
    assert first.digest == plain.digest


@pytest.mark.parametrize("labels", [[[0], [0, 1]], None])
def test_what_is_no_array_is_named(labels):
    with pytest.raises(DataError, match=r"split train: labels (cannot be made a tensor|are)"):
        load(returns({"train": (IMAGES, labels)}))


def test_classes_default_to_the_label_numbers():
    data = load(DataConfig(name=f"{__name__}:with_test"))
    assert data.classes == ("0", "1", "2", "3")
    assert len(data.test) == 7


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned NoneType, must return a DataSet or a mapping"),
        ({"test": (IMAGES, LABELS)}, "returned no split 'train'"),
        ({"train": (IMAGES, LABELS), "dev": 1}, "returned the key 'dev'; known are train, validation, test, classes"),
        ({"train": IMAGES}, "split train: is ndarray, must be a pair"),
        ({"train": (IMAGES / 255, LABELS)}, "images are torch.float64 of shape [40, 3, 6, 6], must be torch.uint8"),
        ({"train": (IMAGES[0], LABELS)}, "of shape [3, 6, 6], must be"),
        ({"train": (IMAGES, LABELS + 0.5)}, "labels are torch.float64, must be integers"),
        ({"train": (IMAGES, LABELS[:5])}, "labels are [5], must be [40]"),
        ({"train": (IMAGES[:0], LABELS[:0])}, "split train: is empty"),
        ({"train": (IMAGES, LABELS), "classes": "abc"}, "label 3 is out of range, must be 0 to 2"),
        ({"train": (IMAGES, LABELS - 1)}, "label -1 is out of range"),
        (
            {"train": (IMAGES, LABELS), "test": (IMAGES[:, :1], LABELS)},
            "images are [1, 6, 6], those of train [3, 6, 6]",
        ),
    ],
)
def test_what_a_function_returns_is_checked(value, message):
    with pytest.raises(DataError, match=re.escape(message)):
        load(returns(value))


def test_a_data_set_that_a_function_returns_is_checked():
    good = fakes.dataset()
    bad = DataSet("bad", good.train, Split(good.test.images, good.test.labels + 9), good.test, good.classes)
    with pytest.raises(DataError, match=r"data.name=.*:answer: split validation: row 0: label 9 is out of range"):
        load(returns(bad))


@pytest.mark.parametrize("name", ["no_such_module:f", f"{__name__}:no_such_function"])
def test_a_function_that_is_not_found_is_a_mistake_of_the_configuration(name):
    with pytest.raises(ConfigError, match=r"data.name: is .*no_such"):
        load(DataConfig(name=name))
    assert describe(DataConfig(name=name)).where == f"made by the function {name}"
