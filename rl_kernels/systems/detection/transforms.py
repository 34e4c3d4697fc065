"""What happens to an image and its boxes before the network: brought to a square, and changed at random in training.

Whatever moves pixels is torchvision's v2, which moves boxes with them. Random numbers come from torch's own generator,
which the caller seeds for each image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_kernels.conversion.options import at_least
from rl_kernels.conversion.zoo import import_torchvision
from rl_kernels.systems.detection.network import STRIDES

FILL = 114
"""Grey level where there is no image."""
LEAST_VISIBLE = 0.1
"""Share of a box that must be left of it for the box to stay."""
LEAST_SIDE = 2.0
"""Pixels of its shorter side that must be left."""


class Sample(NamedTuple):
    """An image on its way through the transforms.

    Attributes:
        image: uint8 ``(3, height, width)``.
        boxes: float32 ``(N, 4)``, xyxy in its pixels.
        labels: int64 ``(N,)``.
        visible: float32 ``(N,)``, share of the area of each box that was not cut off.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    visible: Tensor

    @classmethod
    def of(cls, image: Tensor, boxes: Tensor, labels: Tensor) -> Sample:
        """A sample of which nothing has been cut off."""
        return cls(image, boxes, labels, torch.ones(len(labels)))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[-2], self.image.shape[-1]

    def moved(self, function: Callable[[Any], Any]) -> Sample:
        """Apply one of torchvision's to the image and to its boxes, which may reach out of it afterwards."""
        tv_tensors = import_torchvision().tv_tensors
        # Without a clamping mode boxes are not cut, so that cut() learns how much of them is.
        boxes = tv_tensors.BoundingBoxes(self.boxes, format="XYXY", canvas_size=self.size, clamping_mode=None)
        return self._replace(image=function(self.image), boxes=function(boxes).as_subclass(Tensor))

    def cut(self) -> Sample:
        """Cut the boxes at the borders of the image."""
        height, width = self.size
        inside = self.boxes.clamp(min=0).minimum(self.boxes.new_tensor([width, height, width, height]))
        before, after = ((each[:, 2:] - each[:, :2]).clamp(min=0).prod(1) for each in (self.boxes, inside))
        share = torch.where(before > 0, after / torch.where(before > 0, before, 1), 0)
        return self._replace(boxes=inside, visible=self.visible * share)

    def sanitised(self, least_visible: float = LEAST_VISIBLE, least_side: float = LEAST_SIDE) -> Sample:
        """Cut the boxes at the borders, and leave out those of which too little is left."""
        found = self.cut()
        kept = (found.visible >= least_visible) & ((found.boxes[:, 2:] - found.boxes[:, :2]).amin(1) >= least_side)
        return Sample(found.image, found.boxes[kept], found.labels[kept], found.visible[kept])


def _functional() -> Any:
    import_torchvision()  # Before anything of it: a process that loads data has not imported it.
    from torchvision.transforms.v2 import functional

    return functional


def check_size(size: int) -> None:
    """Raise unless images of this size can be given to the network.

    Raises:
        TypeError: no integer.
        ValueError: no multiple of 32.
    """
    at_least("size", size, STRIDES[-1])
    if size % STRIDES[-1]:
        raise ValueError(f"size: got {size}, expected a multiple of {STRIDES[-1]}")


class Placement(NamedTuple):
    """Where a picture lies in its square: ``height`` and ``width`` there, from ``top`` and ``left`` on."""

    height: int
    width: int
    top: int
    left: int


def placement(height: int, width: int, size: int) -> Placement:
    """Return where a picture lies in a square of ``size`` pixels: as large as it can be, in the middle."""
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    return Placement(rows, columns, (size - rows) // 2, (size - columns) // 2)


def unplaced(boxes: Tensor, height: int, width: int, size: int) -> Tensor:
    """Bring boxes ``(..., 4)``, xyxy, from the square back to the picture, and cut them at its borders."""
    place = placement(height, width, size)
    scale = boxes.new_tensor([width / place.width, height / place.height] * 2)
    found = (boxes - boxes.new_tensor([place.left, place.top] * 2)) * scale
    return found.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))


def fitted(sample: Sample, size: int) -> Sample:
    """Resize, so that the longer side has ``size`` pixels."""
    F = _functional()

    place = placement(*sample.size, size)
    if sample.size == (place.height, place.width):
        return sample
    return sample.moved(lambda each: F.resize(each, [place.height, place.width], antialias=True))


def letterboxed(sample: Sample, size: int) -> Sample:
    """Bring to a square of ``size`` pixels without a change of proportions; grey fills what is left."""
    F = _functional()

    check_size(size)
    place = placement(*sample.size, size)
    sample = fitted(sample, size)
    if sample.size == (size, size):
        return sample
    right, bottom = size - place.width - place.left, size - place.height - place.top
    return sample.moved(lambda each: F.pad(each, [place.left, place.top, right, bottom], fill=FILL))


def mosaic(samples: Sequence[Sample], size: int, centre: tuple[int, int]) -> Sample:
    """Put four images around a point: a canvas of twice ``size``, of which each has a quarter that may cut it.

    Args:
        samples: upper left, upper right, lower left, lower right; no side longer than ``size``.
        size: half a side of the canvas.
        centre: row and column of the point where they meet.

    Raises:
        ValueError: not four, or a point out of the canvas, or an image that is too large.
    """
    if len(samples) != 4 or any(max(each.size) > size for each in samples):
        found = [each.size for each in samples]
        raise ValueError(f"samples: got images of {found}, expected 4 with sides of at most {size}")
    if not all(0 <= each <= 2 * size for each in centre):
        raise ValueError(f"centre: got {centre}, expected two numbers from 0 to {2 * size}")
    canvas = torch.full((3, 2 * size, 2 * size), FILL, dtype=torch.uint8)
    parts = []
    for number, each in enumerate(samples):
        height, width = each.size
        top = centre[0] - height if number < 2 else centre[0]
        left = centre[1] - width if number % 2 == 0 else centre[1]
        rows, columns = (slice(max(start, 0), max(start + n, 0)) for start, n in ((top, height), (left, width)))
        target = canvas[:, rows, columns]
        first, column = max(-top, 0), max(-left, 0)
        target.copy_(each.image[:, first : first + target.shape[1], column : column + target.shape[2]])
        parts.append(each._replace(boxes=each.boxes + each.boxes.new_tensor([left, top] * 2)))
    joined = (torch.cat(each) for each in zip(*((s.boxes, s.labels, s.visible) for s in parts), strict=True))
    return Sample(canvas, *joined).cut()


def window(sample: Sample, top: int, left: int, side: int, size: int) -> Sample:
    """Show a square part of an image, which may reach out of it, at ``size`` pixels; grey is around the image."""
    F = _functional()

    height, width = sample.size
    padding = [max(-left, 0), max(-top, 0), max(left + side - width, 0), max(top + side - height, 0)]
    sample = sample.cut()  # What lies beyond the image is not seen in the grey around it.
    if any(padding):
        sample = sample.moved(lambda each: F.pad(each, padding, fill=FILL))
    sample = sample.moved(lambda each: F.crop(each, max(top, 0), max(left, 0), side, side))
    if side != size:
        sample = sample.moved(lambda each: F.resize(each, [size, size], antialias=True))
    return sample.cut()


@dataclass(frozen=True)
class Augmentation:
    """How images are changed in training; zeros leave them as they are.

    Attributes:
        mosaic: how likely an image is joined with three others of its set.
        flip: how likely left becomes right.
        hue: the most that it is shifted by, either way, in turns of the colour wheel.
        saturation: the most that it becomes more or less, as a share.
        value: the most that brightness becomes more or less, as a share.
        scale: the most that images become larger or smaller, as a share.
        translate: the most that they are moved by, as a share of their size, either way.
    """

    mosaic: float = 1.0
    flip: float = 0.5
    hue: float = 0.015
    saturation: float = 0.7
    value: float = 0.4
    scale: float = 0.5
    translate: float = 0.1

    def __post_init__(self) -> None:
        most = {"hue": 0.5, "scale": 0.9}
        for name, value in vars(self).items():
            if not 0 <= value <= most.get(name, 1.0):
                raise ValueError(f"{name}: got {value}, expected 0 to {most.get(name, 1.0)}")

    def __call__(self, read: Callable[[int], Sample], index: int, count: int, size: int) -> Sample:
        """Return an image as training sees it, drawn from torch's generator.

        Args:
            read: gives an image of the set.
            index: the image's.
            count: images that there are.
            size: height and width of what is returned.
        """
        check_size(size)
        if _random() < self.mosaic:
            others = torch.randint(count, (3,)).tolist()
            centre = torch.randint(size // 2, 3 * size // 2 + 1, (2,)).tolist()
            joined = mosaic([fitted(read(each), size) for each in (index, *others)], size, (centre[0], centre[1]))
            sample = self._zoomed(joined, size)
        else:
            sample = self._zoomed(letterboxed(read(index), size), size)
        return self._coloured(self._flipped(sample)).sanitised()

    def _zoomed(self, sample: Sample, size: int) -> Sample:
        side = round(size / (1 + self.scale * (2 * _random() - 1)))
        top, left = (round((length - side) / 2 + self.translate * size * (2 * _random() - 1)) for length in sample.size)
        same = (top, left, side) == (0, 0, size) and sample.size == (size, size)
        return sample if same else window(sample, top, left, side, size)

    def _flipped(self, sample: Sample) -> Sample:
        F = _functional()

        return sample.moved(F.horizontal_flip) if _random() < self.flip else sample

    def _coloured(self, sample: Sample) -> Sample:
        if not (self.hue or self.saturation or self.value):
            return sample
        import_torchvision()
        from torchvision.transforms import v2

        jitter = v2.ColorJitter(brightness=self.value, saturation=self.saturation, hue=self.hue)
        return sample._replace(image=jitter(sample.image))


def _random() -> float:
    return float(torch.rand(()))
