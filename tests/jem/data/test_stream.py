"""Training images that are read while they are needed: which, in which order, and what goes wrong."""

import gc
import threading
import time
from dataclasses import replace

import image_fakes as fakes
import pytest
import torch

from jem.config import DataConfig
from jem.data import parquet, stream
from jem.data.batches import BatchSource
from jem.data.sources import load
from jem.data.splits import Split
from jem.data.stream import Windows
from jem.errors import ConfigError, DataError
from jem.files import Location
from jem.settings import override
from jem.world import World

SHAPE = (3, 6, 5)
PLAIN = DataConfig(name="parquet", root="somewhere", crop_padding=0, flip=False, noise_std=0, stream=True)
ROWS = 5  # of a row group; the last of each file has fewer


@pytest.fixture
def data():
    return fakes.dataset(60, SHAPE)


@pytest.fixture
def out(tmp_path, data):
    location = Location.of(tmp_path / "out")
    parquet.write(data, location, rows_per_group=ROWS, rows_per_file=18)
    return location


@pytest.fixture
def split(out, monkeypatch):
    """Windows of three row groups or a little more."""
    monkeypatch.setattr(stream, "WINDOW_BYTES", 12 * 90)
    return parquet.read(out, stream=True).train


def numbers(data):
    """What tells one training image from the others."""
    return {image.numpy().tobytes(): i for i, image in enumerate(data.train.images)}


def seen(windows, first, stop, known):
    images, labels = windows.rows(first, stop)
    return [known[image.numpy().tobytes()] for image in images], labels


def test_each_epoch_has_every_image_once_with_its_label_in_another_order(data, split):
    known, n = numbers(data), len(data.train)
    assert len(known) == n, "all images differ"
    epochs = []
    for epoch in range(3):
        order, labels = seen(Windows(split, "train", 7), epoch * n, (epoch + 1) * n, known)
        assert sorted(order) == list(range(n))
        assert torch.equal(labels, data.train.labels[order])
        epochs.append(tuple(order))
    assert len(set(epochs)) == 3
    assert seen(Windows(split, "train", 8), 0, n, known)[0] != list(epochs[0])


def test_a_batch_is_a_function_of_its_position_however_one_came_there(data, split):
    known, n = numbers(data), len(data.train)
    straight = seen(Windows(split, "train", 7), 0, 3 * n, known)[0]
    windows = Windows(split, "train", 7)
    for first in (0, 100, 31, 2 * n - 3, 5, 5, n - 1, 64):  # ahead, back, again, over the ends of epochs and windows
        assert seen(windows, first, first + 9, known)[0] == straight[first : first + 9]
    assert seen(windows, 10, 10, known)[0] == []


def test_images_of_a_window_are_mixed_and_windows_are_of_groups_that_lie_apart(data, split):
    known, n = numbers(data), len(data.train)
    windows = Windows(split, "train", 7)
    epoch = windows.epoch(0)
    assert epoch.begins[0] == 0
    assert epoch.begins[-1] == n
    assert len(epoch.windows) > 2
    order = seen(windows, 0, n, known)[0]
    for groups, first, stop in zip(epoch.windows, epoch.begins[:-1], epoch.begins[1:], strict=True):
        rows = [row for group in groups for row in group.rows]
        assert sorted(order[first:stop]) == sorted(rows)
        assert order[first:stop] != rows
    flat = [group.rows.start for groups in epoch.windows for group in groups]
    assert flat != sorted(flat)
    assert windows.epoch(1).windows != epoch.windows


def test_two_windows_are_held_and_the_next_is_read_before_it_is_asked_for(split, monkeypatch):
    read, original = [], Windows._read
    monkeypatch.setattr(Windows, "_read", lambda self, key: read.append(key) or original(self, key))
    windows = Windows(split, "train", 7)
    begins = windows.epoch(0).begins
    windows.rows(0, 2)
    deadline = time.monotonic() + 20
    while len(read) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read == [(0, 0), (0, 1)]
    for first in range(0, 2 * len(split), 2):
        windows.rows(first, first + 2)
        assert len(windows._held) <= 3, "a batch over a border needs two, and the next"
    assert read == sorted(set(read)), "each once"
    windows.rows(begins[1], begins[1] + 1)
    assert set(windows._held) == {(0, 1), (0, 2)}


def test_images_of_p_x_that_are_not_augmented_are_those_of_the_disk(split):
    config = override(PLAIN, {"crop_padding": 2, "flip": True, "noise_std": 0.1})
    augmented = BatchSource(split, config, 7, 3)
    batches = BatchSource(split, override(config, {"augment_p_x": False}), 7, 3)
    plain = BatchSource(split, PLAIN, 7, 3)
    for step in range(3):
        batch, stored = batches.at(step), plain.at(step)
        assert torch.equal(batch.images, stored.images)
        assert torch.equal(batch.labels, stored.labels)
        assert torch.equal(batch.labelled_images, augmented.at(step).images)
        assert torch.equal(batch.labelled_labels, batch.labels)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_parts_are_the_batch_of_one_worker_and_augmentation_is_as_in_memory(data, split, size):
    config = override(PLAIN, {"crop_padding": 2, "flip": True, "noise_std": 0.1})
    alone = BatchSource(split, config, 7, 3)
    ranks = [BatchSource(split, config, 7, 3, share=World(rank, size).share) for rank in range(size)]
    for step in (0, 11, 4):
        whole, parts = alone.at(step), [rank.at(step) for rank in ranks]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert whole.n_global == parts[0].n_global == 7
    order = seen(Windows(split, "train", 3), 0, 7, numbers(data))[0]

    given = BatchSource(data.train, config, 7, 3)
    given._stream.source.rows[:] = torch.tensor([*order, *[0] * (len(data.train) - 7)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jem.data.batches.positions", lambda *_: torch.arange(7))
        assert torch.equal(given.at(0).images, alone.at(0).images)


def test_all_but_the_training_images_is_as_in_memory(data, out, split):
    there = parquet.read(out, stream=True)
    assert there.digest == data.digest
    assert there.image_shape == data.image_shape
    assert len(there.train) == len(data.train)
    assert torch.equal(there.train.labels, data.train.labels)
    assert there.train.images.shape == (0, *SHAPE)
    assert torch.equal(there.test.images, data.test.images)
    assert torch.equal(torch.cat(list(there.train.chunks())), data.train.images)


def test_a_part_of_it_is_whole_row_groups_spread_over_it(data, split):
    part, known = split.part(), numbers(data)
    rows = [known[image.numpy().tobytes()] for image in part.images]
    assert torch.equal(part.labels, data.train.labels[rows])
    assert ROWS <= len(rows) < len(split) / 2
    assert max(rows) > 2 * len(split) / 3 > len(split) / 3 > min(rows)
    assert rows == sorted(set(rows))
    assert data.train.part() is data.train


def test_a_part_that_lacks_classes_says_so(data, tmp_path, monkeypatch):
    """Sorted by class, as an older jobs/prepare.py wrote folders."""
    order = data.train.labels.argsort(stable=True)
    rising = Split(data.train.images[order], data.train.labels[order])
    parquet.write(replace(data, train=rising), Location.of(tmp_path / "sorted"), rows_per_group=2)
    split = parquet.read(Location.of(tmp_path / "sorted"), stream=True).train
    monkeypatch.setattr(stream, "WINDOW_BYTES", 1)
    with pytest.warns(UserWarning, match=r"have none of .*, as its rows are sorted by class"):
        split.part()


def test_a_part_of_rows_in_no_order_may_lack_classes_without_a_word(split, monkeypatch, recwarn):
    monkeypatch.setattr(stream, "WINDOW_BYTES", 1)
    assert set(split.part().labels.tolist()) < set(split.labels.tolist())
    assert not [warning for warning in recwarn if "sorted by class" in str(warning.message)]


def damage(location, group):
    file, number = group.file, group.number
    import pyarrow.parquet as pq

    column = pq.ParquetFile(file.path).metadata.row_group(number).column(0)
    raw = bytearray(file.local.read_bytes())
    raw[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file.local.write_bytes(raw)


def test_a_damaged_row_group_is_named_when_its_images_are_asked_for_and_again(split, out):
    group = split.groups[7]
    damage(out, group)
    batches = BatchSource(split, PLAIN, 6, 0)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{group.file.name}, row group {group.number}: is damaged") as caught:
            list(map(batches.at, range(len(split) // 6 + 1)))
        assert "jobs/prepare.py" in str(caught.value)


def test_a_file_that_is_gone_is_named(split):
    gone = split.groups[0].file
    gone.local.unlink()
    with pytest.raises(DataError, match=rf"{gone.name}: cannot be read"):
        Windows(split, "train", 0).rows(0, len(split))


def test_a_missing_file_is_told_at_the_start(out, split):
    split.groups[-1].file.local.unlink()
    with pytest.raises(DataError, match=r"is missing"):
        load(override(PLAIN, {"root": out.path}))


def test_its_thread_ends_with_it(split):
    before = set(threading.enumerate())
    batches = BatchSource(split, PLAIN, 6, 0)
    batches.at(0)
    (mine,) = set(threading.enumerate()) - before
    del batches
    gc.collect()
    deadline = time.monotonic() + 20
    while mine.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "digits"}, "python jobs/prepare.py digits OUT"),
        ({"name": "parquet", "root": "x", "labels_per_class": 3}, "data.labels_per_class"),
    ],
)
def test_what_cannot_be_streamed_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        override(DataConfig(), changes | {"stream": True})
