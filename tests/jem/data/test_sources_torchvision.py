import urllib.error

import image_fakes as fakes
import numpy as np
import pytest
import torch

from jem.config import DataConfig
from jem.data import catalog, vision
from jem.data.sources import describe, load
from jem.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def no_debian_package(monkeypatch, tmp_path):
    for module in (catalog, vision):
        monkeypatch.setattr(module, "DEBIAN_FASHION_MNIST", tmp_path / "debian")


def local(name, root, **changes):
    return DataConfig(name=name, root=str(root), download=False, **changes)


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_idx_files_are_read(tmp_path, name, folder):
    arrays = fakes.mnist(tmp_path / folder / "raw")
    data = load(local(name, tmp_path))
    assert [len(split) for split in data.splits.values()] == [54, 6, 30]
    assert np.array_equal(data.test.images[:, 0], arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(data.test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert data.n_classes == 10
    assert describe(local(name, tmp_path)).where == str(tmp_path / folder / "raw")


def test_debians_zipped_idx_files_are_read(tmp_path):
    arrays = fakes.mnist(tmp_path / "debian", zipped=True)
    data = load(local("fashion_mnist", tmp_path))
    assert np.array_equal(data.test.images[:, 0], arrays["t10k-images-idx3-ubyte"])


def test_torchvisions_copy_wins_over_debians(tmp_path):
    fakes.mnist(tmp_path / "debian", n=100, zipped=True)
    fakes.mnist(tmp_path / "FashionMNIST" / "raw", n=60)
    assert len(load(local("fashion_mnist", tmp_path)).test) == 30


@pytest.mark.parametrize("damage", [lambda raw: raw[:-40], lambda raw: b"<html>" + raw, lambda raw: raw[:0]])
def test_a_damaged_debian_file_is_named(tmp_path, damage):
    fakes.mnist(tmp_path / "debian", zipped=True)
    file = tmp_path / "debian" / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: cannot be read: .*install the package"):
        load(local("fashion_mnist", tmp_path))


@pytest.mark.parametrize(("name", "n_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_pickles_are_read_channels_first(tmp_path, monkeypatch, name, n_classes):
    images, labels = fakes.cifar(tmp_path, name, monkeypatch)
    data = load(local(name, tmp_path, validation_size=n_classes))
    assert data.image_shape == (3, 32, 32)
    assert data.classes == tuple(f"c{i}" for i in range(n_classes))
    assert len(data.validation) == n_classes
    both = torch.cat([data.train.images, data.validation.images]).numpy()
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in images)
    where = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert all(where[i.numpy().tobytes()] == y for i, y in zip(data.train.images, data.train.labels, strict=True))


def test_cifar_with_another_checksum_is_refused(tmp_path, monkeypatch):
    fakes.cifar(tmp_path, "cifar10", monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"is incomplete or damaged under .*: delete it, then data.download=true"):
        load(local("cifar10", tmp_path))


def test_a_short_idx_file_is_refused(tmp_path):
    fakes.mnist(tmp_path / "MNIST" / "raw")
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DataError, match="is incomplete or damaged"):
        load(local("mnist", tmp_path))


def test_svhn_counts_its_label_10_as_the_digit_0(tmp_path, monkeypatch):
    images = fakes.svhn(tmp_path, monkeypatch)
    data = load(local("svhn", tmp_path))
    assert np.array_equal(data.test.images, images)
    assert data.test.labels.tolist() == [(i % 10 + 1) % 10 for i in range(30)]


def test_celeba_is_the_middle_square_in_celebas_own_splits(tmp_path, monkeypatch):
    fakes.celeba(tmp_path, monkeypatch)
    data = load(local("celeba", tmp_path, image_size=16))
    assert [len(split) for split in data.splits.values()] == [4, 4, 4]
    assert data.classes == ("not Smiling", "Smiling")
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    levels = torch.cat([split.images.float().mean((1, 2, 3)) for split in data.splits.values()])
    assert torch.allclose(levels, 20.0 * torch.arange(12), atol=3)  # no red margin is left, but JPEG's blur


def test_celebas_classes_follow_the_attribute(tmp_path, monkeypatch):
    fakes.celeba(tmp_path, monkeypatch)
    data = load(local("celeba", tmp_path, image_size=8, options={"attribute": "Bald"}), ("train",))
    assert data.train.labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(ConfigError, match=r"data.options.attribute: is 'Tall', must be one of Bald, Smiling"):
        load(local("celeba", tmp_path, options={"attribute": "Tall"}))


def test_an_unreadable_face_is_named(tmp_path, monkeypatch):
    files = fakes.celeba(tmp_path, monkeypatch)
    files[1].write_bytes(files[1].read_bytes()[:300])
    with pytest.raises(DataError, match=r"000002.jpg: is not a readable image"):
        load(local("celeba", tmp_path))


@pytest.mark.parametrize("name", catalog.PUBLIC)
def test_missing_files_are_reported_with_path_and_remedies(tmp_path, name):
    with pytest.raises(DataError) as caught:
        load(local(name, tmp_path))
    message = str(caught.value)
    assert str(tmp_path / catalog.PUBLIC[name].marker) in message
    assert "is not there" in message
    assert "data.download=true" in message
    assert "data.root=" in message
    assert "missing, and data.download=false" in describe(local(name, tmp_path)).where


@pytest.mark.parametrize("name", [name for name in catalog.PUBLIC if name != "celeba"])
def test_a_failed_download_says_why_and_how_to_do_it_by_hand(tmp_path, monkeypatch, name):
    def urlopen(*_args, **_kwargs):
        raise urllib.error.URLError(OSError(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(DataError) as caught:
        load(DataConfig(name=name, root=str(tmp_path / "new")))
    message = str(caught.value)
    assert "the download failed" in message
    assert "Temporary failure in name resolution" in message
    assert f"so that {tmp_path / 'new' / catalog.PUBLIC[name].marker} exists" in message
    assert "://" not in message


def test_a_download_that_needs_another_package_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gdown", None)
    with pytest.raises(DataError, match=r"the download failed: .*pip install gdown.*By hand: put img_align_celeba.zip"):
        load(DataConfig(name="celeba", root=str(tmp_path)))


def test_description_needs_no_files(tmp_path):
    spec = describe(DataConfig(name="cifar10", root=str(tmp_path)))
    assert spec.image_shape == (3, 32, 32)
    assert spec.sizes == {"train": 45_000, "validation": 5_000, "test": 10_000}
    assert spec.where == f"{tmp_path}/cifar-10-batches-py (170 MB, to be downloaded)"
    assert describe(DataConfig(name="celeba", image_size=32)).image_shape == (3, 32, 32)
