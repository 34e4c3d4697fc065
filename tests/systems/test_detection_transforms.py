"""Transforms: a mark in the image and its box stay together, whatever moves them."""

from dataclasses import replace

import pytest
import torch

from rl_kernels.conversion.zoo import import_torchvision
from rl_kernels.systems.detection.transforms import (
    FILL,
    Augmentation,
    Sample,
    letterboxed,
    mosaic,
    placement,
    unplaced,
    window,
)

import_torchvision()
PLAIN = Augmentation(mosaic=0, flip=0, hue=0, saturation=0, value=0, scale=0, translate=0)


def marked(height, width, *boxes):
    """Black, with a red mark in each box: red less blue is 255 in it, and 0 in everything grey."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for left, top, right, bottom in boxes:
        image[0, top:bottom, left:right] = 255
    return Sample.of(image, torch.tensor(boxes).float().reshape(-1, 4), torch.arange(len(boxes)))


def marks(sample):
    return sample.image[0].float() - sample.image[2].float()


def assert_exact(sample):
    """Each box holds its mark, and nothing else is marked."""
    drawn = torch.zeros(sample.size)
    for left, top, right, bottom in sample.boxes.tolist():
        assert (left, top, right, bottom) == tuple(map(round, (left, top, right, bottom)))
        drawn[int(top) : int(bottom), int(left) : int(right)] = 255
    assert torch.equal(marks(sample), drawn)


def assert_close(sample):
    """Each box has the mass and the centre of its mark; between pixels that is as exact as can be asked."""
    found = marks(sample) / 255
    height, width = sample.size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    for left, top, right, bottom in sample.boxes.tolist():
        near = (x > left - 3) & (x < right + 3) & (y > top - 3) & (y < bottom + 3)
        mass = found[near].sum().item()
        assert mass == pytest.approx((right - left) * (bottom - top), rel=0.04)
        assert (found * x)[near].sum().item() / mass == pytest.approx((left + right) / 2, abs=0.1)
        assert (found * y)[near].sum().item() / mass == pytest.approx((top + bottom) / 2, abs=0.1)


@pytest.mark.parametrize(
    ("height", "width", "place"),
    [(64, 64, (64, 64, 0, 0)), (32, 64, (32, 64, 16, 0)), (16, 8, (64, 32, 0, 16)), (1, 640, (1, 64, 31, 0))],
)
def test_a_picture_lies_in_the_middle_of_its_square(height, width, place):
    assert placement(height, width, 64) == place
    found = letterboxed(marked(height, width), 64)
    assert found.image.shape == (3, 64, 64)
    assert int((found.image == FILL).sum()) == 3 * (64 * 64 - place[0] * place[1])


@pytest.mark.parametrize("size", [(64, 64), (40, 64), (64, 23)])
def test_a_letterbox_that_only_fills_is_exact(size):
    assert_exact(letterboxed(marked(*size, (0, 0, 5, 7), (9, 30, 20, 39)), 64))


@pytest.mark.parametrize("size", [(40, 50), (100, 77), (300, 200), (33, 129)])
def test_a_letterbox_that_resizes_keeps_boxes_on_their_marks(size):
    sample = marked(*size, (8, 6, 20, 26))
    found = letterboxed(sample, 96)
    assert_close(found)
    torch.testing.assert_close(unplaced(found.boxes, *size, 96), sample.boxes, atol=1e-3, rtol=0)


def test_boxes_in_the_grey_come_back_to_the_picture():
    assert unplaced(torch.tensor([[0.0, 0, 64, 64]]), 32, 64, 64).tolist() == [[0, 0, 64, 32]]


def test_sizes_that_the_network_cannot_take_are_refused():
    with pytest.raises(ValueError, match="size: got 50, expected a multiple of 32"):
        letterboxed(marked(8, 8), 50)
    with pytest.raises(TypeError, match="size"):
        letterboxed(marked(8, 8), 64.0)


@pytest.mark.parametrize("centre", [(64, 64), (32, 96), (90, 33), (0, 128)])
def test_a_mosaic_is_exact(centre):
    sizes = ((64, 64), (30, 64), (64, 40), (50, 50))
    found = mosaic([marked(*size, (3, 5, 21, 17), (24, 20, 40, 30)) for size in sizes], 64, centre)
    assert found.image.shape == (3, 128, 128)
    kept = found.sanitised(0.0, 0.5)
    assert_exact(kept)
    assert (len(kept.labels) == 8) == (centre == (64, 64))


def test_a_mosaic_tells_how_much_of_a_box_it_shows():
    found = mosaic([marked(64, 64, (30, 0, 40, 10))] * 4, 64, (64, 29))
    assert found.visible.tolist() == pytest.approx([0.5, 1, 0.5, 1])
    assert len(found.sanitised(0.6).labels) == 2


def test_a_mosaic_of_other_images_is_refused():
    with pytest.raises(ValueError, match="expected 4 with sides of at most 32"):
        mosaic([marked(64, 64)] * 4, 32, (32, 32))
    with pytest.raises(ValueError, match="centre: got"):
        mosaic([marked(8, 8)] * 4, 32, (32, 65))


@pytest.mark.parametrize("place", [(0, 0), (-10, 5), (20, 30), (7, -33)])
def test_a_window_is_exact(place):
    found = window(marked(64, 64, (20, 18, 41, 30), (2, 40, 12, 60)), *place, 64, 64)
    assert_exact(found.sanitised(0.0, 0.5))
    assert bool((found.image == FILL).all(0).any()) == (place != (0, 0))


@pytest.mark.parametrize("side", [40, 57, 90, 128])
def test_a_window_that_resizes_keeps_boxes_on_their_marks(side):
    found = window(marked(64, 64, (20, 18, 41, 30)), 5 - side // 8, 8 - side // 8, side, 64)
    assert_close(found.sanitised())


def test_flipping_is_exact():
    found = replace(PLAIN, flip=1)(lambda _: marked(40, 64, (3, 5, 21, 17)), 0, 1, 64)
    assert found.boxes.tolist() == [[43, 17, 61, 29]]
    assert_exact(found)


@pytest.mark.parametrize(
    "augmentation", [Augmentation(), Augmentation(mosaic=0), replace(PLAIN, scale=0.9, translate=1)]
)
def test_boxes_follow_marks_through_everything(augmentation):
    images = [marked(*size, (20, 22, 41, 40)) for size in ((64, 64), (60, 100), (96, 60), (128, 128))]
    counts = set()
    for seed in range(40):
        torch.manual_seed(seed)
        index = seed % 4
        found = replace(augmentation, hue=0, saturation=0, value=0)(images.__getitem__, index, 4, 96)
        assert found.image.shape == (3, 96, 96) and found.image.dtype == torch.uint8
        whole = found.sanitised(0.5, 6)
        assert_close(whole)
        assert bool((found.boxes >= 0).all() and (found.boxes <= 96).all())
        counts.add(len(found.labels))
    assert max(counts) == (4 if augmentation.mosaic else 1), "boxes are lost"


def test_colours_change_and_boxes_do_not():
    sample = marked(64, 64, (20, 22, 41, 40))
    torch.manual_seed(1)
    found = replace(PLAIN, hue=0.1, saturation=0.5, value=0.5)(lambda _: sample, 0, 1, 64)
    assert torch.equal(found.boxes, sample.boxes) and not torch.equal(found.image, sample.image)


def test_nothing_asked_for_changes_nothing():
    sample = marked(64, 64, (20, 22, 41, 40))
    found = PLAIN(lambda _: sample, 0, 1, 64)
    assert torch.equal(found.image, sample.image) and torch.equal(found.boxes, sample.boxes)


def test_an_image_without_boxes_stays_one():
    for augmentation in (PLAIN, Augmentation()):
        found = augmentation(lambda _: marked(30, 50), 0, 1, 64)
        assert found.boxes.shape == (0, 4) and found.labels.shape == (0,) and found.image.shape == (3, 64, 64)


@pytest.mark.parametrize(("name", "value"), [("hue", 0.6), ("mosaic", -0.1), ("scale", 1.0), ("flip", float("nan"))])
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected 0 to"):
        Augmentation(**{name: value})
