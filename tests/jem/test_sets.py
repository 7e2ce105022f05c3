import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jem.errors import DataError
from jem.evaluate.sets import (
    SETS,
    adapt,
    constant_images,
    gaussian_noise,
    interpolations,
    rotated,
    uniform_noise,
)


def test_interpolations_are_midpoints_with_another_image_each_once():
    images = (2.0 ** torch.arange(9))[:, None, None, None]
    others = 2 * interpolations(images) - images
    assert others.flatten().sort().values.tolist() == images.flatten().tolist()
    assert (others != images).all()
    assert torch.equal(interpolations(images), interpolations(images.clone()))
    assert interpolations(images[:1]).item() == images[0].item()


def test_interpolations_of_images_that_are_sorted_by_class_are_of_two_classes():
    """As are mnist5k and any folder: neighbours there are of one class."""
    labels = torch.arange(10).repeat_interleave(200)
    others = 2 * interpolations(labels[:, None, None, None].double()).flatten() - labels
    same = (others == labels).double().mean()
    assert abs(same - 0.1) < 4 * math.sqrt(0.1 * 0.9 / len(labels))


def test_uniform_noise_has_the_moments_of_a_uniform_on_minus_one_to_one(generator):
    x = uniform_noise(torch.Size((100, 1, 10, 10)), generator)
    assert abs(x.mean()) < 4 * math.sqrt(1 / 3 / x.numel())
    assert abs((x**2).mean() - 1 / 3) < 4 * math.sqrt((1 / 5 - 1 / 9) / x.numel())


def test_gaussian_noise_has_a_standard_deviation_of_a_half_but_for_what_is_clamped(generator):
    x = gaussian_noise(torch.Size((200, 1, 10, 10)), generator)
    assert x.abs().max() == 1
    assert abs(x.mean()) < 4 * 0.5 / math.sqrt(x.numel())
    beyond = math.erfc(2 / math.sqrt(2))  # two standard deviations
    assert abs((x.abs() == 1).double().mean() - beyond) < 4 * math.sqrt(beyond / x.numel())
    assert abs((x.abs() < 0.5).double().mean() - math.erf(1 / math.sqrt(2))) < 4 * 0.5 / math.sqrt(x.numel())


def test_constant_images_have_one_colour_each_of_all_there_are(generator):
    x = constant_images(torch.Size((2000, 3, 4, 5)), generator)
    assert x.shape == (2000, 3, 4, 5)
    assert torch.equal(x, x[:, :, :1, :1].expand_as(x))
    colours = x[:, :, 0, 0]
    assert abs(colours.square().mean() - 1 / 3) < 4 * math.sqrt((1 / 5 - 1 / 9) / 6000)
    assert (torch.corrcoef(colours.T) - torch.eye(3)).abs().max() < 4 / math.sqrt(2000)


def test_rotated_images_are_turned_a_quarter_and_four_times_is_no_time():
    images = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    assert rotated(images)[0, 0].tolist() == [[2, 4], [1, 3]]
    assert torch.equal(rotated(rotated(rotated(rotated(images)))), images)
    with pytest.raises(DataError, match="square"):
        rotated(torch.zeros(1, 1, 2, 3))


@pytest.mark.parametrize("name", list(SETS))
def test_a_set_is_of_the_test_images_shape_in_range_and_the_same_for_the_same_seed(name, generator):
    images = torch.rand(7, 3, 6, 6, generator=generator) * 2 - 1
    before = images.clone()
    a, b = (SETS[name](images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.shape == images.shape
    assert a.dtype == images.dtype
    assert a.abs().max() <= 1
    assert torch.equal(a, b)
    assert torch.equal(images, before)


def test_images_of_the_right_shape_stay_as_they_are(generator):
    images = torch.randint(256, (3, 1, 8, 8), generator=generator).to(torch.uint8)
    found = adapt(images, (1, 8, 8))
    assert torch.equal(found.images, images)
    assert found.how == "as they are"


@pytest.mark.parametrize(
    ("of", "to", "how"),
    [
        ((1, 28, 28), (1, 8, 8), "resized from 28x28 to 8x8 (bilinear, antialiased)"),
        ((3, 32, 32), (1, 32, 32), "RGB made grey (0.299 R + 0.587 G + 0.114 B)"),
        ((1, 8, 8), (3, 8, 8), "grey repeated over 3 channels"),
        (
            (3, 40, 64),
            (1, 8, 8),
            "the middle 40x40 of 40x64 cut out, resized from 40x40 to 8x8 (bilinear, antialiased), "
            "RGB made grey (0.299 R + 0.587 G + 0.114 B)",
        ),
        ((1, 8, 6), (1, 4, 4), "the middle 6x6 of 8x6 cut out, resized from 6x6 to 4x4 (bilinear, antialiased)"),
    ],
)
def test_images_of_another_shape_are_adapted_and_it_says_how(of, to, how, generator):
    images = torch.randint(256, (2, *of), generator=generator).to(torch.uint8)
    found = adapt(images, to)
    assert found.images.shape == (2, *to)
    assert found.images.dtype == torch.uint8
    assert found.how == how


def test_what_is_cut_out_is_the_middle_and_what_is_grey_stays_grey():
    images = torch.zeros(1, 1, 2, 6, dtype=torch.uint8)
    images[:, :, :, 2:4] = 100
    assert (adapt(images, (3, 2, 2)).images == 100).all()
    assert (adapt(images.expand(-1, 3, -1, -1), (1, 2, 2)).images == 100).all()


def test_resizing_and_grey_are_those_of_pillow_within_rounding(generator):
    images = torch.randint(256, (1, 3, 32, 32), generator=generator).to(torch.uint8)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.BILINEAR)
    grey = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8).reshape(8, 8)
    found = adapt(images, (1, 8, 8)).images[0, 0]
    assert (found.int() - grey.int()).abs().max() <= 1


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_any_size_becomes_any_other(h, w, to_h, to_w):
    images = torch.full((1, 1, h, w), 7, dtype=torch.uint8)
    found = adapt(images, (1, to_h, to_w)).images
    assert found.shape == (1, 1, to_h, to_w)
    assert (found == 7).all()


def test_images_of_two_channels_are_refused():
    with pytest.raises(DataError, match="2 channels cannot be made into images of 3"):
        adapt(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), (3, 4, 4))
