"""Scenes put together from real crops, with boxes that are exact: animals cut out of photographs, before a photograph.

Everything in a scene follows from its number. Silhouettes are Animal-MNIST's, photographs scikit-image's and
scikit-learn's; no silhouette and no photograph is in both training and test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from rl_kernels.conversion.options import at_least
from rl_kernels.systems.data import sets
from rl_kernels.systems.detection.images import BoxImages, BoxSet, box_set

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

SIZE, TRAIN, TEST = 96, 384, 128
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
"""Animal-MNIST has numbers for these only: the names are what its drawings show."""
TEST_PHOTOGRAPHS = ("chelsea.png", "motorcycle_left.png", "china.jpg")

MAX_OBJECTS = 8
LEAST_SCALE, MOST_SCALE = 12, 48
"""Pixels of an object's longer side before it is turned."""
MAX_ANGLE = 30.0
MAX_IOU = 0.3
LEAST_VISIBLE = 0.4
"""Share of its pixels that an object keeps when others are put before it."""
LEAST_SIDE = 4
"""Pixels of the shorter side of an object's box."""
ATTEMPTS = 20
"""Places that are tried for an object, before the scene does without it."""
TEXTURES = 3
"""Crops of which the one that differs most from what is behind it becomes an object's texture."""
SUPERSAMPLED = 2
SOLID = 0.5
"""Alpha from which on a pixel is the object's."""


@dataclass(frozen=True)
class Material:
    """What scenes are made of.

    Attributes:
        silhouettes: alpha, uint8 ``(n, height, width)``.
        labels: of them, integers ``(n,)``.
        photographs: uint8 ``(height, width, 3)``.
    """

    silhouettes: Bytes
    labels: NDArray[np.int64]
    photographs: Sequence[Bytes]


@dataclass
class _Scene:
    """A scene that is being put together.

    Attributes:
        pixels: ``(size, size, 3)`` from 0 to 1.
        owner: ``(size, size)``, the number of the object that a pixel shows; -1 for the background.
        counts: how many pixels each object had before others came.
        labels: of the objects.
    """

    pixels: Floats
    owner: NDArray[np.int64]
    counts: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def sampled(alpha: Floats, rows: Floats, columns: Floats) -> Floats:
    """Return what lies at places of an array ``(height, width)``, between pixels as well; 0 outside of it.

    Args:
        alpha: values of pixels, whose centres are at .5.
        rows: of the places, any shape.
        columns: of the places, the same shape.
    """
    padded = np.pad(alpha, 1)
    # Half a pixel more than the border is nothing, as everything beyond it is.
    rows = np.clip(rows + 0.5, 0, padded.shape[0] - 1)
    columns = np.clip(columns + 0.5, 0, padded.shape[1] - 1)
    top = np.minimum(rows.astype(np.int64), padded.shape[0] - 2)
    left = np.minimum(columns.astype(np.int64), padded.shape[1] - 2)
    down, right = rows - top, columns - left
    first, flat = top * padded.shape[1] + left, padded.ravel()
    upper = flat[first] + (flat[first + 1] - flat[first]) * right
    first += padded.shape[1]
    lower = flat[first] + (flat[first + 1] - flat[first]) * right
    return upper + (lower - upper) * down


def _along(photograph: Floats, places: Floats) -> Floats:
    """What lies at places along the first axis, between pixels, whose centres are at .5."""
    whole = np.clip((places - 0.5).astype(np.int64), 0, max(len(photograph) - 2, 0))
    share = (places - 0.5 - whole).reshape(-1, *(1,) * (photograph.ndim - 1))
    first = photograph[whole]
    return first + (photograph[np.minimum(whole + 1, len(photograph) - 1)] - first) * share


def tight_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """Return the box around the pixels of a mask ``(height, width)``: left, top, right and bottom edge."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else None


def cut_out(silhouette: Floats, scale: float, angle: float, flipped: bool) -> Floats:
    """Return a silhouette as it is put into a scene: alpha ``(height, width)`` with a soft edge.

    Args:
        silhouette: alpha ``(height, width)`` from 0 to 1, with something in it.
        scale: length of the longer side of what is in it, in pixels.
        angle: by which it is turned, in degrees.
        flipped: left is right.
    """
    box = tight_box(silhouette >= SOLID)
    assert box is not None
    left, top, right, bottom = box
    shape = silhouette[top:bottom, left:right]
    shape = shape[:, ::-1] if flipped else shape
    pixels_each = max(shape.shape) / scale
    # Its diagonal holds it however it is turned; two pixels more for the edge.
    side = math.ceil(math.hypot(*shape.shape) / pixels_each) + 2
    count = side * SUPERSAMPLED
    along = ((np.arange(count) + 0.5) / SUPERSAMPLED - side / 2) * pixels_each
    y, x = np.meshgrid(along, along, indexing="ij")
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    alpha = sampled(shape, y * cos - x * sin + shape.shape[0] / 2, y * sin + x * cos + shape.shape[1] / 2)
    alpha = alpha.reshape(side, SUPERSAMPLED, side, SUPERSAMPLED).mean((1, 3))
    inner = np.pad(alpha, 1)
    for axis in (0, 1):  # 1, 2, 1 feathers the edge.
        inner = (np.roll(inner, 1, axis) + 2 * inner + np.roll(inner, -1, axis)) / 4
    box = tight_box(inner > 0.02)
    assert box is not None
    left, top, right, bottom = box
    return inner[top:bottom, left:right]


def crop(photograph: Bytes, sides: tuple[float, float], shape: tuple[int, int], random: np.random.Generator) -> Floats:
    """Return a crop of a photograph in other colours, ``(*shape, 3)`` from 0 to 1.

    Args:
        photograph: uint8 ``(height, width, 3)``.
        sides: the least and the most pixels of the photograph that the longer side of ``shape`` shows.
        shape: height and width.
        random: what is drawn from.
    """
    most = min(each / part for each, part in zip(photograph.shape, shape, strict=False))
    step = min(random.uniform(*sides) / max(shape), most)
    places, parts = [], []
    for length, part in zip(photograph.shape, shape, strict=False):
        start = random.uniform(0, max(length - part * step, 0.0))
        place = np.clip(start + (np.arange(part) + 0.5) * step, 0.5, length - 0.5)
        first = max(int(place[0]) - 1, 0)
        places.append(place - first)
        parts.append(slice(first, int(place[-1]) + 2))
    rows, columns = places
    found = _along(_along(photograph[tuple(parts)] / 255, rows).swapaxes(0, 1), columns).swapaxes(0, 1)
    gain, shift = random.uniform(0.7, 1.3, 3), random.uniform(-0.1, 0.1)
    return np.clip(found * gain + shift, 0, 1)


def scene(
    material: Material, index: int, side: int, size: int = SIZE
) -> tuple[Bytes, NDArray[np.int64], NDArray[np.int64]]:
    """Make a scene: 1 to 8 objects, each of which shows two fifths of its pixels or more.

    Args:
        material: what it is made of.
        index: the scene's number, from which everything follows.
        side: 0 for training, 1 for test: scenes of one number differ.
        size: height and width in pixels.

    Returns:
        Pixels, uint8 ``(size, size, 3)``; the boxes around the visible part of each object, ``(N, 4)`` xyxy; labels
        ``(N,)``.

    Raises:
        ValueError: silhouettes of which nothing is left when they are made small.
    """
    random = np.random.default_rng((side, index))
    behind = int(random.integers(len(material.photographs)))
    background = crop(material.photographs[behind], (size, size * 5 / 3), (size, size), random)
    made = _Scene(background, np.full((size, size), -1))
    for _ in range(int(random.integers(1, MAX_OBJECTS + 1))):
        _add(made, material, behind, random)
    for _ in range(ATTEMPTS):
        if made.labels:
            break
        _add(made, material, behind, random)
    else:
        raise ValueError(f"material: got silhouettes too thin for a box of {LEAST_SIDE} pixels, expected larger ones")
    boxes = [tight_box(made.owner == number) for number in range(len(made.labels))]
    return np.round(made.pixels * 255).astype(np.uint8), np.array(boxes), np.array(made.labels)


def _add(made: _Scene, material: Material, behind: int, random: np.random.Generator) -> None:
    """Put one object before the others, where it hides none of them and none overlaps it too far."""
    size = len(made.owner)
    chosen = int(random.integers(len(material.labels)))
    most = min(MOST_SCALE, size // 2)
    scale = LEAST_SCALE * (most / LEAST_SCALE) ** random.uniform()
    alpha = cut_out(
        material.silhouettes[chosen] / 255, scale, random.uniform(-MAX_ANGLE, MAX_ANGLE), bool(random.integers(2))
    )
    height, width = alpha.shape
    solid = alpha >= SOLID
    for _ in range(ATTEMPTS):
        top, left = (int(random.integers(0, size - part + 1)) for part in (height, width))
        owner = made.owner.copy()
        owner[top : top + height, left : left + width][solid] = len(made.labels)
        if _allowed(owner, [*made.counts, int(solid.sum())]):
            break
    else:
        return
    others = [number for number in range(len(material.photographs)) if number != behind] or [behind]
    place = made.pixels[top : top + height, left : left + width]
    textures = [
        crop(material.photographs[others[int(random.integers(len(others)))]], (scale, 3 * scale), alpha.shape, random)
        for _ in range(TEXTURES)
    ]
    weight = alpha[..., None]
    differences = [np.abs(((each - place) * weight).sum((0, 1))).sum() for each in textures]
    place += (textures[int(np.argmax(differences))] - place) * weight
    made.owner[:] = owner
    made.counts.append(int(solid.sum()))
    made.labels.append(int(material.labels[chosen]))


def _allowed(owner: NDArray[np.int64], counts: Sequence[int]) -> bool:
    boxes = []
    for number, count in enumerate(counts):
        mask = owner == number
        if mask.sum() < LEAST_VISIBLE * count:
            return False
        box = tight_box(mask)
        if box is None or min(box[2] - box[0], box[3] - box[1]) < LEAST_SIDE:
            return False
        boxes.append(box)
    edges = np.array(boxes, dtype=np.float64)
    inside = np.minimum(edges[:, None, 2:], edges[None, :, 2:]) - np.maximum(edges[:, None, :2], edges[None, :, :2])
    common = inside.clip(min=0).prod(-1)
    area = (edges[:, 2:] - edges[:, :2]).prod(-1)
    overlap = common / (area[:, None] + area[None, :] - common)
    return bool((overlap[~np.eye(len(edges), dtype=bool)] < MAX_IOU).all())


def materials(data: sets.ImageSet, photographs: Mapping[str, Bytes]) -> tuple[Material, Material]:
    """Return what scenes of training and of test are made of: no silhouette and no photograph is in both.

    Args:
        data: silhouettes, as :func:`rl_kernels.systems.data.load` reads ``animals``.
        photographs: uint8 ``(height, width, 3)``, by name; those of ``TEST_PHOTOGRAPHS`` are test.
    """
    made = []
    for part, of_test in ((data.train, False), (data.test, True)):
        assert part.pixels is not None
        alpha = part.pixels[:, 0].numpy()
        there = alpha.max((1, 2)) >= SOLID * 255
        chosen = [each for name, each in photographs.items() if (name in TEST_PHOTOGRAPHS) == of_test]
        made.append(Material(alpha[there], part.labels.numpy()[there], chosen))
    return made[0], made[1]


def load_scenes(size: int = SIZE, train: int = TRAIN, test: int = TEST) -> BoxSet:
    """Make the set ``scenes``: ten classes.

    Args:
        size: height and width in pixels.
        train: number of scenes that are trained on.
        test: number of scenes that are not.

    Raises:
        FileNotFoundError: a package that silhouettes or photographs come from is not installed.
        TypeError: a number that is not an integer.
        ValueError: no scene, or one that is too small for its objects.
    """
    at_least("size", size, 2 * MOST_SCALE)
    at_least("train", train, 1)
    at_least("test", test, 1)
    parts = []
    for side, material in enumerate(materials(sets.load("animals"), sets.photographs())):
        made = [scene(material, index, side, size) for index in range((train, test)[side])]
        pixels = torch.from_numpy(np.stack([pixels for pixels, _, _ in made]).transpose(0, 3, 1, 2).copy())
        boxes = tuple(torch.from_numpy(each).float() for _, each, _ in made)
        parts.append(BoxImages(boxes, tuple(torch.from_numpy(each) for _, _, each in made), pixels))
    return box_set("scenes", ANIMALS, parts[0], parts[1])
