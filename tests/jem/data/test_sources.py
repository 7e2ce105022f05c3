import re
import subprocess
import sys
import textwrap

import image_fakes as fakes
import pytest
import torch

from jem.config import DataConfig
from jem.data.catalog import DEBIAN_FASHION_MNIST
from jem.data.sources import describe, load
from jem.data.splits import DataSet, Split, check
from jem.errors import ConfigError, DataError

EMBEDDED = {
    "digits": "7d78cc0407301ceef3d341e66495c678cd70ee84cf96068d2e9b7678919a80a8",
    "mnist5k": "31dc90b268ef404e7d5768cf944d522570c3232c42a81a3e9ae7d0b56bc88a22",
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sources_are_the_same_images_in_the_same_splits_on_every_machine(name):
    assert load(DataConfig(name=name)).digest == EMBEDDED[name]


def test_digits_span_the_whole_range_of_a_byte():
    images = load(DataConfig(name="digits")).train.images
    assert images.min() == 0
    assert images.max() == 255
    assert len(images.unique()) == 17


@pytest.mark.parametrize("name", EMBEDDED)
def test_description_agrees_with_what_is_loaded(name):
    config = DataConfig(name=name, validation_size=77)
    spec, data = describe(config), load(config)
    assert spec.image_shape == data.image_shape
    assert spec.n_classes == data.n_classes
    assert spec.sizes == {split: len(part) for split, part in data.splits.items()}


def test_splits_share_no_image():
    data = load(DataConfig(name="mnist5k"))
    seen = [{image.numpy().tobytes() for image in split.images} for split in data.splits.values()]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_the_default_validation_split_is_a_tenth_of_train():
    data = load(DataConfig(name="mnist5k"))
    assert [len(split) for split in data.splits.values()] == [3600, 400, 1000]
    assert data.test.labels.bincount().tolist() == [100] * 10


def test_a_split_that_is_not_asked_for_is_empty_and_the_others_are_the_same():
    data = load(DataConfig(name="digits"), splits=("test",))
    assert [len(split) for split in data.splits.values()] == [0, 0, 360]
    assert data.image_shape == (1, 8, 8)
    assert data.test.digest == load(DataConfig(name="digits")).test.digest


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_comes_from_debians_package(tmp_path):
    config = DataConfig(name="fashion_mnist", root=str(tmp_path), download=False)
    data = load(config)
    assert [len(split) for split in data.splits.values()] == [55_000, 5_000, 10_000]
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.classes[data.test.labels[0]] == "Ankle boot"
    assert data.digest == "a77e61863df672e140f8d5f4bb8dc1e591a4df5e7733432e04b30910987784c0"
    assert describe(config).sizes == {split: len(part) for split, part in data.splits.items()}
    assert "dataset-fashion-mnist" in describe(config).where


def test_describing_imports_no_torch(tmp_path):
    fakes.folder(tmp_path / "f", {"a": 5, "b": 5})
    code = f"""
        import sys
        from jem.config import DataConfig
        from jem.data.catalog import describe
        for config in (DataConfig(), DataConfig(name="digits"), DataConfig(name="imagefolder", root="{tmp_path}/f")):
            describe(config)
        assert describe(DataConfig(name="parquet", root="{tmp_path}/p")).where.endswith("(missing)")
        assert not {{"torch", "torchvision", "sklearn", "ray", "mlflow"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("fashion_mnist", {"image_size": 32}, "data.image_size: is 32, which data.name=fashion_mnist"),
        ("cifar10", {"channels": 1}, "data.channels: is 1"),
        ("celeba", {"channels": 1}, "data.channels: is 1"),
        ("celeba", {"validation_size": 7}, "data.validation_size: is 7"),
        ("parquet", {"validation_size": 7, "root": "/data"}, "data.validation_size: is 7"),
    ],
)
def test_settings_that_a_source_does_not_read_are_mistakes(name, changes, key):
    with pytest.raises(ConfigError, match=f"^{key}.* does not read"):
        describe(DataConfig(name=name, **changes))


def test_an_option_that_nobody_reads_is_a_mistake():
    with pytest.raises(ConfigError, match=r"data.options.colour: data.name=digits has no such option"):
        load(DataConfig(name="digits", options={"colour": 1}))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 1, 8, 8), None, "torch.float32 of shape [4, 1, 8, 8], must be torch.uint8"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), None, "of shape [4, 8, 8], must be"),
        (None, torch.zeros(4), "labels are torch.float32"),
        (None, torch.zeros(3, dtype=torch.int64), "of shape [3], must be torch.int64 of shape [4]"),
        (None, torch.tensor([0, 1, 4, 0]), "row 2: label 4 is out of range, must be 0 to 3"),
        (None, torch.tensor([0, 1, 2, -1]), "row 3: label -1 is out of range"),
        (torch.zeros(4, 1, 9, 8, dtype=torch.uint8), None, "images are [1, 9, 8], those of train [1, 8, 8]"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "is empty"),
    ],
)
def test_the_check_names_source_split_and_what_is_wrong(images, labels, message):
    good = fakes.dataset(8)
    bad = Split(good.test.images if images is None else images, good.test.labels if labels is None else labels)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        check(DataSet("x", good.train, good.validation, bad, good.classes), "data.name=x")
    assert str(caught.value).startswith("data.name=x: split test: ")


def test_a_digest_changes_with_a_pixel_a_label_and_the_shape():
    split = fakes.dataset().train
    pixel, label = split.images.clone(), split.labels.clone()
    pixel[3, 0, 2, 1] ^= 1
    label[5] ^= 1
    others = [
        Split(pixel, split.labels),
        Split(split.images, label),
        Split(split.images.reshape(-1, 1, 4, 16), split.labels),
    ]
    assert len({part.digest for part in (split, *others)}) == 4
    assert Split(split.images.clone(), split.labels.clone()).digest == split.digest


def test_of_a_strided_split_the_digest_is_that_of_its_values():
    split = fakes.dataset().train
    strided = Split(split.images.to(memory_format=torch.channels_last).transpose(2, 3), split.labels)
    assert strided.digest == Split(strided.images.contiguous(), split.labels).digest
