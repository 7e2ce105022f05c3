import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parent / "data"))
import image_fakes as fakes

from jem.config import DataConfig
from jem.data import catalog, parquet, vision
from jem.data.sources import load
from jem.errors import ConfigError, DataError
from jem.evaluate import sets
from jem.evaluate.others import (
    check_sets,
    content_of,
    default_sets,
    fingerprint,
    load_outliers,
    refusal,
    set_name,
    spaced,
)
from jem.files import Location
from jem.randomness import generator as stream

RESIZED = "resized from 28x28 to 8x8 (bilinear, antialiased)"


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for module in (catalog, vision):
        monkeypatch.setattr(module, "DEBIAN_FASHION_MNIST", tmp_path / "debian")


@pytest.fixture
def data(tmp_path):
    return DataConfig(name="digits", root=str(tmp_path / "data"), download=False)


def like_test(n=6, shape=(1, 8, 8)):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def levels(root, layout, size=(8, 8)):
    """A folder of images, whose grey level is the number of the file."""
    fakes.folder(root, layout, size)
    return str(root)


def written(tmp_path, shape=(1, 8, 8), name="fake", seed=0):
    made = fakes.dataset(40, shape, name=name)
    made.test.images[:] = torch.from_numpy(fakes.pixels(len(made.test), *shape, seed=seed + 9))
    out = tmp_path / f"parquet-{name}-{seed}"
    parquet.write(made, Location.of(out))
    return str(out), made


# what is evenly spaced


@pytest.mark.parametrize(
    ("total", "most", "expected"),
    [(5, 5, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (9, 3, [1, 4, 7]), (10, 1, [5]), (10, 4, [1, 3, 6, 8])],
)
def test_rows_are_the_middles_of_equal_stretches(total, most, expected):
    assert spaced(total, most).tolist() == expected


def test_rows_of_a_sorted_set_hold_every_class_as_often():
    classes = np.repeat(np.arange(10), 500)[spaced(5000, 1000)]
    assert np.bincount(classes).tolist() == [100] * 10


# those made


@pytest.mark.parametrize("name", list(sets.SETS))
def test_a_made_set_is_that_of_its_own_stream_and_is_not_rounded(data, name):
    test = like_test()
    found = load_outliers(name, test, data, 100)
    assert torch.equal(found.images, sets.SETS[name](test, stream("cpu", "evaluate", name)))
    assert found.how.endswith("; 6 images; not rounded to 8 bits")


def test_a_made_set_is_thinned_out_after_it_is_made(data):
    test = like_test(9)
    whole = load_outliers("interp", test, data, 9)
    found = load_outliers("interp", test, data, 3)
    assert torch.equal(found.images, whole.images[[1, 4, 7]])
    assert "; 3 of 9 images, evenly spaced;" in found.how


# those embedded, and textures


def test_an_embedded_set_is_its_test_split_in_the_models_shape(data):
    found = load_outliers("mnist5k", like_test(), data, 10_000)
    expected = sets.adapt(load(DataConfig(name="mnist5k"), ("test",)).test.images, (1, 8, 8))
    assert torch.equal(found.images, expected.images)
    assert found.how == (
        f"the test split of mnist5k (digits as well: the same classes, of another origin); 1000 images; {RESIZED}"
    )


def test_a_set_larger_than_wanted_is_thinned_out_evenly(data):
    whole = load_outliers("mnist5k", like_test(), data, 1000).images
    found = load_outliers("mnist5k", like_test(), data, 250)
    assert torch.equal(found.images, whole[2::4])
    assert "; 250 of 1000 images, evenly spaced; " in found.how


def test_grey_images_become_those_of_a_colour_model(data):
    found = load_outliers("digits", like_test(shape=(3, 16, 12)), DataConfig(name="cifar10"), 50)
    assert found.images.shape == (50, 3, 16, 12)
    assert found.images.dtype == torch.uint8
    assert found.how == (
        "the test split of digits; 50 of 360 images, evenly spaced; the middle 8x6 of 8x8 cut out, "
        "resized from 8x6 to 16x12 (bilinear, antialiased), grey repeated over 3 channels"
    )


def test_textures_are_patches_side_by_side_at_their_own_resolution(data):
    skimage_data = pytest.importorskip("skimage.data")
    found = load_outliers("textures", like_test(shape=(3, 100, 60)), data, 10_000)
    assert found.images.shape == (3 * 5 * 8, 3, 100, 60)
    assert found.how == ("patches of scikit-image's brick, grass, gravel; 120 images; grey repeated over 3 channels")
    for number, name in enumerate(("brick", "grass", "gravel")):
        whole = torch.from_numpy(getattr(skimage_data, name)().copy())
        rows = found.images[40 * number : 40 * number + 40, 0].reshape(5, 8, 100, 60)
        assert torch.equal(rows.transpose(1, 2).reshape(500, 480), whole[:500, :480])


def test_few_textures_are_of_all_three_images(data):
    pytest.importorskip("skimage.data")
    whole = load_outliers("textures", like_test(), data, 3 * 64 * 64).images
    assert torch.equal(load_outliers("textures", like_test(), data, 3).images, whole[[2048, 6144, 10240]])


def test_textures_smaller_than_the_models_images_are_refused(data):
    pytest.importorskip("skimage.data")
    with pytest.raises(DataError, match="its images are 512x512, smaller than 600x8"):
        load_outliers("textures", like_test(1, (1, 600, 8)), data, 10)
    assert default_sets(data, (1, 600, 8))[1]["textures"] == "its images are 512x512, smaller than 600x8"


def test_without_scikit_image_the_remedy_is_a_command(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ConfigError, match=r"evaluate.sets: textures: .*pip install scikit-image"):
        load_outliers("textures", like_test(), data, 10)


# torchvision's


def test_fashion_mnist_comes_from_debians_package_or_from_root(tmp_path, data):
    arrays = fakes.mnist(tmp_path / "debian", zipped=True)
    expected = torch.from_numpy(arrays["t10k-images-idx3-ubyte"])[:, None]
    wide = like_test(shape=(1, 28, 28))
    assert torch.equal(load_outliers("fashion_mnist", wide, data, 100).images, expected)
    assert fingerprint("fashion_mnist", data) == "fashion_mnist debian"
    arrays = fakes.mnist(tmp_path / "data" / "FashionMNIST" / "raw", n=80)
    found = load_outliers("fashion_mnist", wide, data, 100)
    assert torch.equal(found.images[:, 0], torch.from_numpy(arrays["t10k-images-idx3-ubyte"]))
    assert found.how == "the test split of fashion_mnist; 40 images; as they are"
    assert fingerprint("fashion_mnist", data) == f"fashion_mnist {tmp_path}/data"


def test_a_public_set_that_is_not_beside_the_models_data_is_sought_in_the_cache(tmp_path, data):
    arrays = fakes.mnist(tmp_path / "home" / ".cache/jem/data/KMNIST/raw")
    found = load_outliers("kmnist", like_test(shape=(1, 28, 28)), data, 100)
    assert torch.equal(found.images[:, 0], torch.from_numpy(arrays["t10k-images-idx3-ubyte"]))


def test_a_folder_of_ones_own_images_is_no_root_of_public_sets(tmp_path):
    levels(tmp_path / "mine", {"a": 5, "b": 5})
    fakes.mnist(tmp_path / "mine" / "KMNIST" / "raw")
    mine = DataConfig(name="imagefolder", root=str(tmp_path / "mine"), download=False)
    with pytest.raises(DataError, match=r"data.name=kmnist: is not there.*\.cache/jem/data"):
        load_outliers("kmnist", like_test(), mine, 5)


def test_svhn_and_cifar_are_read(tmp_path, data, monkeypatch):
    images = fakes.svhn(tmp_path / "data", monkeypatch)
    fakes.cifar(tmp_path / "data", "cifar10", monkeypatch)
    model = DataConfig(name="cifar100", root=data.root, download=False)
    wide = like_test(shape=(3, 32, 32))
    assert torch.equal(load_outliers("svhn", wide, model, 100).images, torch.from_numpy(images))
    expected = load(DataConfig(name="cifar10", root=data.root, download=False), ("test",)).test.images
    assert torch.equal(load_outliers("cifar10", wide, model, 10**6).images, expected)


def test_of_celeba_only_the_files_that_are_used_are_opened(tmp_path, data, monkeypatch):
    files = fakes.celeba(tmp_path / "data", monkeypatch)  # the last four are its test split
    for unused in (*files[:9], files[10]):
        unused.write_bytes(b"damaged")
    model = DataConfig(name="cifar10", root=data.root, download=False)
    found = load_outliers("celeba", like_test(shape=(3, 16, 16)), model, 2)
    assert (found.images.float().mean(dim=(1, 2, 3)) - torch.tensor([180.0, 220.0])).abs().max() < 3
    assert found.how == (
        "the test split of celeba, the middle square resized to 16x16; 2 of 4 images, evenly spaced; as they are"
    )


def test_what_is_missing_is_said_with_the_remedy_and_not_downloaded(data):
    with pytest.raises(DataError, match=r"data.name=svhn: is not there: data.download=true fetches 246 MB"):
        load_outliers("svhn", like_test(), data, 10)


# by path


def test_a_folder_without_splits_gives_all_its_images(tmp_path, data):
    root = levels(tmp_path / "things", {"a": 3, "b": 2})
    found = load_outliers(root, like_test(), data, 100)
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1]
    assert found.how == (
        f"all images of {root}, the middle square of each resized to 8x8 (bilinear, antialiased), grey; "
        "5 images; as they are"
    )


def test_a_folder_with_a_test_split_gives_that_and_nothing_else_is_opened(tmp_path, data):
    root = levels(tmp_path / "things", {"train/a": 3, "train/b": 3, "test/a": 2, "test/b": 2})
    (tmp_path / "things" / "train" / "a" / "001.png").write_bytes(b"damaged")
    found = load_outliers(root, like_test(), data, 100)
    assert len(found.images) == 4
    assert found.how.startswith(f"the test split of {root}, ")


def test_a_folder_of_a_single_class_will_do_though_no_classifier_learns_from_it(tmp_path, data):
    assert len(load_outliers(levels(tmp_path / "one", {"images": 4}), like_test(), data, 100).images) == 4
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: holds no image"):
        load_outliers(str(tmp_path / "none"), like_test(), data, 100)


def test_images_without_any_folder_will_do_and_a_file_is_said_to_be_one(tmp_path, data, monkeypatch):
    for row in range(3):
        Image.new("L", (9, 9), 40 * row).save(tmp_path / f"{row}.png")
    assert len(load_outliers(str(tmp_path), like_test(), data, 10).images) == 3
    monkeypatch.chdir(tmp_path)
    assert len(load_outliers("./", like_test(), data, 10).images) == 3
    assert "0.png: is a file; give a folder of images" in refusal("./0.png", data)


def test_outliers_are_all_images_below_a_folder_or_below_its_test_split(tmp_path, data):
    root = tmp_path / "things"
    levels(root, {"edited": 2, "sub/deep": 1})
    (root / "empty").mkdir()
    for row in range(3):
        Image.new("L", (9, 9), 40 * row).save(root / f"{row}.png")
    assert len(load_outliers(str(root), like_test(), data, 10).images) == 6
    (root / "drawing.svg").write_text("of outliers some will do")
    assert len(load_outliers(str(root), like_test(), data, 10).images) == 6
    split = levels(tmp_path / "split", {"train/x": 3, "test/y": 2})
    found = load_outliers(split, like_test(), data, 10)
    assert len(found.images) == 2
    assert found.how.startswith("the test split of")


def test_images_of_every_size_become_the_models_size_and_channels(tmp_path, data):
    (tmp_path / "mixed" / "a").mkdir(parents=True)
    for i, (size, mode) in enumerate([((30, 10), "RGB"), ((5, 7), "L"), ((200, 200), "RGBA")]):
        Image.new(mode, size, "white").save(tmp_path / "mixed" / "a" / f"{i}.png")
    for shape in ((1, 8, 8), (3, 12, 20)):
        found = load_outliers(str(tmp_path / "mixed"), like_test(shape=shape), data, 100)
        assert found.images.shape == (3, *shape)
        assert (found.images == 255).all()
    assert "resized to 20x20 (bilinear, antialiased), RGB; 3 images; the middle 12x20 of 20x20 cut out" in found.how


def test_a_large_folder_is_thinned_out_evenly_and_the_rest_is_not_opened(tmp_path, data):
    root = levels(tmp_path / "things", {"a": 5, "b": 4})
    (tmp_path / "things" / "a" / "000.png").write_bytes(b"damaged")
    found = load_outliers(root, like_test(), data, 3)
    assert found.images[:, 0, 0, 0].tolist() == [1, 4, 2]
    assert "; 3 of 9 images, evenly spaced; " in found.how


def test_a_damaged_picture_is_named(tmp_path, data):
    root = levels(tmp_path / "things", {"a": 3})
    (tmp_path / "things" / "a" / "001.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"a/001.png: is not a readable image"):
        load_outliers(root, like_test(), data, 3)


def test_a_parquet_data_set_gives_its_test_split(tmp_path, data):
    out, made = written(tmp_path, (3, 20, 20))
    found = load_outliers(out, like_test(), data, 10)
    assert torch.equal(found.images, sets.adapt(made.test.images[1::2], (1, 8, 8)).images)
    assert found.how == (
        f"the test split of {out} (fake, Parquet); 10 of 20 images, evenly spaced; "
        "resized from 20x20 to 8x8 (bilinear, antialiased), RGB made grey (0.299 R + 0.587 G + 0.114 B)"
    )


def test_more_images_than_are_adapted_at_once_stay_in_order(data, monkeypatch):
    whole = load_outliers("mnist5k", like_test(), data, 1000).images
    monkeypatch.setattr("jem.evaluate.others.CHUNK", 7)
    assert torch.equal(load_outliers("mnist5k", like_test(), data, 1000).images, whole)


# what cannot be


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("uniforn", r"'uniforn' is no set; known are interp, .*celeba, and the path of .*; did you mean 'uniform'\?"),
        ("imagefolder", "'imagefolder' is no set"),
        ("./nowhere", r"\./nowhere: there is no such folder"),
        ("nowhere://x/y", "not a location that pyarrow can open"),
        ("digits", r"digits: is the model's own data set \(digits\)"),
    ],
)
def test_a_name_that_is_none_or_the_models_own_is_a_mistake_of_the_configuration(data, name, message):
    for call in (lambda: load_outliers(name, like_test(), data, 5), lambda: check_sets([name], data)):
        with pytest.raises(ConfigError, match=f"evaluate.sets: .*{message}"):
            call()


@pytest.mark.parametrize(("model", "name"), [("mnist", "mnist5k"), ("mnist5k", "mnist")])
def test_a_part_of_mnist_is_no_outlier_to_mnist(model, name):
    with pytest.raises(ConfigError, match=f"{name}: mnist5k is a part of mnist, and the model's data are {model}"):
        load_outliers(name, like_test(), DataConfig(name=model), 5)


def test_the_models_own_folder_is_refused_under_whatever_name(tmp_path):
    root = levels(tmp_path / "mine", {"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 2})
    mine = DataConfig(name="imagefolder", root=root)
    (tmp_path / "link").symlink_to(root)
    for name in (root, f"{root}/", f"{root}/test", f"{root}/train/..", str(tmp_path / "link"), str(tmp_path)):
        with pytest.raises(ConfigError, match="its images are the model's own data"):
            check_sets([name], mine)
    other = levels(tmp_path / "mine" / "beside", {"a": 2})
    assert check_sets([other], mine) == {"beside": other}


def test_the_models_own_parquet_data_are_refused_wherever_they_lie(tmp_path):
    out, _ = written(tmp_path)
    mine = DataConfig(name="parquet", root=out)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(out).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    for name in (out, str(copy)):
        with pytest.raises(ConfigError, match="its test split is of the model's own data"):
            load_outliers(name, like_test(), mine, 5)
    other, _ = written(tmp_path, name="other", seed=5)
    assert len(load_outliers(other, like_test(), mine, 5).images) == 5


def test_what_was_written_from_a_public_set_counts_as_that_set(tmp_path, data):
    digits, _ = written(tmp_path, name="digits")
    mnist5k, _ = written(tmp_path, name="mnist5k")
    assert content_of(DataConfig(name="parquet", root=mnist5k)) == "mnist5k"
    with pytest.raises(ConfigError, match=r"parquet-digits-0: is the model's own data set \(digits\)"):
        check_sets([digits], data)
    with pytest.raises(ConfigError, match="mnist5k: is the model's own data set"):
        check_sets(["mnist5k"], DataConfig(name="parquet", root=mnist5k))
    assert "mnist5k" not in default_sets(DataConfig(name="parquet", root=mnist5k), (1, 28, 28))[0]


def test_all_mistakes_are_told_at_once(tmp_path, data):
    with pytest.raises(ConfigError) as caught:
        check_sets(["unifrom", "interp", "digits", "interp", str(tmp_path / "none")], data)
    assert len(caught.value.problems) == 4


# names


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("interp", "interp"),
        ("/data/LSUN-resized.v2", "LSUN-resized.v2"),
        ("/data/my images (2)/", "my_images__2_"),
        ("/data/lsun/test", "lsun_test"),
        ("/data/x/../Übung", "_bung"),
        ("/data/.hidden.", "hidden"),
        ("/data/" + "x" * 200, "x" * 100),
    ],
)
def test_a_folders_name_is_made_one_that_metrics_may_have(path, name):
    assert set_name(path) == name


def test_a_name_without_any_legal_character_is_refused():
    with pytest.raises(ConfigError, match="has no letter or digit of ASCII; rename it"):
        set_name("/data/質感")


def test_two_sets_of_one_name_are_refused(tmp_path, data):
    one, two = levels(tmp_path / "one" / "things", {"a": 1}), levels(tmp_path / "two" / "things", {"a": 1})
    with pytest.raises(ConfigError, match=rf"{one} and {two} are both called things; rename a folder"):
        check_sets(["interp", one, two], data)


# what is used unless asked otherwise


def test_by_default_all_are_used_that_need_no_download(tmp_path, data):
    pytest.importorskip("skimage.data")
    made = ("interp", "uniform", "gaussian", "constant", "rot90")
    names, left_out = default_sets(data, (1, 8, 8))
    assert names == (*made, "mnist5k", "textures")
    assert list(left_out) == ["fashion_mnist"]
    assert f"not under {tmp_path}/data, and Debian's package" in left_out["fashion_mnist"]
    fakes.mnist(tmp_path / "debian", zipped=True)
    assert default_sets(data, (1, 8, 8)) == ((*made, "mnist5k", "fashion_mnist", "textures"), {})
    assert check_sets(names, data) == {name: name for name in names}


def test_what_is_left_out_by_default_is_told_with_its_reason(tmp_path, monkeypatch):
    fakes.mnist(tmp_path / "debian", zipped=True)
    names, left_out = default_sets(DataConfig(name="mnist"), (1, 28, 20))
    assert "not square" in left_out["rot90"]
    assert "a part of mnist" in left_out["mnist5k"]
    assert not {"rot90", "mnist5k", "mnist"} & set(names)
    _, left_out = default_sets(DataConfig(name="mine:load"), (4, 8, 8))
    assert all("4 channels" in left_out[name] for name in ("digits", "mnist5k", "fashion_mnist", "textures"))
    find = "jem.evaluate.others.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None if name == "skimage" else name)
    assert "pip install scikit-image" in default_sets(DataConfig(name="mnist"), (1, 28, 28))[1]["textures"]


# the key of a cache


def test_a_fingerprint_changes_with_a_folders_files_and_reads_none(tmp_path, data):
    root = Path(levels(tmp_path / "things", {"a": 2, "b": 2}))
    found = [fingerprint(str(root), data)]
    file = root / "a" / "000.png"
    stat = file.stat()
    file.write_bytes(b"\0" * stat.st_size)  # no image: reading it would fail
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(str(root), data) == found[0]
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    found.append(fingerprint(str(root), data))
    file.rename(root / "a" / "009.png")
    found.append(fingerprint(str(root), data))
    (root / "b" / "001.png").unlink()
    found.append(fingerprint(str(root), data))
    assert len(set(found)) == 4
    (tmp_path / "elsewhere").mkdir()
    root.rename(tmp_path / "elsewhere" / "things")
    assert fingerprint(str(tmp_path / "elsewhere" / "things"), data) == found[-1], "its place is no part of it"


def test_a_fingerprint_of_parquet_data_is_their_digest_and_of_what_is_embedded_the_name(tmp_path, data):
    out, made = written(tmp_path)
    assert fingerprint(out, data) == made.digest
    assert [fingerprint(name, data) for name in ("interp", "mnist5k", "textures")] == ["interp", "mnist5k", "textures"]
    assert fingerprint("svhn", data) == f"svhn {tmp_path}/data"


def test_the_models_own_data_have_a_fingerprint_too(tmp_path, data):
    out, made = written(tmp_path)
    root = levels(tmp_path / "mine", {"a": 2, "b": 2})
    assert fingerprint("digits", data) == "digits"
    assert fingerprint("parquet", DataConfig(name="parquet", root=out)) == made.digest
    assert fingerprint("imagefolder", DataConfig(name="imagefolder", root=root)) == fingerprint(root, data)
    own = [DataConfig(name="mine:load", options={"n": n}) for n in (1, 2)]
    assert len({fingerprint("mine:load", config) for config in own}) == 2
