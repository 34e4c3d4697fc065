"""Images with boxes: what a set of them is, which boxes count, and how a picture is read from a file."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl_kernels.systems.data.sets import opened

if TYPE_CHECKING:
    from PIL.Image import Image

THINNEST = 1e-3
"""Pixels: a box with a shorter side is no box. Annotations round, so that 0 would let some of these through."""
NAMED = 5
"""Broken files that a warning names; of others it says how many."""
TURNED = (5, 6, 7, 8)
"""Values of EXIF's orientation at which width and height change places."""
ORIENTATION = 0x0112


@dataclass(frozen=True)
class BoxImages:
    """Images with their boxes, in memory or in files that are read as they are asked for.

    Attributes:
        boxes: of each image float32 ``(N, 4)``, xyxy in its pixels, within it; N may be 0.
        labels: of each image int64 ``(N,)``, numbers of classes.
        pixels: uint8 ``(n, 3, height, width)``, or None where ``files`` stand for them.
        files: of the images, if they are not in memory.

    Raises:
        ValueError: numbers of images, or shapes, that do not go together.
    """

    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    pixels: Tensor | None = None
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        images = len(self.files) if self.pixels is None else len(self.pixels)
        if not len(self.boxes) == len(self.labels) == images:
            raise ValueError(
                f"boxes, labels: got those of {len(self.boxes)} and {len(self.labels)} images, expected {images}"
            )
        for index, (boxes, labels) in enumerate(zip(self.boxes, self.labels, strict=True)):
            if boxes.shape != (len(labels), 4) or labels.ndim != 1:
                shapes = f"{tuple(boxes.shape)} and {tuple(labels.shape)}"
                raise ValueError(f"boxes[{index}], labels[{index}]: got shapes {shapes}, expected (N, 4) and (N,)")

    def __len__(self) -> int:
        return len(self.boxes)

    def read(self, index: int) -> Tensor:
        """Return an image, uint8 ``(3, height, width)``.

        Raises:
            ValueError: its file is no image that can be read.
        """
        if self.pixels is not None:
            return self.pixels[index]
        return torch.from_numpy(read_picture(self.files[index])).permute(2, 0, 1)

    def take(self, indices: Sequence[int]) -> BoxImages:
        """Return those at ``indices``."""
        pixels = None if self.pixels is None else self.pixels[list(indices)]
        files = tuple(self.files[i] for i in indices) if self.files else ()
        return BoxImages(tuple(self.boxes[i] for i in indices), tuple(self.labels[i] for i in indices), pixels, files)


@dataclass(frozen=True)
class BoxSet:
    """A data set for detection.

    Attributes:
        name: as ``data.load`` has it, or a folder's name.
        classes: their names, in the labels' order.
        train: what is trained on.
        test: what is not.
        sha256: of classes, boxes and labels, and of pixels or the files' names and sizes, as hexadecimal text.
        notes: what was left out or changed while it was read, in sentences.
    """

    name: str
    classes: tuple[str, ...]
    train: BoxImages
    test: BoxImages
    sha256: str
    notes: tuple[str, ...] = ()


def box_set(
    name: str, classes: Sequence[str], train: BoxImages, test: BoxImages, notes: Sequence[str] = (), root: Path = Path()
) -> BoxSet:
    """Return the set with its hash; files are hashed by their names below ``root`` and their sizes.

    Raises:
        ValueError: a label that names no class.
    """
    total = hashlib.sha256("\n".join(classes).encode())
    for part in (train, test):
        for index, labels in enumerate(part.labels):
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
                raise ValueError(f"labels[{index}]: got {labels.unique().tolist()}, expected 0 to {len(classes) - 1}")
        if part.pixels is not None:
            total.update(part.pixels.contiguous().numpy().tobytes())
        for path in part.files:
            inside = path.relative_to(root) if path.is_relative_to(root) else path
            total.update(f"{inside.as_posix()} {path.stat().st_size}\n".encode())
        for boxes, labels in zip(part.boxes, part.labels, strict=True):
            total.update(f"{len(labels)}\n".encode() + boxes.numpy().tobytes() + labels.numpy().tobytes())
    return BoxSet(name, tuple(classes), train, test, total.hexdigest(), tuple(notes))


@dataclass
class Tally:
    """Counts what is left out of a part of a set, and changed in it, while it is read.

    Attributes:
        part: as messages name it.
        clipped: boxes that reached out of their image.
        outside: boxes that lay outside of it.
        degenerate: boxes without an area.
        crowds: boxes of a crowd, of which nobody counted the members.
        broken: what was wrong with each file that could not be used, which it names.
    """

    part: str
    clipped: int = 0
    outside: int = 0
    degenerate: int = 0
    crowds: int = 0
    broken: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Return what happened in sentences."""
        told = (
            (self.clipped, "boxes cut at the border of their image"),
            (self.outside, "boxes outside of their image dropped"),
            (self.degenerate, "boxes without an area dropped"),
            (self.crowds, "boxes of crowds dropped"),
            (len(self.broken), f"images skipped: {'; '.join(self.broken[:NAMED])}"),
        )
        rest = len(self.broken) - NAMED
        return [f"{self.part}: {n} {what}" for n, what in told if n] + ([f"and {rest} more"] if rest > 0 else [])

    def warn(self) -> None:
        """Warn if something is missing that a user may believe to be there."""
        if self.outside or self.degenerate or self.broken:
            warnings.warn("data: " + "; ".join(self.notes()), stacklevel=3)


def tidied(boxes: Tensor, labels: Tensor, size: tuple[int, int], tally: Tally) -> tuple[Tensor, Tensor]:
    """Cut boxes at the border of their image, and leave out those without an area and those outside.

    Args:
        boxes: ``(N, 4)``, xyxy in pixels, finite.
        labels: ``(N,)``.
        size: the image's height and width.
        tally: counts what happens.
    """
    boxes = boxes.reshape(-1, 4)
    flat = (boxes[:, 2:] - boxes[:, :2]).amin(1) < THINNEST
    height, width = size
    cut = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    outside = ~flat & ((cut[:, 2:] - cut[:, :2]).amin(1) < THINNEST)
    kept = ~flat & ~outside
    tally.degenerate += int(flat.sum())
    tally.outside += int(outside.sum())
    # Half a pixel is what a rounded annotation may be off by.
    tally.clipped += int(((cut - boxes)[kept].abs().amax(1) > 0.5).sum()) if bool(kept.any()) else 0
    return cut[kept].float(), labels[kept].long()


def picture_size(picture: Image) -> tuple[int, int]:
    """Return height and width of a picture as it is looked at: turned as its EXIF data say."""
    from PIL import Image

    width, height = picture.size
    # The method of PNG files would decode the pixels.
    return (width, height) if Image.Image.getexif(picture).get(ORIENTATION) in TURNED else (height, width)


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Return the pixels of a file as RGB, uint8 ``(height, width, 3)``, turned as its EXIF data say.

    Grey levels become three equal channels; of 16 bits the upper eight are taken, of several frames the first.

    Raises:
        ValueError: it is no image that can be read, or one whose numbers are no grey levels.
    """
    from PIL import Image, ImageOps

    try:
        with opened(path) as picture:
            if picture.mode == "F":
                raise ValueError(f"data: {path} has floating-point pixels, expected 8 or 16 bits")
            upright = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):
                return _from_16_bits(path, np.asarray(upright))
            return np.array(upright.convert("RGB"))
    except (SyntaxError, Image.DecompressionBombError) as error:  # How Pillow names a broken PNG, and a huge image.
        raise ValueError(f"data: {path} is no image that can be read: {error}") from error


def _from_16_bits(path: Path, levels: NDArray[Any]) -> NDArray[np.uint8]:
    if levels.size and not 0 <= int(levels.min()) <= int(levels.max()) < 1 << 16:
        raise ValueError(f"data: {path} has pixels from {levels.min()} to {levels.max()}, expected 8 or 16 bits")
    return np.repeat((levels.astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
