import image_fakes as fakes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jem.data.augment import crop_and_flip, to_float


def one_by_one(images, rows, padding, shifts, mirrored):
    """The textbook way: pad, crop at an offset, flip."""
    _, _, h, w = images.shape
    padded = torch.nn.functional.pad(images[rows].float(), (padding,) * 4, mode="reflect").to(torch.uint8)
    made = []
    for i in range(len(rows)):
        top, left = padding - int(shifts[0, i]), padding - int(shifts[1, i])
        crop = padded[i, :, top : top + h, left : left + w]
        made.append(crop.flip(-1) if mirrored[i] else crop)
    return torch.stack(made)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(2, 7), st.integers(2, 7), st.integers(1, 6), st.integers(0, 2**31))
def test_the_gather_equals_pad_crop_flip(c, h, w, n, seed):
    random = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(fakes.pixels(5, c, h, w, seed=seed))
    padding = min(h, w) - 1
    rows = torch.randint(0, 5, (n,), generator=random)
    shifts = torch.randint(-padding, padding + 1, (2, n), generator=random)
    mirrored = torch.rand(n, generator=random) < 0.5
    assert torch.equal(
        crop_and_flip(images, rows, shifts, mirrored), one_by_one(images, rows, padding, shifts, mirrored)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_black_is_minus_one_and_white_is_one(dtype):
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None]
    assert to_float(images, dtype).flatten().tolist() == [-1, 1]
    assert to_float(images, dtype).dtype == dtype


def test_every_byte_survives_the_way_there_and_back():
    images = torch.arange(256, dtype=torch.uint8)[:, None, None, None]
    assert torch.equal(((to_float(images) + 1) * 127.5).round().to(torch.uint8), images)
