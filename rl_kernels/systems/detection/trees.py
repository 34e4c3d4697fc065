"""Trees seen from above: aerial images of the package deepforest, cut into tiles, with a box of each crown.

The package (MIT, its images are of the National Ecological Observatory Network) is read where it lies, never imported.
Training and test are different places: tiles of neither show what a tile of the other shows.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl_kernels.systems.data.packages import package_file
from rl_kernels.systems.detection.images import BoxImages, BoxSet, Tally, box_set, read_picture, tidied

REQUIREMENT = "deepforest==2.1.0"
FILES = {
    "2019_YELL_2_528000_4978000_image_crop2": (
        "a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767",
        "bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11",
    ),
    "2019_YELL_2_541000_4977000_image_crop": (
        "178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131",
        "cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631",
    ),
    "OSBS_029": (
        "d9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee",
        "1f68c4011d7b351c29ca755072e77f3d16e6fd1f995bd05a9dd4eb952b55373c",
    ),
    "SOAP_061": (
        "256508f1a62149bec4a80879077a865caf50e8cace095e6564c76befa480d424",
        "4833280af75fd9c47965a93e38945282835e9e725cac412bdb9469d63480947c",
    ),
}
"""SHA-256 of each image (.png) and of its boxes (.xml)."""
TREES = ("Tree", "Dead", "Alive")
"""What boxes are called; one image alone tells dead trees from others, so that all are one class."""
TILE, OVERLAP = 256, 32
LEAST_VISIBLE = 0.4
"""Share of a box that a tile must show for the box to be the tile's."""


class Area(NamedTuple):
    """A part of an image, in its pixels: from ``left`` and ``top`` on, as far as ``right`` and ``bottom``."""

    image: str
    left: int
    top: int
    right: int
    bottom: int


def areas(sizes: dict[str, tuple[int, int]]) -> tuple[list[Area], list[Area]]:
    """Return the areas of training and test: YELL's images are test in their right third, the others in whole.

    Args:
        sizes: height and width of each image.
    """
    train, test = [], []
    for name, (height, width) in sizes.items():
        border = width * 2 // 3 if "YELL" in name else 0
        if border:
            train.append(Area(name, 0, 0, border, height))
        test.append(Area(name, border, 0, width, height))
    return train, test


def tiles(area: Area) -> list[Area]:
    """Return the tiles that cover an area, row by row; the last of a row and the last row overlap more than others.

    Raises:
        ValueError: an area smaller than a tile.
    """
    found = []
    for top in _starts(area.top, area.bottom):
        for left in _starts(area.left, area.right):
            found.append(Area(area.image, left, top, left + TILE, top + TILE))
    return found


def _starts(first: int, end: int) -> list[int]:
    if end - first < TILE:
        raise ValueError(f"area: got {end - first} pixels from side to side, expected no less than {TILE}")
    return [*range(first, end - TILE, TILE - OVERLAP), end - TILE]


def read_voc(path: Path) -> tuple[Tensor, list[str]]:
    """Return the boxes of a file of Pascal VOC's form, float32 ``(N, 4)`` xyxy, and what each is called.

    VOC counts pixels from 1, and a box's last pixel is inside it.

    Raises:
        ValueError: the file has another form.
    """
    boxes, names = [], []
    try:
        for each in ET.parse(path).getroot().iter("object"):
            left, top, right, bottom = (
                float(each.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")
            )
            boxes.append([left - 1, top - 1, right, bottom])
            names.append(each.findtext("name", ""))
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"data: {path} is no file of boxes as Pascal VOC has them: {error}") from error
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), names


def boxes_in(boxes: Tensor, tile: Area) -> Tensor:
    """Return those of the boxes ``(N, 4)`` that a tile shows enough of, cut at its borders, in its own pixels."""
    moved = boxes - boxes.new_tensor([tile.left, tile.top, tile.left, tile.top])
    limits = (tile.bottom - tile.top, tile.right - tile.left)
    cut = moved.clamp(min=0).minimum(moved.new_tensor([limits[1], limits[0], limits[1], limits[0]]))
    seen = (cut[:, 2:] - cut[:, :2]).clamp(min=0).prod(1)
    return cut[seen >= LEAST_VISIBLE * (moved[:, 2:] - moved[:, :2]).prod(1)]


def cut_into_tiles(
    chosen: Sequence[Area], pictures: dict[str, NDArray[np.uint8]], boxes: dict[str, Tensor]
) -> BoxImages:
    """Return the tiles of areas.

    Args:
        chosen: the areas.
        pictures: uint8 ``(height, width, 3)``, by name.
        boxes: ``(N, 4)``, xyxy in pixels of the picture, by name.
    """
    pixels, found = [], []
    for area in chosen:
        for tile in tiles(area):
            part = pictures[tile.image][tile.top : tile.bottom, tile.left : tile.right]
            pixels.append(torch.from_numpy(part.transpose(2, 0, 1).copy()))
            found.append(boxes_in(boxes[tile.image], tile))
    labels = tuple(torch.zeros(len(each), dtype=torch.int64) for each in found)
    return BoxImages(tuple(found), labels, torch.stack(pixels))


def load_trees() -> BoxSet:
    """Read the set ``trees``: tiles of 256 pixels, one class.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: its files are not the ones that they should be.
    """
    pictures, boxes, tally = {}, {}, Tally("trees")
    for name, (of_image, of_boxes) in FILES.items():
        pictures[name] = read_picture(package_file("deepforest", REQUIREMENT, f"data/{name}.png", of_image))
        path = package_file("deepforest", REQUIREMENT, f"data/{name}.xml", of_boxes)
        found, names = read_voc(path)
        if unknown := sorted(set(names) - set(TREES)):
            raise ValueError(f"data: {path} has boxes of {unknown}, expected {', '.join(TREES)}")
        labels = torch.zeros(len(found), dtype=torch.int64)
        boxes[name], _ = tidied(found, labels, pictures[name].shape[:2], tally)
    train, test = areas({name: picture.shape[:2] for name, picture in pictures.items()})
    parts = [cut_into_tiles(part, pictures, boxes) for part in (train, test)]
    return box_set("trees", ["tree"], parts[0], parts[1], tally.notes())
