import os
import struct

import deep_images
import image_fakes as fakes
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from jem.config import DataConfig
from jem.data.image_files import below, decode
from jem.data.sources import describe, load
from jem.data.upright import orientation, upright
from jem.errors import ConfigError, DataError


def config(root, **changes):
    return DataConfig(name="imagefolder", root=str(root), image_size=changes.pop("image_size", 8), **changes)


def sizes(data):
    return {name: len(split) for name, split in data.splits.items()}


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_a_folder_with_its_own_splits_keeps_them(tmp_path, validation):
    layout = {"train": 6, validation: 3, "test": 2}
    fakes.folder(tmp_path, {f"{split}/{c}": n for split, n in layout.items() for c in ("cat", "dog")})
    data = load(config(tmp_path))
    assert sizes(data) == {"train": 12, "validation": 6, "test": 4}
    assert data.classes == ("cat", "dog")
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.test.images[:, 0, 0, 0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"a": 50, "b": 50}, {"train": 72, "validation": 8, "test": 20}),
        ({"train/a": 50, "train/b": 50}, {"train": 72, "validation": 8, "test": 20}),
        ({"train/a": 50, "train/b": 50, "test/a": 3, "test/b": 3}, {"train": 90, "validation": 10, "test": 6}),
    ],
)
def test_missing_splits_are_carved_and_described_as_such(tmp_path, layout, expected):
    fakes.folder(tmp_path, layout)
    data = load(config(tmp_path))
    assert sizes(data) == expected == describe(config(tmp_path)).sizes
    assert describe(config(tmp_path)).n_classes == 2
    assert data.train.labels.bincount().tolist() == [expected["train"] // 2] * 2


def test_nested_files_count_and_hidden_or_foreign_ones_do_not(tmp_path):
    fakes.folder(tmp_path, {"train/a": 2, "train/a/more": 2, "train/b": 4, "train/.cache": 1, "test/a": 1, "test/b": 1})
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "a" / "._000.png").write_text("no image")
    assert sizes(load(config(tmp_path, validation_size=2))) == {"train": 6, "validation": 2, "test": 2}


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_picture_becomes_the_channels_asked_for(tmp_path, mode, channels):
    fakes.folder(tmp_path, {"a": 5, "b": 5})
    Image.new("L", (20, 10), 255).convert(mode).save(tmp_path / "b" / "000.png")
    data = load(config(tmp_path, channels=channels, image_size=4))
    assert data.image_shape == (channels, 4, 4)
    assert max(int(split.images.max()) for split in data.splits.values()) == 255


@pytest.mark.parametrize(
    ("dtype", "named"), [(np.uint16, "more than 8 bits"), (np.int32, "more than 8"), (np.float32, "floats")]
)
def test_numbers_that_are_no_bytes_are_refused_and_not_cut_off(tmp_path, dtype, named):
    fakes.folder(tmp_path, {"a": 5, "b": 5})
    odd = tmp_path / "b" / "000.tif"
    Image.fromarray((np.arange(200).reshape(10, 20) * 300).astype(dtype)).save(odd)
    with pytest.raises(DataError, match=rf"000.tif: has {named}.* must have 8 bits a channel; scale"):
        load(config(tmp_path, image_size=4))


def test_a_photograph_stands_as_its_camera_says(tmp_path):
    fakes.folder(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1})
    picture = Image.new("L", (4, 4), 0)
    picture.paste(255, (0, 0, 4, 2))  # light above
    for tag, sides in (
        (3, [0, 0, 255, 255]),
        (1, [255, 255, 0, 0]),
        (99, [255, 255, 0, 0]),
    ):
        turned = Image.Exif()
        turned[0x0112] = tag  # 3: upside down
        picture.save(tmp_path / "test" / "a" / "000.png", exif=turned)
        image = load(config(tmp_path, image_size=4, channels=1), ("test",)).test.images[0, 0]
        assert image[:, 0].tolist() == sides
        assert (image == image[:, :1]).all()


@pytest.mark.parametrize("tag", range(1, 9))
def test_every_orientation_is_that_of_pillow(tag):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = tag
    np.testing.assert_array_equal(np.asarray(upright(image)), np.asarray(ImageOps.exif_transpose(image)))
    assert orientation(image) == tag


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
def test_every_kind_of_file_stands_as_pillow_turns_it(tmp_path, kind):
    picture = Image.fromarray(np.kron(np.array([[250, 150], [50, 0]]), np.ones((8, 8))).astype(np.uint8))
    for tag in range(1, 9):
        turned = Image.Exif()
        turned[0x0112] = tag
        path = tmp_path / f"{tag}.{kind}"
        picture.save(path, exif=turned)
        with Image.open(path) as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened).convert("L"))
        np.testing.assert_array_equal(decode([path], 16, 1)[0, 0].numpy(), expected)


@pytest.mark.parametrize("exif", [b"Exif\x00\x00not a TIFF header", b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_photograph_whose_exif_is_damaged_is_read_as_it_is(tmp_path, exif):
    fakes.folder(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1})
    (tmp_path / "test" / "a" / "000.png").unlink()
    Image.new("L", (4, 4), 255).save(tmp_path / "test" / "a" / "000.jpg", exif=exif)
    assert load(config(tmp_path, image_size=4, channels=1), ("test",)).test.images[0].min() > 250


def test_an_oblong_image_keeps_its_proportions(tmp_path):
    fakes.folder(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1})
    picture = Image.new("RGB", (30, 10), (255, 0, 0))
    picture.paste((0, 255, 0), (10, 0, 20, 10))
    picture.save(tmp_path / "test" / "a" / "000.png")
    image = load(config(tmp_path, image_size=6), ("test",)).test.images[0]
    assert torch.equal(image, torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None].expand(3, 6, 6))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "has 0 class folders, two are needed"),
        ({"a": 3}, "has 1 class folders"),
        ({"a": 3, "b": 0}, r"b: holds no image"),
        ({"train/a": 3, "train/b": 3, "test/a": 3}, r"test: has other classes than train: b"),
    ],
)
def test_a_layout_that_cannot_be_used_is_named(tmp_path, layout, message):
    fakes.folder(tmp_path, layout)
    with pytest.raises(DataError, match=message):
        load(config(tmp_path))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (("train/a", "train/b", "valid/a", "valid/b"), "beside train, valid would not be read"),
        (("train/a", "train/b", "val/a", "val/b", "validation/a"), "beside train, val would not be read"),
        (
            ("training/a", "training/b", "test/a", "test/b"),
            "test, training would be taken for classes, there is no train",
        ),
        (("val/a", "val/b", "Test/a", "Test/b"), "Test, val would be taken for classes, there is no train"),
    ],
)
def test_splits_by_other_names_are_neither_left_out_nor_taken_for_classes(tmp_path, layout, message):
    fakes.folder(tmp_path, dict.fromkeys(layout, 4))
    with pytest.raises(DataError, match=f"{tmp_path}: {message}; rename or move them: ROOT/train"):
        describe(config(tmp_path))


def test_folders_beside_the_splits_that_are_none_do_not_matter(tmp_path):
    fakes.folder(tmp_path, dict.fromkeys(("train/a", "train/b", "annotations/2024", "test/a", "test/b"), 10))
    assert sizes(load(config(tmp_path))) == {"train": 18, "validation": 2, "test": 20}


def test_pictures_by_any_usual_name_are_read(tmp_path):
    fakes.folder(tmp_path, {"a": 10, "b": 10})
    for name in ("x.gif", "y.jfif", "z.JPE"):
        Image.new("L", (9, 9), 7).save(tmp_path / "a" / name, format="GIF" if name == "x.gif" else "JPEG")
    assert sum(sizes(load(config(tmp_path))).values()) == 23


def test_pictures_that_are_not_read_are_not_left_out_in_silence(tmp_path):
    fakes.folder(tmp_path, {"a": 10, "b": 10})
    for name in ("y.heic", "x.AVIF"):
        (tmp_path / "b" / name).write_bytes(b"0")
    with pytest.raises(DataError, match=r"b/x.AVIF: is one of 2 images that are not read; convert or move them"):
        describe(config(tmp_path))


def test_a_size_of_a_split_that_the_folder_has_is_a_mistake(tmp_path):
    fakes.folder(tmp_path, dict.fromkeys(("train/a", "train/b", "val/a", "val/b"), 10))
    with pytest.raises(ConfigError, match=r"data.validation_size: is 4, but .* has a validation folder"):
        describe(config(tmp_path, validation_size=4))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: there is no such folder; data.root names"):
        load(config(tmp_path / "nowhere"))
    assert describe(config(tmp_path / "nowhere")).where == f"{tmp_path}/nowhere (missing)"


def test_hidden_folders_and_links_in_a_circle_are_no_data(tmp_path):
    fakes.folder(tmp_path, {"cat": 3, "dog": 3, "cat/.thumbnails": 3, "cat/more": 1})
    (tmp_path / "cat" / "latest").symlink_to(".")
    (tmp_path / "cat" / "more" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert len(below(tmp_path)) == 7 == len(set(below(tmp_path)))
    assert len(below(tmp_path / "cat" / ".thumbnails")) == 3, "asked for by name"
    (tmp_path / "elsewhere").symlink_to(tmp_path / "dog", target_is_directory=True)
    assert len(below(tmp_path / "elsewhere")) == 3


def test_a_link_to_itself_and_sixteen_bits_in_all_are_no_reason_to_fail(tmp_path):
    fakes.folder(tmp_path, {"cat": 3})
    (tmp_path / "cat" / "loop").symlink_to("loop")
    assert len(below(tmp_path)) == 3
    head = struct.pack("<2sIHHI", b"BM", 70 + 8, 0, 0, 70)
    info = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0) + struct.pack(
        "<4I", 0xF800, 0x07E0, 0x001F, 0
    )
    (tmp_path / "a.bmp").write_bytes(head + info + struct.pack("<4H", *[0xF800] * 4))
    assert decode([tmp_path / "a.bmp"], 2, 3)[0, :, 0, 0].tolist() == [255, 0, 0]


def test_a_folder_that_cannot_be_read_is_named_and_not_left_out(tmp_path, monkeypatch):
    fakes.folder(tmp_path, {"cat": 3, "dog": 3, "cat/2024": 3})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("2024"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cat/2024: cannot be read: Permission denied"):
        load(config(tmp_path))


def test_images_beside_the_folders_of_the_classes_are_named_and_not_left_out(tmp_path):
    fakes.folder(tmp_path, {"train/a": 5, "train/b": 5})
    fakes.folder(tmp_path, {"sheets": 1})
    next((tmp_path / "sheets").iterdir()).rename(tmp_path / "preview.png")
    assert sum(sizes(load(config(tmp_path))).values()) == 10, "beside train it is no data"
    (tmp_path / "preview.png").rename(tmp_path / "train" / "c.PNG")
    with pytest.raises(DataError, match=r"train/c.PNG: is one of 1 images beside the classes' folders"):
        describe(config(tmp_path))


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_colours_of_16_bits_are_refused_as_greys_are(tmp_path, kind):
    path = tmp_path / f"deep.{kind}"
    path.write_bytes(deep_images.deep_png() if kind == "png" else deep_images.deep_tiff())
    with Image.open(path) as opened:
        assert opened.mode == "RGB", "Pillow leaves half of the bits out"
    with pytest.raises(DataError, match=rf"deep.{kind}: has more than 8 bits a pixel's channel .*; scale the images"):
        decode([path], 4, 3)


def test_a_file_that_is_whole_is_not_to_be_deleted(tmp_path, monkeypatch):
    fakes.folder(tmp_path, {"a": 1})
    (path,) = (tmp_path / "a").iterdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(DataError, match=r"has too many pixels to be read; scale it down") as caught:
        decode([path], 4, 3)
    assert "delete" not in str(caught.value)
    with pytest.raises(DataError, match=r"gone.png: is not there; copy it again$"):
        decode([tmp_path / "gone.png"], 4, 3)


def test_a_damaged_picture_is_named(tmp_path):
    fakes.folder(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "b" / "003.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(DataError, match=r"b/003.png: is not a readable image: .*; replace or delete the file"):
        load(config(tmp_path))


def test_all_pictures_that_cannot_be_read_are_named_at_once(tmp_path):
    fakes.folder(tmp_path, {"cat": 1})
    (good,) = (tmp_path / "cat").iterdir()
    bad = [tmp_path / f"{row}.png" for row in range(22)]
    for path in bad:
        path.write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        decode([bad[0], good, *bad[1:]], 8, 1)
    lines = str(caught.value).splitlines()
    assert lines[1] == f"{bad[1]}: is not a readable image: cannot identify image file; replace or delete the file"
    assert len(lines) == 21
    assert lines[-1] == "and 2 more"
