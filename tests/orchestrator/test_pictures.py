"""Grids of images as PNG."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.pictures import CELL, by_class, grid, grid_png


def flat(*values, channels=1, side=CELL):
    """Images of one colour each, on [-1, 1]."""
    return torch.stack([torch.full((channels, side, side), float(value)) for value in values])


def cell(sheet, row, column, side=CELL):
    return sheet[row * (side + 2) : row * (side + 2) + side, column * (side + 2) : column * (side + 2) + side]


def test_images_lie_row_by_row_with_white_between_them():
    sheet = grid(flat(-1, 0, 1, -0.5, 0.5), columns=2)
    assert sheet.shape == (3 * CELL + 4, 2 * CELL + 2, 3)
    for index, value in enumerate([0, 128, 255, 64, 191]):
        assert (cell(sheet, *divmod(index, 2)) == value).all(), index
    assert (sheet[CELL : CELL + 2] == 255).all()
    assert (sheet[:, CELL : CELL + 2] == 255).all()
    assert (cell(sheet, 2, 1) == 255).all(), "what is not there is white"


def test_values_beyond_the_scale_are_cut_and_not_wrapped_round():
    sheet = grid(flat(-3, 3), columns=2)
    assert (cell(sheet, 0, 0) == 0).all()
    assert (cell(sheet, 0, 1) == 255).all()


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_images_of_other_channels_are_shown_as_their_mean(channels):
    images = torch.linspace(-1, 1, channels)[None, :, None, None].expand(1, channels, CELL, CELL)
    shown = grid(images, 1)
    assert shown.shape == (CELL, CELL, 3)
    assert set(shown.flatten().tolist()) <= {127, 128}


def test_colours_stay_in_their_channels():
    image = flat(-1, channels=3)
    image[0, 1] = 1
    assert (grid(image, 1) == [0, 255, 0]).all()


@pytest.mark.parametrize(("side", "shown"), [(8, 48), (28, 56), (32, 64), (48, 48), (64, 64)])
def test_small_images_are_enlarged_by_a_whole_number_to_be_readable(side, shown):
    assert grid(flat(0, side=side), 1).shape == (shown, shown, 3)


def test_an_enlarged_image_keeps_its_orientation():
    image = torch.full((1, 1, 8, 8), -1.0)
    image[0, 0, 0, 7] = 1  # top right
    sheet = grid(image, 1)[..., 0]
    assert np.unravel_index(sheet.argmax(), sheet.shape)[0] < 6
    assert np.unravel_index(sheet.argmax(), sheet.shape)[1] >= 42


def test_a_picture_is_a_png_of_the_same_pixels():
    images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with Image.open(io.BytesIO(grid_png(images, columns=3))) as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), grid(images, columns=3))


def test_a_row_holds_the_first_of_its_class_and_black_where_there_are_fewer():
    images, classes = flat(0.1, 0.2, 0.3, 0.4, 0.5, side=4), torch.tensor([2, 0, 2, 2, 0])
    rows = by_class(images, classes, n_classes=3, columns=2).unflatten(0, (3, 2))[:, :, 0, 0, 0]
    assert torch.equal(rows, torch.tensor([[0.2, 0.5], [-1, -1], [0.1, 0.3]]))
