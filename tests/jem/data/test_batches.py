from dataclasses import replace

import image_fakes as fakes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jem.config import DataConfig
from jem.data.augment import to_float
from jem.data.batches import BatchSource, labelled_rows, positions
from jem.data.splits import Split
from jem.errors import ConfigError, DataError
from jem.world import World

PLAIN = DataConfig(name="digits", noise_std=0.0, crop_padding=0, flip=False)
FULL = DataConfig(name="digits", noise_std=0.1, crop_padding=2, flip=True)
SEMI = DataConfig(name="digits", noise_std=0.1, crop_padding=2, labels_per_class=3, labelled_batch_size=5)
CASES = {"plain": PLAIN, "augmented": FULL, "semi-supervised": SEMI}
CASES |= {f"{name}, p(x) not": replace(config, augment_p_x=False) for name, config in CASES.items() if config != PLAIN}


def numbers(images):
    """Which images of `fakes.numbered` these are."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def same(a, b):
    pairs = [(getattr(a, name), getattr(b, name)) for name in vars(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@settings(deadline=None, max_examples=60)
@given(st.data())
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_all_ranks_parts_together_are_the_batch_of_one_process_bit_for_bit(config, data):
    n, batch_size = data.draw(st.integers(6, 40)), data.draw(st.integers(1, 20))
    size, step = data.draw(st.integers(1, batch_size)), data.draw(st.integers(0, 12))
    split, seed = fakes.numbered(n), data.draw(st.integers(0, 3))
    whole = BatchSource(split, config, batch_size, seed).at(step)
    parts = [BatchSource(split, config, batch_size, seed, share=World(r, size).share).at(step) for r in range(size)]
    assert [len(part.images) for part in parts] == [
        batch_size * (r + 1) // size - batch_size * r // size for r in range(size)
    ]
    for name in ("images", "labels", "labelled_images", "labelled_labels"):
        expected, got = getattr(whole, name), [getattr(part, name) for part in parts]
        assert got == [None] * size if expected is None else torch.equal(torch.cat(got), expected)
    assert {(part.n_global, part.n_labelled_global) for part in parts} == {(whole.n_global, whole.n_labelled_global)}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 5))
def test_every_image_comes_once_an_epoch_and_batches_straddle_epochs(n, batch_size, seed):
    steps = -(-3 * n // batch_size)
    stream = torch.cat([positions(n, seed, "train", step, batch_size) for step in range(steps)]).tolist()
    assert len(stream) == steps * batch_size
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_seeds_and_streams_have_orders_of_their_own():
    orders = [
        positions(100, *key, 100).tolist()
        for key in ((0, "train", 0), (0, "train", 1), (1, "train", 0), (0, "labelled", 0))
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_does_not_depend_on_what_was_asked_before():
    split = fakes.numbered(30)
    for config in CASES.values():
        used = BatchSource(split, config, 8, 7)
        for step in (9, 2, 9, 0):
            used.at(step)
        torch.rand(5)
        assert same(used.at(4), BatchSource(split, config, 8, 7).at(4))


def test_labels_stay_with_their_images():
    source = BatchSource(fakes.numbered(30, classes=3), PLAIN, 8, 0)
    for step in range(8):
        batch = source.at(step)
        assert batch.labels.tolist() == [i % 3 for i in numbers(batch.images)]
        assert batch.labelled_images is None
        assert batch.n_labelled_global == 8


def test_without_augmentation_a_batch_is_the_scaled_images():
    split = fakes.dataset().train
    batch = BatchSource(split, PLAIN, len(split), 0).at(0)
    order = positions(len(split), 0, "train", 0, len(split))
    assert torch.equal(batch.images, split.images[order].float() / 127.5 - 1)


def test_images_of_p_x_are_as_they_are_stored_and_those_of_cross_entropy_the_same_rows_as_they_were():
    """SADA: what cross-entropy sees does not change by it, and has the labels of what p(x) sees."""
    split = fakes.dataset(50, (1, 6, 6)).train
    for step in range(4):
        augmented = BatchSource(split, FULL, 16, 3).at(step)
        batch = BatchSource(split, replace(FULL, augment_p_x=False), 16, 3).at(step)
        rows = positions(50, 3, "train", step, 16)
        assert torch.equal(batch.images, to_float(split.images[rows]))
        assert torch.equal(batch.labelled_images, augmented.images)
        assert not torch.equal(batch.images, augmented.images)
        for labels in (batch.labels, batch.labelled_labels):
            assert torch.equal(labels, split.labels[rows])
        assert (batch.n_global, batch.n_labelled_global) == (16, 16)


def test_semi_supervised_images_of_p_x_are_as_they_are_stored_and_labelled_ones_as_they_were():
    split = fakes.dataset(50, (1, 6, 6)).train
    for step in range(4):
        augmented = BatchSource(split, SEMI, 16, 3).at(step)
        batch = BatchSource(split, replace(SEMI, augment_p_x=False), 16, 3).at(step)
        assert torch.equal(batch.images, to_float(split.images[positions(50, 3, "train", step, 16)]))
        assert torch.equal(batch.labelled_images, augmented.labelled_images)
        assert torch.equal(batch.labelled_labels, augmented.labelled_labels)
        assert batch.labels is None
        assert (batch.n_global, batch.n_labelled_global) == (16, 5)


def test_noise_has_the_standard_deviation_asked_for_and_is_new_each_step():
    split, quiet = fakes.dataset(64, (3, 16, 16)).train, PLAIN
    loud = DataConfig(name="digits", noise_std=0.3, crop_padding=0, flip=False)
    noise = [
        (BatchSource(split, loud, 64, 0).at(s).images - BatchSource(split, quiet, 64, 0).at(s).images) / 0.3
        for s in (0, 1)
    ]
    z = torch.stack(noise).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z[0] * z[1]).mean()) < 4 / (n / 2) ** 0.5


def test_half_of_the_images_are_mirrored():
    ramp = torch.arange(8, dtype=torch.uint8).expand(1, 1, 8, 8).contiguous()
    split = Split(ramp, torch.zeros(1, dtype=torch.int64))
    config = DataConfig(name="digits", noise_std=0.0, crop_padding=0, flip=True)
    images = BatchSource(split, config, 4000, 0).at(0).images
    mirrored = (images[:, 0, 0, 0] > images[:, 0, 0, 7]).double().mean()
    assert abs(mirrored - 0.5) < 4 * (0.25 / 4000) ** 0.5


def test_crops_are_uniform_over_all_offsets_and_independent_of_each_other():
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    split = Split(image, torch.zeros(1, dtype=torch.int64))
    config = DataConfig(name="digits", noise_std=0.0, crop_padding=2, flip=False)
    n = 5000
    centre = numbers(BatchSource(split, config, n, 0).at(0).images[:, :, 4:, 4:])
    counts = torch.bincount(torch.tensor(centre), minlength=64).reshape(8, 8)[2:7, 2:7]
    assert int(counts.sum()) == n
    assert torch.all((counts / n - 1 / 25).abs() < 4 * (1 / 25 * 24 / 25 / n) ** 0.5)


def test_turning_flips_off_leaves_crops_and_noise_as_they_were():
    split, changes = fakes.dataset(50, (1, 6, 6)).train, {"noise_std": 0.1, "crop_padding": 2}
    on, off = (
        BatchSource(split, DataConfig(name="digits", flip=flip, **changes), 50, 3).at(2).images
        for flip in (True, False)
    )
    unflipped = [torch.equal(x, y) for x, y in zip(on, off, strict=True)]
    assert 0.5 * 50 - 4 * (50 / 4) ** 0.5 < sum(unflipped) < 0.5 * 50 + 4 * (50 / 4) ** 0.5


def test_double_precision_sees_the_same_noise():
    split = fakes.dataset().train
    single, double = (
        BatchSource(split, FULL, 16, 0, dtype=dtype).at(3).images for dtype in (torch.float32, torch.float64)
    )
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-6)


def test_semi_supervised_batches_pair_all_images_with_a_fixed_labelled_few():
    config = DataConfig(
        name="digits", noise_std=0.0, crop_padding=0, flip=False, labels_per_class=4, labelled_batch_size=6
    )
    source = BatchSource(fakes.numbered(60, classes=3), config, 16, 5)
    batches = [source.at(step) for step in range(30)]
    labelled = [i for batch in batches for i in numbers(batch.labelled_images)]
    assert len(set(labelled)) == 12
    assert sorted(i % 3 for i in set(labelled)) == [0] * 4 + [1] * 4 + [2] * 4
    assert all(labelled.count(i) == 15 for i in set(labelled))
    assert {i for batch in batches for i in numbers(batch.images)} == set(range(60))
    for batch in batches:
        assert batch.labels is None
        assert batch.labelled_labels.tolist() == [i % 3 for i in numbers(batch.labelled_images)]
        assert (batch.n_global, batch.n_labelled_global) == (16, 6)


def test_the_labelled_batch_is_as_large_as_the_other_unless_told():
    config = DataConfig(name="digits", crop_padding=0, labels_per_class=2)
    batch = BatchSource(fakes.numbered(20), config, 7, 0).at(0)
    assert len(batch.labelled_images) == batch.n_labelled_global == 7


def test_another_seed_labels_other_images():
    labels = torch.arange(300) % 3
    first, second = (set(labelled_rows(labels, 10, seed).tolist()) for seed in (0, 1))
    assert len(first) == len(second) == 30
    assert first != second


def test_a_class_with_too_few_images_or_none_is_named():
    with pytest.raises(ConfigError, match=r"data.labels_per_class: is 2, but class 1 has 1 training images"):
        labelled_rows(torch.tensor([0, 0, 1, 2, 2]), 2, 0)
    with pytest.raises(DataError, match=r"data.labels_per_class: class 1 has no training image"):
        labelled_rows(torch.tensor([0, 0, 2, 2]), 2, 0)
    with pytest.raises(DataError, match=r"data.labels_per_class: class 2 has no training image"):
        labelled_rows(torch.tensor([0, 0, 1, 1]), 2, 0, 3)


def test_a_batch_says_how_frequent_classes_are_among_all_images_with_a_label():
    split = Split(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 1, 1, 0, 1]))
    assert BatchSource(split, PLAIN, 2, 0, n_classes=3).at(0).class_shares.tolist() == [3 / 8, 5 / 8, 0]
    few = replace(PLAIN, labels_per_class=2)
    assert BatchSource(split, few, 2, 0).at(0).class_shares.tolist() == [0.5, 0.5]
    apart = replace(PLAIN, augment_p_x=False, noise_std=0.1)
    assert BatchSource(split, apart, 2, 0).at(0).class_shares.tolist() == [3 / 8, 5 / 8]


@pytest.mark.parametrize(
    ("shape", "padding", "fits"), [((1, 8, 8), 7, True), ((1, 8, 8), 8, False), ((1, 12, 5), 5, False)]
)
def test_the_crop_must_be_narrower_than_the_image(shape, padding, fits):
    config = DataConfig(name="digits", crop_padding=padding)
    split = fakes.dataset(8, shape).train
    if fits:
        BatchSource(split, config, 4, 0).at(0)
        return
    with pytest.raises(ConfigError, match=rf"data.crop_padding: is {padding}, must be at most {padding - 1}"):
        BatchSource(split, config, 4, 0)
