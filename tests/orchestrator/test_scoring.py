"""What jobs/score.py plans, reads, writes, goes on with and refuses. Ray's place is taken by a loop in this process."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deep_images import deep_png
from PIL import Image
from pyarrow import fs as pafs
from worker_runs import fit, newest

from jem.config import DataConfig, JEMConfig, ModelConfig
from jem.data import parquet, splits
from jem.data.image_files import decode
from jem.data.rows import write_rows
from jem.data.sources import load
from jem.errors import CheckpointError, ConfigError, DataError, JEMError
from jem.files import Location
from jem.models import make_network
from jem.predict import BATCH, CARD, WEIGHTS, Card, Predictor, save
from jem.settings import flatten
from orchestrator import score_ray, scoring
from orchestrator.runs import lock
from orchestrator.score_folder import class_of
from orchestrator.score_images import problem_of, to_pixels
from orchestrator.score_rows import Work, score_unit
from orchestrator.score_units import Columns, make_plan

SHAPE = (3, 4, 6)
CLASSES = ("cat", "dog", "ant")


def make_model(folder, shape=SHAPE, classes=CLASSES, layout="NHWC", seed=0, **changes):
    config = JEMConfig(seed=0, model=ModelConfig(name="small_conv", channels=(4, 8)))
    torch.manual_seed(seed)
    network = make_network(config.model, shape, len(classes))
    for parameter in network.parameters():
        parameter.data.mul_(3)
    values = {"temperature": 2.0, "threshold": 1.0, "digest": f"{seed}" * 64} | changes
    save(folder, Card(flatten(config), shape, classes, layout=layout, dtype="uint8", **values), network.state_dict())
    return folder


def pictures(n, shape=SHAPE, seed=0):
    """uint8 [n, c, h, w]."""
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def png(image, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(buffer, kind)
    return buffer.getvalue()


def write_data(path, images, group=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))
    pq.write_table(pa.table({"image": tensors, **columns}), path, row_group_size=group or len(images))
    return images


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def scored_units(monkeypatch):
    """The numbers of the units that are scored from here on, in this process."""
    seen = []

    def loop(folder, work, units, workers, device, done):
        predictor = Predictor.load(folder)
        for unit in units:
            score_unit(predictor, work, unit)
            seen.append(unit.number)
            done(unit.rows)

    monkeypatch.setattr(score_ray, "score_on_ray", loop)
    return seen


def score(model, data, out, *changes):
    stream = io.StringIO()
    result = scoring.score(str(model), str(data), str(out), changes, stream)
    result.said = stream.getvalue()
    return result


def scores(out):
    """All scores, in the order of the units."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("scores-*.parquet"))])


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


# planning


def units_of(tmp_path, groups, rows_per_unit):
    """(start, rows, first row group, rows of it to skip) of the units of a file with such row groups."""
    path = tmp_path / "data.parquet"
    images = pa.FixedShapeTensorArray.from_numpy_ndarray(pictures(sum(groups)))
    table = pa.table({"image": images})
    with pq.ParquetWriter(path, table.schema) as writer:
        for stop, rows in zip(np.cumsum(groups), groups, strict=True):
            writer.write_table(table.slice(stop - rows, rows))
    plan = make_plan(Location.of(path), None, Columns("image", None, ()), rows_per_unit, SHAPE)
    assert [unit.number for unit in plan.units] == list(range(len(plan.units)))
    assert plan.rows == sum(groups)
    return [(u.start, u.rows, u.first, u.stop, u.skip) for u in plan.units]


def test_units_are_whole_row_groups_as_long_as_these_fit(tmp_path):
    assert units_of(tmp_path, [4, 4, 4, 3], 9) == [(0, 8, 0, 2, 0), (8, 7, 2, 4, 0)]
    assert units_of(tmp_path, [4, 4], 8) == [(0, 8, 0, 2, 0)]
    assert units_of(tmp_path, [4, 4], 4) == [(0, 4, 0, 1, 0), (4, 4, 1, 2, 0)]


def test_a_row_group_larger_than_a_unit_is_cut_itself(tmp_path):
    expected = [(0, 2, 0, 1, 0), (2, 4, 1, 2, 0), (6, 4, 1, 2, 4), (10, 1, 1, 2, 8), (11, 3, 2, 3, 0)]
    assert units_of(tmp_path, [2, 9, 3], 4) == expected


def test_files_without_rows_are_passed_over_and_none_with_rows_is_an_error(tmp_path, model):
    write_data(tmp_path / "d" / "b.parquet", pictures(3))
    empty = pq.read_table(tmp_path / "d" / "b.parquet").slice(0, 0)
    pq.write_table(empty, tmp_path / "d" / "a.parquet")
    columns = Columns("image", "label", ())
    plan = make_plan(Location.of(tmp_path / "d"), None, columns, 10, SHAPE)
    assert [unit.file for unit in plan.units] == ["b.parquet"]
    (tmp_path / "d" / "b.parquet").unlink()
    with pytest.raises(DataError, match="holds no rows"):
        make_plan(Location.of(tmp_path / "d"), None, columns, 10, SHAPE)


def test_files_below_a_folder_are_found_and_hidden_ones_left_alone(tmp_path):
    for name in ("b/2.parquet", "a.parquet", ".hidden/1.parquet", "_tmp/1.parquet", "b/_1.parquet"):
        write_data(tmp_path / name, pictures(2))
    (tmp_path / "README.txt").write_text("no data")
    plan = make_plan(Location.of(tmp_path), None, Columns("image", "label", ()), 10, SHAPE)
    assert [unit.file for unit in plan.units] == ["a.parquet", "b/2.parquet"]


# reading images


def encodings(images):
    chw = images.tolist()
    fixed = pa.array(chw, pa.list_(pa.list_(pa.list_(pa.uint8(), 6), 4), 3))
    encoded = [png(image) for image in images]
    return {
        "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
        "int64 lists": pa.array(chw),
        "uint8 lists": pa.array(chw, pa.large_list(pa.list_(pa.list_(pa.uint8())))),
        "fixed size lists": fixed,
        "png": pa.array(encoded),
        "large binary": pa.array(encoded, pa.large_binary()),
        "hugging face": pa.array([{"bytes": data, "path": None} for data in encoded]),
    }


@pytest.mark.parametrize("name", list(encodings(pictures(1))))
def test_every_encoding_gives_the_same_pixels_also_of_a_slice(name):
    images = pictures(7)
    column = encodings(images)[name]
    assert problem_of(column.type, SHAPE) is None
    np.testing.assert_array_equal(to_pixels(column, SHAPE, str), images)
    np.testing.assert_array_equal(to_pixels(column.slice(2, 3), SHAPE, str), images[2:5])


def test_a_photograph_is_scored_as_its_camera_meant_it():
    image = pictures(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # it lies on its side: to be turned by a quarter
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(image.transpose(1, 2, 0), 1).copy()).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(to_pixels(pa.array([buffer.getvalue()]), SHAPE, str)[0], image)


def test_one_channel_may_be_left_out_of_lists_and_grey_pngs_are_read():
    images = pictures(3, (1, 4, 6))
    for column in (pa.array(images[:, 0].tolist()), pa.array([png(image) for image in images])):
        assert problem_of(column.type, (1, 4, 6)) is None
        np.testing.assert_array_equal(to_pixels(column, (1, 4, 6), str), images)


def test_a_jpeg_is_decoded_as_pillow_does():
    image = pictures(1)[0]
    data = png(image, "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
    np.testing.assert_array_equal(to_pixels(pa.array([data]), SHAPE, str)[0], expected)


@pytest.mark.parametrize(
    "column",
    [
        pa.FixedShapeTensorArray.from_numpy_ndarray(pictures(2, (4, 6, 3))),
        pa.FixedShapeTensorArray.from_numpy_ndarray(pictures(2).astype(np.float32)),
        pa.array(pictures(2)[:, 0].tolist()),
        pa.array((pictures(2) / 255).tolist()),
        pa.array(["a.png", "b.png"]),
        pa.array([{"path": "a.png"}]),
    ],
    ids=["other shape", "float tensors", "no channels", "float lists", "names", "path only"],
)
def test_a_column_of_another_kind_is_seen_before_it_is_read(column):
    assert problem_of(column.type, SHAPE)


def second(good, bad):
    return [good, bad, good]


def bad_columns():
    image = pictures(1)[0]
    wide, grey = np.zeros((3, 4, 7), np.uint8), np.zeros((1, 4, 6), np.uint8)
    rgba = io.BytesIO()
    Image.new("RGBA", (6, 4)).save(rgba, "PNG")
    ok, too_big = image.tolist(), image.astype(int)
    too_big[1, 2, 3] = 256
    ragged = image.tolist()
    ragged[2][3].append(1)
    with_null = image.tolist()
    with_null[0][0][5] = None
    return {
        "another size": (pa.array(second(png(image), png(wide))), "a PNG of 7 x 4 pixels, mode RGB"),
        "another mode": (pa.array(second(png(image), png(grey))), "mode L"),
        "16 bits": (pa.array(second(png(image), deep_png((6, 4)))), "a PNG that has more than 8 bits"),
        "with alpha": (pa.array(second(png(image), rgba.getvalue())), "mode RGBA"),
        "half a png": (pa.array(second(png(image), png(image)[:60])), "no readable image"),
        "no image": (pa.array(second(png(image), b"hello")), "no readable image"),
        "null": (pa.array(second(png(image), None)), "has no image"),
        "null bytes": (pa.array(second({"bytes": png(image)}, {"bytes": None})), "has no image bytes"),
        "out of range": (pa.array(second(ok, too_big.tolist())), "holds 256"),
        "negative": (pa.array(second(ok, (-image.astype(int) - 1).tolist())), "holds -"),
        "ragged": (pa.array(second(ok, ragged)), "a list of 7 at depth 3, where 6 belong"),
        "channels last": (pa.array(second(ok, image.transpose(1, 2, 0).tolist())), "a list of 4 at depth 1"),
        "null inside": (pa.array(second(ok, with_null)), "holds a null"),
    }


@pytest.mark.parametrize("name", list(bad_columns()))
def test_an_image_that_cannot_be_scored_is_named_with_what_was_expected(name):
    column, message = bad_columns()[name]
    with pytest.raises(DataError, match=message) as caught:
        to_pixels(column, SHAPE, lambda i: f"f.parquet, row {10 + i}")
    assert str(caught.value).startswith("f.parquet, row 11: ")
    assert "expected uint8 [3, 4, 6] as tensors or lists, or PNG or JPEG of 6 x 4 pixels" in str(caught.value)


# scoring


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_scores_are_what_the_predictor_says_of_each_units_images(tmp_path, scored_units, layout):
    model = make_model(tmp_path / "model", layout=layout)
    a = write_data(tmp_path / "data" / "a.parquet", pictures(700, seed=1), group=100)
    b = write_data(tmp_path / "data" / "b.parquet", pictures(350, seed=2))
    result = score(model, tmp_path / "data", tmp_path / "out", "rows_per_unit=600")
    assert scored_units == [0, 1, 2]
    parts, predictor = [a[:600], a[600:], b], Predictor.load(model)
    expected = [predictor(x.transpose(0, 2, 3, 1) if layout == "NHWC" else x) for x in parts]
    table = scores(tmp_path / "out")
    for name in ("index", "probability", "log_density", "in_distribution"):
        together = np.concatenate([getattr(p, name) for p in expected])
        np.testing.assert_array_equal(table[name].to_numpy(), together, err_msg=name)
    assert table["label"].to_pylist() == [label for p in expected for label in p.label]
    probabilities = np.concatenate([p.probabilities for p in expected]).astype(np.float32)
    np.testing.assert_array_equal(np.array(table["probabilities"].to_pylist(), np.float32), probabilities)
    assert table["file"].to_pylist() == ["a.parquet"] * 700 + ["b.parquet"] * 350
    assert table["row"].to_pylist() == [*range(700), *range(350)]
    kinds = {field.name: str(field.type) for field in table.schema}
    assert (kinds["row"], kinds["probabilities"]) == ("int64", "list<element: float>")
    assert result.rows == 1050
    assert result.units == 3


def test_a_row_group_that_is_cut_and_read_in_chunks_gives_each_row_its_own_scores(tmp_path, model, scored_units):
    images = write_data(tmp_path / "a.parquet", pictures(1300))
    score(model, tmp_path / "a.parquet", tmp_path / "out", "rows_per_unit=501")
    predictor = Predictor.load(model)
    expected = [predictor(images[i : i + 501].transpose(0, 2, 3, 1)).log_density for i in (0, 501, 1002)]
    table = scores(tmp_path / "out")
    np.testing.assert_array_equal(table["log_density"].to_numpy(), np.concatenate(expected))
    assert table["row"].to_pylist() == list(range(1300))


def test_how_much_is_read_at_once_changes_no_bit(tmp_path, model, scored_units, monkeypatch):
    write_data(tmp_path / "a.parquet", pictures(1300), group=130)
    score(model, tmp_path / "a.parquet", tmp_path / "one")
    monkeypatch.setattr("orchestrator.score_rows.CHUNK_BATCHES", 2)
    score(model, tmp_path / "a.parquet", tmp_path / "two")
    assert pq.ParquetFile(tmp_path / "two" / "scores-00000-of-00001.parquet").num_row_groups == 3, "500, 500, 300"
    assert BATCH == 250
    assert scores(tmp_path / "one").equals(scores(tmp_path / "two"))


def test_the_file_says_whose_scores_of_what_it_holds_and_its_pages_have_checksums(tmp_path, model, scored_units):
    write_data(tmp_path / "a.parquet", pictures(20), group=5)
    score(model, tmp_path / "a.parquet", tmp_path / "out", "rows_per_unit=10")
    path = tmp_path / "out" / "scores-00001-of-00002.parquet"
    with pq.ParquetFile(path) as file:
        content = json.loads(file.metadata.metadata[b"jem.scores"])
        column = file.metadata.row_group(0).column(1)
    assert (column.path_in_schema, column.compression) == ("row", "ZSTD")
    assert (content["schema"], content["model"]["digest"], content["model"]["threshold"]) == (1, "0" * 64, 1.0)
    unit = content["unit"]
    assert (unit["file"], unit["bytes"]) == ("a.parquet", (tmp_path / "a.parquet").stat().st_size)
    assert (unit["first"], unit["stop"], unit["start"], unit["rows"]) == (2, 4, 10, 10)
    data = bytearray(path.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    data[first + column.total_compressed_size - 1] ^= 1  # the last byte of its last page
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.read_table(path, page_checksum_verification=True)


def test_a_data_set_of_ours_is_scored_by_split_with_its_accuracy(tmp_path, scored_units):
    digits = load(DataConfig(name="digits"))
    parquet.write(digits, Location.of(tmp_path / "digits"))
    model = make_model(tmp_path / "model", digits.image_shape, digits.classes)
    result = score(model, tmp_path / "digits", tmp_path / "out", "split=test")
    table = scores(tmp_path / "out")
    assert table["true_label"].to_pylist() == digits.test.labels.tolist()
    assert set(table["file"].to_pylist()) == {"test-00000-of-00001.parquet"}
    right = float(np.mean(table["index"].to_numpy() == digits.test.labels.numpy()))
    assert result.metrics["accuracy"] == pytest.approx(right)
    everything = score(model, tmp_path / "digits", tmp_path / "all")
    assert everything.rows == sum(len(split) for split in digits.splits.values())


def test_a_data_set_of_ours_whose_classes_stand_in_another_order_is_compared_by_name(tmp_path, model, scored_units):
    images = pictures(30)
    index = Predictor.load(model)(images.transpose(0, 2, 3, 1)).index
    labels = torch.arange(30) % 4
    classes = ("emu", "ant", "cat", "dog")
    split = splits.Split(torch.from_numpy(images), labels)
    parquet.write(splits.DataSet("photos", split, split, split, classes), Location.of(tmp_path / "data"))
    result = score(model, tmp_path / "data", tmp_path / "out", "split=test")
    names = [classes[label] for label in labels]
    assert scores(tmp_path / "out")["true_label"].to_pylist() == names
    known = [row for row in range(30) if names[row] != "emu"]
    right = np.mean([CLASSES[index[row]] == names[row] for row in known])
    assert result.metrics["accuracy"] == pytest.approx(right)
    assert (
        result.message == f"{30 - len(known)} of 30 labels are none of the model's classes, and count for no accuracy"
    )


def test_a_label_that_is_no_number_of_ours_is_named(tmp_path, model, scored_units):
    write_data(tmp_path / "a.parquet", pictures(1), label=pa.array([2**63], pa.uint64()))
    with pytest.raises(DataError, match=r"a.parquet: column label: .*9223372036854775808"):
        score(model, tmp_path / "a.parquet", tmp_path / "out")


def test_the_accuracy_is_over_rows_whose_class_the_model_has(tmp_path, model, scored_units):
    predicted = Predictor.load(model)(pictures(4).transpose(0, 2, 3, 1)).index.tolist()
    names = [CLASSES[predicted[0]], CLASSES[predicted[1] - 1], "horse", None]
    numbers = [predicted[0], predicted[1] - 1 if predicted[1] else 2, -1, 99]
    columns = {
        "label": pa.array(names).dictionary_encode(),
        "number": pa.array(numbers, pa.int16()),
        "id": list("abcd"),
    }
    write_data(tmp_path / "a.parquet", pictures(4), **columns)
    by_name = score(model, tmp_path / "a.parquet", tmp_path / "names", "keep=[id]")
    by_number = score(model, tmp_path / "a.parquet", tmp_path / "numbers", "label=number")
    assert by_name.metrics["accuracy"] == by_number.metrics["accuracy"] == 0.5
    assert by_name.message == "2 of 4 labels are none of the model's classes, and count for no accuracy"
    assert "4 rows, " in by_name.said
    assert "accuracy 0.5000" in by_name.said
    table = scores(tmp_path / "names")
    assert table["true_label"].to_pylist() == names
    assert table["id"].to_pylist() == list("abcd")
    assert scores(tmp_path / "numbers")["true_label"].to_pylist() == numbers
    without = score(model, tmp_path / "a.parquet", tmp_path / "none", "label=none")
    assert "accuracy" not in without.metrics
    assert without.message == ""
    assert "true_label" not in scores(tmp_path / "none").column_names


def test_the_summary_is_that_of_all_rows(tmp_path, model, scored_units):
    write_data(tmp_path / "a.parquet", pictures(30), group=7)
    result = score(model, tmp_path / "a.parquet", tmp_path / "out", "rows_per_unit=7")
    table, summary = scores(tmp_path / "out"), json.loads((tmp_path / "out" / "scores.json").read_text())
    assert 0 < summary["in_distribution"] < 1
    assert summary["in_distribution"] == pytest.approx(np.mean(table["in_distribution"].to_numpy()))
    assert summary["mean_probability"] == pytest.approx(np.mean(table["probability"].to_numpy()))
    labels = table["label"].to_pylist()
    assert summary["predicted"] == {name: labels.count(name) for name in CLASSES}
    assert summary["rows"] == 30
    assert [file["rows"] for file in summary["files"]] == [7, 7, 7, 7, 2]
    assert all((tmp_path / "out" / f["name"]).stat().st_size == f["bytes"] for f in summary["files"])
    assert result.summary == str(tmp_path / "out" / "scores.json")


# going on


def test_only_the_units_whose_file_is_missing_are_scored_again(tmp_path, model, scored_units):
    write_data(tmp_path / "a.parquet", pictures(40), group=10)
    first = score(model, tmp_path / "a.parquet", tmp_path / "out", "rows_per_unit=10")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "scores-00002-of-00004.parquet").unlink()
    (tmp_path / "out" / ".scores-00002-of-00004.parquet.abc.tmp").write_bytes(b"half")
    again = score(model, tmp_path / "a.parquet", tmp_path / "out", "rows_per_unit=10")
    assert scored_units == [0, 1, 2, 3, 2]
    assert "going on: 3 of 4 units are scored already" in again.said
    assert contents(tmp_path / "out") == before, "and what a killed writer left is gone"
    assert again.json() == first.json()


def test_finished_scores_are_read_out_without_asking_anybody(tmp_path, model, scored_units):
    write_data(tmp_path / "a.parquet", pictures(40))
    first = score(model, tmp_path / "a.parquet", tmp_path / "out")
    again = score(model, tmp_path / "a.parquet", tmp_path / "out")
    assert again.json() == first.json()
    assert again.said == first.said.splitlines(keepends=True)[-1]
    assert again.said.startswith(f"scores: {tmp_path}/out: 40 rows, ")
    assert scored_units == [0]
    (tmp_path / "out" / "scores.json").unlink()
    assert score(model, tmp_path / "a.parquet", tmp_path / "out").json() == first.json()
    assert scored_units == [0], "the summary is made of what the files say of themselves"


def test_data_that_were_moved_are_still_the_same_data(tmp_path, model, scored_units):
    write_data(tmp_path / "here" / "a.parquet", pictures(40))
    score(model, tmp_path / "here", tmp_path / "out")
    shutil.move(tmp_path / "here", tmp_path / "there")
    score(model, tmp_path / "there", tmp_path / "out")
    assert scored_units == [0]


@pytest.mark.parametrize("summary", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("what", ["model", "threshold", "data", "more data", "settings"])
def test_an_out_that_holds_other_scores_is_refused_and_left_as_it_is(tmp_path, scored_units, what, summary):
    data, out = tmp_path / "data", tmp_path / "out"
    write_data(data / "a.parquet", pictures(40, seed=1))
    score(make_model(tmp_path / "m"), data, out)
    if not summary:
        (out / "scores.json").unlink()
    before, other, changes = contents(out), tmp_path / "m", ()
    if what == "model":
        other = make_model(tmp_path / "m2", seed=1)
        message = r"of another model \(digest 000000000000\.\.\., now 111111111111\.\.\.\)"
    elif what == "threshold":
        other = make_model(tmp_path / "m2", threshold=2.5)
        message = r"of another model \(threshold 1.0, now 2.5\)"
    elif what == "data":
        write_data(data / "a.parquet", pictures(40, seed=2))
        message = "of other data"
    elif what == "more data":
        write_data(data / "b.parquet", pictures(40))
        message = r"of other data \(.*files 1, now 2"
    else:
        changes, message = ("rows_per_unit=10",), r"made with other settings \(rows_per_unit 50000, now 10\)"
    with pytest.raises(ConfigError, match=message) as caught:
        score(other, data, out, *changes)
    assert "nothing was overwritten; give another OUT" in str(caught.value)
    assert contents(out) == before


def test_a_folder_of_other_things_is_no_out(tmp_path, model, scored_units):
    write_data(tmp_path / "a.parquet", pictures(4))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds thesis.tex, which is no file of scores"):
        score(model, tmp_path / "a.parquet", tmp_path / "out")
    with pytest.raises(ConfigError, match="is a file, a folder was expected"):
        score(model, tmp_path / "a.parquet", tmp_path / "out" / "thesis.tex")
    with pytest.raises(ConfigError, match="is inside DATA"):
        score(model, tmp_path, tmp_path / "scores")
    assert scored_units == []


def test_a_file_of_scores_that_is_damaged_is_named(tmp_path, model, scored_units):
    write_data(tmp_path / "a.parquet", pictures(20), group=10)
    score(model, tmp_path / "a.parquet", tmp_path / "out", "rows_per_unit=10")
    (tmp_path / "out" / "scores-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"scores-00001-of-00002.parquet: is no whole file of scores .*; delete it"):
        score(model, tmp_path / "a.parquet", tmp_path / "out", "rows_per_unit=10")


def test_two_commands_do_not_write_to_one_out(tmp_path, model, scored_units):
    from orchestrator.runs import lock

    write_data(tmp_path / "a.parquet", pictures(4))
    with (
        lock(Location.of(tmp_path / "out")),
        pytest.raises(ConfigError, match=r"out: pid \d+ on .* is writing scores there; wait for it"),
    ):
        score(model, tmp_path / "a.parquet", tmp_path / "out")
    assert scored_units == []


# bad data


def test_a_bad_image_ends_it_with_file_and_row_and_finished_units_stay(tmp_path, model, scored_units):
    images = [png(image) for image in pictures(30)]
    images[17] = png(np.zeros((3, 4, 7), np.uint8))
    pq.write_table(pa.table({"picture": images}), tmp_path / "a.parquet", row_group_size=10)
    with pytest.raises(DataError, match=r"a.parquet, row 17: holds a PNG of 7 x 4 pixels, mode RGB; expected uint8"):
        score(model, tmp_path / "a.parquet", tmp_path / "out", "rows_per_unit=10", "column=picture")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["scores-00000-of-00003.parquet"]


def test_an_image_that_is_mended_leaves_what_was_scored_of_the_others(tmp_path, model, scored_units):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    whole = [png(image) for image in pictures(20)]
    for name, images in (("a", whole), ("b", [*whole[:7], b"no image", *whole[8:]])):
        pq.write_table(pa.table({"image": images}), data / f"{name}.parquet", row_group_size=10)
    with pytest.raises(
        DataError, match=r"b.parquet, row 7: its bytes are no readable image \(cannot identify image file\);"
    ):
        score(model, data, out, "rows_per_unit=10")
    assert scored_units == [0, 1]
    pq.write_table(pa.table({"image": whole}), data / "b.parquet", row_group_size=10)
    result = score(model, data, out, "rows_per_unit=10")
    assert scored_units == [0, 1, 2, 3]
    assert "going on: 2 of 4 units" in result.said
    assert f"scores: {out}: 40 rows, " in result.said
    assert not list(tmp_path.glob(".*.lock"))
    first, second = np.split(np.asarray(scores(out)["log_density"]), 2)
    assert np.array_equal(first, second)


def test_interrupted_it_says_what_is_kept(tmp_path, model, scored_units, monkeypatch):
    write_data(tmp_path / "a.parquet", pictures(30), group=10)
    every, stream = score_ray.score_on_ray, io.StringIO()

    def interrupted(folder, work, units, *others):
        every(folder, work, units[:2], *others)
        raise KeyboardInterrupt

    monkeypatch.setattr(score_ray, "score_on_ray", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scoring.score(str(model), f"{tmp_path}/a.parquet", f"{tmp_path}/out", ["rows_per_unit=10"], stream)
    assert stream.getvalue().endswith("2 of 3 units are scored and kept; the same command goes on\n")


def test_an_out_in_a_folder_that_cannot_be_written_is_held_within(tmp_path, model, scored_units, monkeypatch):
    write_data(tmp_path / "a.parquet", pictures(4))
    out = tmp_path / "mounted" / "out"
    out.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != out.parent)
    with lock(Location.of(out), tidy=True):
        assert [path.name for path in out.iterdir()] == [".lock"]
        with pytest.raises(ConfigError, match="is writing scores there"):
            score(model, tmp_path / "a.parquet", out)
    assert score(model, tmp_path / "a.parquet", out).rows == 4
    assert not list(out.parent.glob(".*"))


def test_a_damaged_page_is_named_and_nothing_of_its_unit_is_written(tmp_path, model, scored_units):
    path = tmp_path / "a.parquet"
    write_rows(str(path), torch.from_numpy(pictures(40)), torch.zeros(40, dtype=torch.int64), 10)
    data = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[offset + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.parquet, rows 20 to 29: cannot be read: .*(?i:crc|checksum)"):
        score(model, path, tmp_path / "out", "rows_per_unit=10")
    assert scored_units == [0, 1]


def test_data_that_are_no_parquet_or_have_no_such_column_are_refused_before_any_is_read(tmp_path, model, scored_units):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"DATA: .*nowhere does not exist"):
        score(model, tmp_path / "nowhere", out)
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match=r"holds neither manifest.json nor any \*.parquet, and no image file"):
        score(model, tmp_path / "d", out)
    write_data(tmp_path / "d" / "a.parquet", pictures(4))
    with pytest.raises(ConfigError, match=r"column: is 'img', but .*a.parquet has the columns image"):
        score(model, tmp_path / "d", out, "column=img")
    with pytest.raises(ConfigError, match=r"label: is 'y', but"):
        score(model, tmp_path / "d", out, "label=y")
    with pytest.raises(ConfigError, match=r"split: is 'test', but .* has no manifest.json"):
        score(model, tmp_path / "d", out, "split=test")
    write_data(tmp_path / "d" / "b.parquet", pictures(4, (3, 8, 8)))
    with pytest.raises(DataError, match=r"b.parquet: column image holds tensors of uint8 \[3, 8, 8\]; the model takes"):
        score(model, tmp_path / "d", out)
    (tmp_path / "d" / "b.parquet").write_text("no parquet at all")
    with pytest.raises(DataError, match=r"b.parquet: is no readable Parquet file"):
        score(model, tmp_path / "d", out)
    assert not out.exists()


# a folder of image files


def photo(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def square_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("square"), (3, 8, 8))


def photos(root, names):
    """Of several sizes; returns what a model of 8 x 8 pixels is to see, as the training data of such a folder are."""
    generator = np.random.default_rng(0)
    for i, name in enumerate(names):
        photo(root / name, generator.integers(0, 256, (10 + i, 14 - i, 3), dtype=np.uint8))
    return decode([root / name for name in sorted(names)], 8, 3).numpy()


def test_a_folder_of_photographs_is_scored_as_one_was_learnt(tmp_path, square_model, scored_units):
    names = ["b/_MG_1.png", "b/deep/2.JPG", "a.webp", "ä b.png"]
    images = photos(tmp_path / "photos", names)
    (tmp_path / "photos" / ".hidden.png").write_text("not looked at")
    (tmp_path / "photos" / "notes.txt").write_text("nor is this")
    result = score(square_model, tmp_path / "photos", tmp_path / "out", "rows_per_unit=3")
    table, expected = scores(tmp_path / "out"), Predictor.load(square_model)(images.transpose(0, 2, 3, 1))
    assert table["file"].to_pylist() == sorted(names)
    assert table["row"].to_pylist() == [0] * 4
    np.testing.assert_allclose(table["log_density"].to_numpy(), expected.log_density, rtol=1e-6)
    assert table["label"].to_pylist() == list(expected.label)
    assert "true_label" not in table.column_names
    assert "accuracy" not in result.metrics
    assert (result.message, result.rows, scored_units) == ("", 4, [0, 1])

    (tmp_path / "link").symlink_to(tmp_path / "photos", target_is_directory=True)
    score(square_model, tmp_path / "link", tmp_path / "again", "rows_per_unit=3")
    assert scores(tmp_path / "again").equals(table)
    score(square_model, tmp_path / "photos" / "a.webp", tmp_path / "one")
    assert scores(tmp_path / "one")["file"].to_pylist() == ["a.webp"]
    np.testing.assert_allclose(scores(tmp_path / "one")["log_density"][0].as_py(), expected.log_density[0], rtol=1e-5)


def test_a_folder_laid_out_as_for_training_says_what_its_images_are(tmp_path, square_model, scored_units):
    images = photos(tmp_path / "photos", ["test/ant/x/0.png", "test/dog/1.png", "test/emu/2.png", "train/cat/3.png"])
    index = Predictor.load(square_model)(images.transpose(0, 2, 3, 1)).index
    result = score(square_model, tmp_path / "photos", tmp_path / "out")
    assert scores(tmp_path / "out")["true_label"].to_pylist() == ["ant", "dog", None, "cat"]
    assert result.metrics["accuracy"] == np.mean(index[[0, 1, 3]] == [2, 1, 0])
    assert result.message == "1 of 4 labels are none of the model's classes, and count for no accuracy"
    score(square_model, tmp_path / "photos", tmp_path / "bare", "label=none")
    assert "true_label" not in scores(tmp_path / "bare").column_names


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("5/a.png", "5"),
        ("test/5/2/a.png", "5"),
        ("2024/5/a.png", None),
        ("a.png", None),
        ("5.png", None),
        ("top/shirt/a.png", "top/shirt"),
        ("train/top/shirt/deep/a.png", "top/shirt"),
        ("top/a.png", "top"),
        ("test/a.png", None),
        ("dev/a.png", "dev"),
    ],
)
def test_the_class_of_a_file_is_that_of_the_layout_for_training(name, label):
    assert class_of(name, ("5", "top", "top/shirt", "dev")) == label


def test_image_files_that_cannot_be_scored_are_named_and_the_rest_goes_on(tmp_path, square_model, scored_units):
    root, out = tmp_path / "photos", tmp_path / "out"
    photos(root, ["0.png", "1.png", "2.png"])
    whole = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"(?s)photos/1.png: is not a readable image: .*replaced, they go on from here"):
        score(square_model, root, out, "rows_per_unit=1")
    assert scored_units == [0]
    (root / "1.png").write_bytes(whole)
    assert score(square_model, root, out, "rows_per_unit=1").rows == 3
    assert scored_units == [0, 1, 2]
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    assert score(square_model, tmp_path / "copy", out, "rows_per_unit=1").rows == 3
    photo(root / "2.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"OUT: .* holds scores of other data"):
        score(square_model, root, out, "rows_per_unit=1")


def test_an_image_that_changes_while_it_is_scored_is_not_taken_for_the_one_that_was_there(tmp_path, square_model):
    photos(tmp_path / "photos", ["0.png", "1.png"])
    plan = make_plan(Location.of(tmp_path / "photos"), None, Columns("image", None, ()), 5, (3, 8, 8))
    photo(tmp_path / "photos" / "1.png", np.zeros((9, 9, 3), np.uint8))
    work = Work(plan.root, Location.of(tmp_path / "out"), plan.columns, None, {}, plan.images)
    with pytest.raises(DataError, match=r"1.png: was changed while it was scored"):
        score_unit(Predictor.load(square_model), work, plan.units[0])
    assert not (tmp_path / "out").exists()


def test_image_files_that_would_be_left_out_are_named(tmp_path, square_model, scored_units):
    root = tmp_path / "photos"
    photos(root, ["0.png"])
    (root / "3.heic").write_bytes(b"")
    for data in (root, root / "3.heic"):
        with pytest.raises(DataError, match=r"3.heic: is one of 1 images that are not read; convert"):
            score(square_model, data, tmp_path / "out")
    (root / "3.heic").unlink()
    (root / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"gone.png: cannot be read: No such file.*; replace or delete the file"):
        score(square_model, root, tmp_path / "out")
    (root / "gone.png").unlink()
    odd = os.fsencode(root) + b"/caf\xe9.png"
    os.link(root / "0.png", odd)
    with pytest.raises(DataError, match=r"caf.*e9.png is no UTF-8; rename it"):
        score(square_model, root, tmp_path / "out")
    Path(os.fsdecode(odd)).rename(root / "café.png")
    (root / "itself").symlink_to(root, target_is_directory=True)
    assert score(square_model, root, tmp_path / "out").rows == 2


def test_what_makes_no_sense_for_image_files_is_refused_at_once(tmp_path, model, square_model, scored_units):
    photos(tmp_path / "photos", ["0.png"])
    with pytest.raises(ConfigError) as caught:
        score(square_model, tmp_path / "photos", tmp_path / "out", "column=picture", "label=y", "keep=[id]")
    for key, value in (("column", "'picture'"), ("label", "'y'"), ("keep", r"['id']")):
        assert f"{key}: is {value}, but {tmp_path / 'photos'} holds image files, no columns" in str(caught.value)
    with pytest.raises(ConfigError, match=r"but the model takes 3 channels of 4 x 6; give Parquet"):
        score(model, tmp_path / "photos", tmp_path / "out")
    store = Location(pafs._MockFileSystem(), "photos", "mock")
    store.mkdir()
    (store / "0.png").write(b"")
    with pytest.raises(DataError, match=r"nor any \*.parquet; image files are scored where they lie on a disk"):
        make_plan(store, None, Columns("image", "label", ()), 5, (3, 8, 8))
    assert not (tmp_path / "out").exists()


def test_mistakes_in_settings_are_named_together():
    with pytest.raises(ConfigError) as caught:
        scoring.score_config(["colum=x", "rows_per_unit=0", "device=gpu", "nonsense"])
    text = str(caught.value)
    for part in ("did you mean 'column'", "rows_per_unit: is 0, must be at least 1", "device: is 'gpu'", "'nonsense'"):
        assert part in text
    with pytest.raises(ConfigError, match=r"keep: has 'label', which is what a column of the scores is called"):
        scoring.score_config(["keep=[label]"])


# the model


def test_a_model_is_found_in_its_folder_and_in_a_runs(tmp_path, model):
    assert scoring.portable_folder(str(model), None, tmp_path) == model
    fit(tmp_path / "run", "steps=4")
    digest = newest(tmp_path / "run").files["model.safetensors"]["sha256"]
    shutil.copytree(model, tmp_path / "run" / "models" / digest[:12])
    (tmp_path / "run" / "models" / "older").mkdir()
    found = scoring.portable_folder(str(tmp_path / "run"), None, tmp_path)
    assert found == tmp_path / "run" / "models" / digest[:12]
    with pytest.raises(ConfigError, match=r"MODEL: .* holds no model.json, here or in models/; give"):
        scoring.portable_folder(str(tmp_path), None, tmp_path)
    with pytest.raises(ConfigError, match=r"MODEL: .*none does not exist"):
        scoring.portable_folder(str(tmp_path / "none"), None, tmp_path)


@pytest.mark.timeout(120)
def test_a_model_is_fetched_from_mlflow(migrated, tmp_path, model, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    (tmp_path / "runs").mkdir()
    shutil.copyfile(migrated, tmp_path / "runs" / "mlflow.db")
    client = MlflowClient(uri, uri)
    run = client.create_run(client.create_experiment("jem", f"{tmp_path}/artifacts")).info
    client.log_artifacts(run.run_id, str(model), "model/data")
    client.create_registered_model("net")
    version = client.create_model_version("net", f"{run.artifact_uri}/model", run.run_id)
    client.set_registered_model_alias("net", "champion", version.version)
    for number, source in enumerate(("models:/net@champion", "models:/net/1", f"runs:/{run.run_id}")):
        into = tmp_path / str(number)
        into.mkdir()
        found = scoring.portable_folder(source, None, into)
        assert into in found.parents
        assert {name: (found / name).read_bytes() for name in (CARD, WEIGHTS)} == contents(model)
    with pytest.raises(DataError, match="models:/other/1 cannot be had from MLflow"):
        scoring.portable_folder("models:/other/1", None, tmp_path)


def test_a_damaged_model_is_said_before_ray_is_started(tmp_path, scored_units):
    model = make_model(tmp_path / "model")
    write_data(tmp_path / "a.parquet", pictures(4))
    weights = bytearray((model / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (model / WEIGHTS).write_bytes(weights)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        score(model, tmp_path / "a.parquet", tmp_path / "out")
    assert scored_units == []


def test_scores_that_workers_wrote_elsewhere_are_missed(tmp_path, model, monkeypatch):
    write_data(tmp_path / "a.parquet", pictures(4))
    monkeypatch.setattr(score_ray, "score_on_ray", lambda *_: None)
    with pytest.raises(JEMError, match="OUT must be a shared storage"):
        score(model, tmp_path / "a.parquet", tmp_path / "out")
    assert not (tmp_path / "out" / "scores.json").exists()
