import dataclasses
import json
import random
import re

import image_fakes as fakes
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs as pafs

from jem.config import DataConfig
from jem.data import folder, parquet, splits
from jem.data import manifest as manifests
from jem.data.rows import write_rows
from jem.data.sources import describe, load
from jem.data.splits import DataSet, Split
from jem.errors import ConfigError, DataError
from jem.files import Location

SMALL = {"rows_per_group": 8, "rows_per_file": 24}


@pytest.fixture
def data():
    return fakes.dataset(50, (3, 6, 5))


@pytest.fixture
def out(tmp_path, data):
    location = Location.of(tmp_path / "out")
    parquet.write(data, location, **SMALL)
    return location


def equal(a: DataSet, b: DataSet) -> bool:
    pairs = [(a.splits[name], b.splits[name]) for name in a.splits]
    tensors = all(torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in pairs)
    return tensors and a.classes == b.classes and a.name == b.name and a.digest == b.digest


def flip(location: Location, position: int, bit: int) -> None:
    raw = bytearray(location.local.read_bytes())
    raw[position] ^= 1 << bit
    location.local.write_bytes(raw)


def first_page(location: Location, group: int) -> tuple[int, int]:
    """Bytes of the image column in a row group: (first, one past the last)."""
    column = pq.ParquetFile(location.path).metadata.row_group(group).column(0)
    return column.data_page_offset, column.data_page_offset + column.total_compressed_size


def test_what_is_read_is_what_was_written(out, data):
    assert equal(parquet.read(out), data)
    assert [child.name for child in out.children()] == [
        "manifest.json",
        *(f"test-0000{i}-of-00002.parquet" for i in range(2)),
        *(f"train-0000{i}-of-00003.parquet" for i in range(3)),
        *(f"validation-0000{i}-of-00002.parquet" for i in range(2)),
    ]


def test_digits_come_back_through_load_with_the_same_digest(tmp_path):
    digits = load(DataConfig(name="digits"))
    parquet.write(digits, Location.of(tmp_path / "d"))
    config = DataConfig(name="parquet", root=str(tmp_path / "d"))
    assert equal(load(config), digits)
    assert describe(config).sizes == {"train": 1294, "validation": 143, "test": 360}
    assert (describe(config).image_shape, describe(config).n_classes) == ((1, 8, 8), 10)


def test_one_split_can_be_read_alone(out, data):
    (out / "train-00001-of-00003.parquet").remove()
    alone = parquet.read(out, ("test",))
    assert torch.equal(alone.test.images, data.test.images)
    assert len(alone.train) == len(alone.validation) == 0


def test_the_digest_that_read_attaches_is_that_of_the_tensors(out):
    read = parquet.read(out).train
    assert read.digest == Split(read.images, read.labels).digest


def test_files_are_standard_parquet_with_checksummed_pages(out):
    file = pq.ParquetFile((out / "train-00000-of-00003.parquet").path)
    assert file.num_row_groups == 3
    assert (
        str(file.schema_arrow.field("image").type)
        == "extension<arrow.fixed_shape_tensor[value_type=uint8, shape=[3,6,5]]>"
    )
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("kind", ["mock", "subtree"])
def test_any_pyarrow_filesystem_will_do(tmp_path, data, kind):
    local = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    location = Location({"mock": pafs._MockFileSystem(), "subtree": local}[kind], "bucket/set", kind)
    parquet.write(data, location, **SMALL)
    assert equal(parquet.read(location), data)
    parquet.verify(location)


def test_verify_finds_any_flipped_bit_and_read_never_gives_other_data(out, data):
    draw, seen = random.Random(0), []
    for _ in range(120):
        file = draw.choice(out.children())
        original = file.local.read_bytes()
        position, bit = draw.randrange(len(original)), draw.randrange(8)
        flip(file, position, bit)
        with pytest.raises(DataError):
            parquet.verify(out)
        try:
            seen.append(equal(parquet.read(out), data))
        except DataError:
            seen.append(None)
        file.local.write_bytes(original)
    assert False not in seen
    assert seen.count(None) > 60


def test_read_finds_any_flipped_bit_in_a_data_page_and_names_file_and_row_group(out):
    draw = random.Random(1)
    for _ in range(40):
        file, group = out / "train-00001-of-00003.parquet", draw.randrange(3)
        first, end = first_page(file, group)
        original = file.local.read_bytes()
        flip(file, draw.randrange((first + end) // 2, end), draw.randrange(8))  # past the page's header
        with pytest.raises(
            DataError, match=rf"train-00001-of-00003.parquet, row group {group}: is damaged: .*copy the file"
        ):
            parquet.read(out)
        file.local.write_bytes(original)


def test_verify_lists_every_damaged_file(out):
    flip(out / "train-00001-of-00003.parquet", 40, 3)
    (out / "test-00000-of-00002.parquet").remove()
    (out / "validation-00001-of-00002.parquet").local.write_bytes(b"short")
    lines = []
    with pytest.raises(DataError) as caught:
        parquet.verify(out, lines.append)
    text = str(caught.value)
    assert len(text.splitlines()) == 3
    assert re.search(r"train-00001-of-00003.parquet: its bytes are not those that were written", text)
    assert re.search(r"test-00000-of-00002.parquet: is missing", text)
    assert re.search(r"validation-00001-of-00002.parquet: has 5 bytes, must have \d+", text)
    assert len(lines) == 7


def test_cheap_checks_come_before_any_reading(out, monkeypatch):
    monkeypatch.setattr(parquet, "row_groups", lambda *_: pytest.fail("data was read"))
    file = out / "validation-00001-of-00002.parquet"
    file.local.write_bytes(file.local.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"validation-00001-of-00002.parquet: has \d+ bytes, must have \d+; copy"):
        parquet.read(out)


def replace(out: Location, split: Split) -> None:
    """Put another split under the name of the first training file, and make the manifest agree with it."""
    target = out / "train-00000-of-00003.parquet"
    write_rows(target.path, split.images, split.labels, 8)
    manifest = manifests.read(out)
    train = manifest.splits["train"]
    file = dataclasses.replace(train.files[0], bytes=target.size())
    part = dataclasses.replace(train, files=(file, *train.files[1:]))
    changed = dataclasses.replace(manifest, splits={**manifest.splits, "train": part})
    (out / "manifest.json").write(manifests.dump(changed))


def test_a_label_out_of_range_is_named_with_its_row(out, data):
    labels = data.train.labels[:24].clone()
    labels[11] = 4
    replace(out, Split(data.train.images[:24], labels))
    with pytest.raises(
        DataError, match=r"train-00000-of-00003.parquet, row group 1, row 3: label 4 is out of range, must be 0 to 3"
    ):
        parquet.read(out)


def test_files_of_another_data_set_are_refused(out, data):
    replace(out, Split(data.train.images[:24] ^ 1, data.train.labels[:24]))
    with pytest.raises(
        DataError, match=r"train-00000-of-00003.parquet to .* do not hold the split train that was written"
    ):
        parquet.read(out)
    replace(out, Split(data.train.images[:23], data.train.labels[:23]))
    with pytest.raises(DataError, match=r"train-00000-of-00003.parquet: has 23 rows, must have 24"):
        parquet.read(out)
    replace(out, Split(data.train.images[:24, :1], data.train.labels[:24]))
    with pytest.raises(
        DataError, match=r"holds image .*shape=\[1,6,5\].*; must hold image, a tensor of uint8 \[3, 6, 5\]"
    ):
        parquet.read(out)


def change(out: Location, **changes) -> None:
    body = json.loads((out / "manifest.json").read())
    (out / "manifest.json").write(json.dumps({**body, **changes}, indent=1).encode() + b"\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "has schema 2, this version reads schema 1"),
        ({"format": "other"}, "is no manifest of images"),
        ({"classes": ["a"]}, "is damaged: its checksum does not match"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(out, changes, message):
    change(out, **changes)
    with pytest.raises(DataError, match=rf"manifest.json: {message}"):
        parquet.read(out)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"\xff\xfe", b"null"])
def test_a_manifest_that_is_none_is_refused(out, raw):
    (out / "manifest.json").write(raw)
    with pytest.raises(DataError, match=r"manifest.json: is (damaged|no manifest)"):
        parquet.read(out)


def test_a_missing_data_set_is_reported_with_the_command_that_makes_one(tmp_path):
    config = DataConfig(name="parquet", root=str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"none/manifest.json: is missing.*jobs/prepare.py SOURCE OUT"):
        load(config)
    with pytest.raises(ConfigError, match=r"data.root: nowhere://x: not a location"):
        load(DataConfig(name="parquet", root="nowhere://x"))


def test_an_occupied_place_is_left_alone(tmp_path, data):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        parquet.write(data, Location.of(tmp_path))
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        parquet.write(data, Location.of(tmp_path / "mine.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_nothing_behind(tmp_path, data, existed):
    def full_disk(line):
        if line.startswith("validation"):
            raise OSError(28, "No space left on device")

    location = Location.of(tmp_path / "out")
    if existed:
        location.mkdir()
    with pytest.raises(OSError, match="No space left"):
        parquet.write(data, location, **SMALL, progress=full_disk)
    assert location.exists() == existed
    assert location.children() == []


def test_the_manifest_is_written_last(tmp_path, data, monkeypatch):
    written = []
    original = Location.write
    monkeypatch.setattr(Location, "write", lambda self, raw: written.append(self.name) or original(self, raw))
    parquet.write(data, Location.of(tmp_path / "out"), **SMALL)
    assert written[-1] == "manifest.json"
    assert written.count("manifest.json") == 1


def test_an_unusable_data_set_is_not_written(tmp_path, data):
    bad = DataSet("bad", data.train, data.validation, Split(data.test.images[:0], data.test.labels[:0]), data.classes)
    with pytest.raises(DataError, match="bad: split test: is empty"):
        parquet.write(bad, Location.of(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_manifest_has_one_spelling_only(out):
    body = json.loads((out / "manifest.json").read())
    (out / "manifest.json").write(json.dumps(body, indent=2).encode())
    with pytest.raises(DataError, match=r"manifest.json: is damaged: its checksum does not match"):
        parquet.verify(out)


def test_images_of_a_folder_are_decoded_piece_by_piece_once_each_and_written_as_from_memory(tmp_path, monkeypatch):
    fakes.folder(tmp_path / "photos", {"train/a": 20, "train/b": 17, "test/a": 3, "test/b": 4})
    config = DataConfig(name="imagefolder", root=str(tmp_path / "photos"), image_size=6)
    parquet.write(load(config), Location.of(tmp_path / "from memory"), **SMALL)
    monkeypatch.setattr(splits, "CHUNK_BYTES", 7 * 3 * 6 * 6)
    sizes = []
    decode = folder.decode
    monkeypatch.setattr(folder, "decode", lambda files, *more: sizes.append(len(files)) or decode(files, *more))
    made = load(config, in_memory=False)
    assert made.image_shape == (3, 6, 6)
    parquet.write(made, Location.of(tmp_path / "piecewise"), **SMALL)
    assert max(sizes) == 7
    assert sum(sizes) == 37 + 7 + 3, "each once, and the first of each split for its shape"
    for file in (tmp_path / "from memory").iterdir():
        assert (tmp_path / "piecewise" / file.name).read_bytes() == file.read_bytes(), file.name
