"""Data sets with boxes that a user has: YOLO's text files, or COCO's JSON.

YOLO: ``FOLDER/train/images/*`` beside ``FOLDER/train/labels/*.txt``, and the same in ``test``, ``val`` or ``valid``; or
``FOLDER/images/train`` beside ``FOLDER/labels/train``. A line is a class and a box's centre, width and height, or a
polygon's corners, as shares of the image's width and height. Classes are named in ``data.yaml`` (``names``; its paths
are not used) or ``classes.txt``, a line each. An image without a text file has no boxes.

COCO: ``FOLDER/annotations/*.json``, ``FOLDER/*.json``, or one JSON in ``FOLDER/train`` and one in its neighbour; which
is which their names say. Crowds are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_kernels.systems.data.sets import SUFFIXES, opened
from rl_kernels.systems.detection.boxes import from_centred
from rl_kernels.systems.detection.images import (
    BoxImages,
    BoxSet,
    Tally,
    box_set,
    picture_size,
    read_picture,
    tidied,
)

TEST_PARTS = ("test", "val", "valid")
READ_WHOLE = 2_000
"""Images of a part that are decoded when the set is read; of more only the headers are, and a file that ends too early
is met when it is due."""
FARTHEST = 2.0
"""Shares of an image that lie farther out are taken for pixels, which these should not be."""


def _size_of(path: Path, whole: bool) -> tuple[int, int]:
    """Height and width of a picture, which is decoded if ``whole``; ValueError where it is none."""
    if whole:
        height, width = read_picture(path).shape[:2]
        return height, width
    with opened(path) as picture:
        return picture_size(picture)


def _part(files: list[Path], found: list[tuple[Tensor, Tensor]], tally: Tally) -> BoxImages:
    """The images of a part that could be read."""
    if not files:
        raise ValueError(f"data: none of the images of {tally.part} can be used: {'; '.join(tally.notes())}")
    tally.warn()
    return BoxImages(tuple(boxes for boxes, _ in found), tuple(labels for _, labels in found), files=tuple(files))


def load_folder(folder: Path, name: str) -> BoxSet:
    """Read a folder in YOLO's form.

    Raises:
        FileNotFoundError: images, labels or the classes' names are not where they should be.
        ValueError: a line that is none, a class out of range, or no image that can be read.
        ImportError: PyYAML is missing, and there is a ``data.yaml``.
    """
    train = _yolo_part(folder, "train")
    test = next((each for part in TEST_PARTS if (each := _yolo_part(folder, part)) is not None), None)
    if train is None or test is None:
        raise FileNotFoundError(
            f"data: {folder} has no images of {'training' if train is None else 'test'}, expected FOLDER/train/images "
            f"beside FOLDER/train/labels, and the same in one of {', '.join(TEST_PARTS)}; or, in COCO's form, "
            f"FOLDER/annotations/*.json"
        )
    classes = _class_names(folder)
    parts, notes = [], []
    for images, labels in (train, test):
        tally = Tally(str(images))
        parts.append(_read_yolo(images, labels, len(classes), tally))
        notes += tally.notes()
    return box_set(name, classes, parts[0], parts[1], notes, folder)


def _yolo_part(folder: Path, part: str) -> tuple[Path, Path] | None:
    for images, labels in ((Path(part, "images"), Path(part, "labels")), (Path("images", part), Path("labels", part))):
        if (folder / images).is_dir() and (folder / labels).is_dir():
            return folder / images, folder / labels
    return None


def _class_names(folder: Path) -> list[str]:
    listed, plain = folder / "data.yaml", folder / "classes.txt"
    if listed.is_file():
        import yaml

        try:
            read = yaml.safe_load(listed.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"data: {listed} is no YAML: {error}") from error
        names = read.get("names") if isinstance(read, dict) else None
        if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, list) or not names:
            raise ValueError(f"data: {listed} has names {names!r}, expected a list, or a name for each number from 0")
        return [str(each) for each in names]
    if plain.is_file():
        names = [line.strip() for line in plain.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not names:
            raise ValueError(f"data: {plain} is empty, expected the name of a class in each line")
        return names
    raise FileNotFoundError(f"data: {folder} has no data.yaml and no classes.txt, expected the classes' names in one")


def _read_yolo(images: Path, labels: Path, classes: int, tally: Tally) -> BoxImages:
    paths = [path for path in sorted(images.rglob("*")) if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise FileNotFoundError(f"data: no image in {images}, expected {', '.join(SUFFIXES)}")
    texts = [labels / path.relative_to(images).with_suffix(".txt") for path in paths]
    if not any(text.is_file() for text in texts):
        raise FileNotFoundError(f"data: no image of {images} has a text file in {labels}, expected {texts[0]}")
    files, found = [], []
    for path, text in zip(paths, texts, strict=True):
        # Text is looked at first: a wrong class is an error also where the image is broken.
        rows = list(_yolo_rows(text, classes)) if text.is_file() else []
        try:
            height, width = _size_of(path, len(paths) <= READ_WHOLE)
        except ValueError as error:
            tally.broken.append(str(error))
            continue
        shares = torch.tensor([row[1:] for row in rows], dtype=torch.float64).reshape(-1, 4)
        boxes = from_centred(shares) * shares.new_tensor([width, height, width, height])
        files.append(path)
        found.append(tidied(boxes, torch.tensor([row[0] for row in rows]), (height, width), tally))
    return _part(files, found, tally)


def _yolo_rows(path: Path, classes: int) -> Iterator[tuple[int, float, float, float, float]]:
    """Class, centre, width and height of each line."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"data: {path}:{number}"
        try:
            label, values = float(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            label, values = math.nan, []
        # A polygon has three corners or more; five values would be a box with a score.
        if not label.is_integer() or not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
            raise ValueError(f"{where} is {line!r}, expected a class and four numbers, or a class and a polygon")
        if not 0 <= label < classes:
            raise ValueError(f"{where} has class {label:g}, expected 0 to {classes - 1}")
        if not all(abs(value) <= FARTHEST for value in values):
            raise ValueError(f"{where} is {line!r}, expected shares of width and height, from 0 to 1")
        if len(values) > 4:
            xs, ys = values[::2], values[1::2]
            values = [(min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)]
        yield int(label), values[0], values[1], values[2], values[3]


def coco_pair(folder: Path) -> tuple[Path, Path] | None:
    """Return the files of training and test of a folder in COCO's form; None where it has another.

    Raises:
        ValueError: several that may be meant.
    """
    for place in (folder / "annotations", folder):
        files = sorted(place.glob("*.json"))
        # COCO's own folder has captions and key points of the same images.
        files = [path for path in files if path.stem.startswith("instances")] or files
        train, test = (
            [path for path in files if any(part in path.stem for part in parts)] for parts in (("train",), TEST_PARTS)
        )
        if len(train) > 1 or len(test) > 1:
            names = [path.name for path in (*train, *test)]
            raise ValueError(f"data: {place} has {names}, expected one file of training and one of test")
        if train and test:
            return train[0], test[0]
    inside = [sorted((folder / part).glob("*.json")) for part in ("train", *TEST_PARTS)]
    found = [files[0] for files in inside if len(files) == 1]
    return (found[0], found[1]) if len(inside[0]) == 1 and len(found) > 1 else None


def load_coco(pair: tuple[Path, Path], folder: Path, name: str) -> BoxSet:
    """Read two files in COCO's form, training and test.

    Args:
        pair: the files.
        folder: where images are looked for, besides the files' own folders.
        name: of the set.

    Raises:
        FileNotFoundError: a file, or all of its images, are not there.
        ValueError: a file that is none of COCO's, other categories in the second, or no image that can be read.
    """
    parts, notes = [], []
    classes: dict[int, str] = {}
    for path in pair:
        read = _read_json(path)
        its = {each["id"]: str(each["name"]) for each in read["categories"]}
        if classes and its != classes:
            raise ValueError(f"data: {path} has categories {its}, expected those of {pair[0]}, {classes}")
        if not its:
            raise ValueError(f"data: {path} has no categories")
        classes = its
        tally = Tally(str(path))
        parts.append(_read_coco(path, read, folder, tally))
        notes += tally.notes()
    names = [classes[number] for number in sorted(classes)]
    return box_set(name, names, parts[0], parts[1], notes, folder)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} is not there, expected a JSON in COCO's form")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        wanted = {
            "images": {"id", "file_name"},
            "annotations": {"id", "image_id", "category_id"},
            "categories": {"id", "name"},
        }
        for key, fields in wanted.items():
            for each in read[key]:
                if not fields <= each.keys():
                    raise KeyError(f"one of its {key} has no {', '.join(sorted(fields - each.keys()))}")
        for each in read["categories"]:
            if not isinstance(each["id"], int):
                raise TypeError(f"a category has id {each['id']!r}, expected an integer")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data: {path} is not in COCO's form (images, annotations, categories): {error}") from error
    return read


def _read_coco(path: Path, read: dict[str, Any], folder: Path, tally: Tally) -> BoxImages:
    numbers = {number: label for label, number in enumerate(sorted(each["id"] for each in read["categories"]))}
    rows: dict[Any, list[tuple[int, list[float]]]] = {each["id"]: [] for each in read["images"]}
    for each in read["annotations"]:
        where = f"data: {path}: annotation {each['id']}"
        if each["image_id"] not in rows:
            raise ValueError(f"{where} is of image {each['image_id']}, which is not among its images")
        if each["category_id"] not in numbers:
            raise ValueError(f"{where} has category {each['category_id']}, expected one of {sorted(numbers)}")
        if each.get("iscrowd"):
            tally.crowds += 1
            continue
        box = each.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(_finite(value) for value in box):
            raise ValueError(f"{where} has bbox {box!r}, expected four numbers: left, top, width and height")
        left, top, width, height = box
        rows[each["image_id"]].append((numbers[each["category_id"]], [left, top, left + width, top + height]))
    place = _images_of(path, folder, [str(each["file_name"]) for each in read["images"]])
    files, found = [], []
    for each in read["images"]:
        file = place / str(each["file_name"])
        try:
            size = _size_of(file, len(rows) <= READ_WHOLE)
            told = (each.get("height") or size[0], each.get("width") or size[1])
            if told != size:
                raise ValueError(f"data: {file} is {size[1]}x{size[0]}, {path} says {told[1]}x{told[0]}")
        except ValueError as error:
            tally.broken.append(str(error))
            continue
        mine = rows[each["id"]]
        boxes = torch.tensor([row for _, row in mine], dtype=torch.float64)
        files.append(file)
        found.append(tidied(boxes, torch.tensor([label for label, _ in mine]), size, tally))
    return _part(files, found, tally)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _images_of(path: Path, folder: Path, names: list[str]) -> Path:
    """The folder in which the images of a file lie: that in which most of the first ones are."""
    if not names:
        raise ValueError(f"data: {path} has no images")
    # Of instances_train2017.json the images are in train2017.
    part = path.stem.rpartition("_")[2]
    short = next((each for each in ("train", *TEST_PARTS) if each in path.stem), part)
    below = [Path(), *(Path(*each) for each in ((part,), (short,), ("images",), ("images", part), ("images", short)))]
    places = [path.parent, *(folder / each for each in below)]
    counts = [sum((place / name).is_file() for name in names[:100]) for place in places]
    if not max(counts):
        looked = ", ".join(dict.fromkeys(str(place) for place in places))
        raise FileNotFoundError(f"data: {path} names {names[0]}, which is in none of {looked}")
    return places[counts.index(max(counts))]
