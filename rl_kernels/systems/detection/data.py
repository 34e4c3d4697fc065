"""Data sets for detection by their names, and batches of them as the runner takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rl_kernels.conversion.zoo import import_torchvision
from rl_kernels.systems.data.loading import NOT_COUNTED, Batch, mixed_seed
from rl_kernels.systems.data.sets import data_root
from rl_kernels.systems.detection.assigning import Targets
from rl_kernels.systems.detection.folders import coco_pair, load_coco, load_folder
from rl_kernels.systems.detection.images import BoxImages, BoxSet
from rl_kernels.systems.detection.scenes import load_scenes
from rl_kernels.systems.detection.transforms import Augmentation, Sample, check_size, letterboxed
from rl_kernels.systems.detection.trees import load_trees

PADDING, NOT_SCORED = -1, -2
"""Classes of rows without a box: one that fills up, and the first row of an image that is not scored."""

_HERE: dict[str, Callable[[], BoxSet]] = {"trees": load_trees, "scenes": load_scenes}
NAMES = tuple(_HERE)


def load(name: str, root: str | None = None, download: bool = False) -> BoxSet:
    """Read a data set with boxes.

    Args:
        name: one of ``NAMES``; a folder in the form of YOLO or COCO (:mod:`.folders`), also one below ``root``; or two
            files in COCO's form, training and test, with a comma between them.
        root: folder of data sets, as :func:`rl_kernels.systems.data.sets.data_root` has it.
        download: changes nothing: no set with boxes is downloaded.

    Raises:
        FileNotFoundError: it is not there; the message says what was looked for.
        ValueError: its files are not what they should be; the message names file and line.
        ImportError: Pillow, PyYAML or scikit-learn is missing.
    """
    if name in _HERE:
        return _HERE[name]()
    files = [Path(each.strip()) for each in name.split(",")]
    if len(files) == 2 and all(each.suffix == ".json" for each in files):
        return load_coco((files[0], files[1]), files[0].parent, files[0].resolve().parent.name)
    folder = next((each for each in (Path(name), data_root(root) / name) if each.is_dir()), None)
    if folder is None:
        hint = "; sets with boxes are not downloaded" if download else ""
        raise FileNotFoundError(
            f"data: got {name!r}, expected a folder, TRAIN.json,TEST.json, or one of {', '.join(NAMES)}{hint}"
        )
    pair = coco_pair(folder)
    named = folder.resolve().name
    return load_folder(folder, named) if pair is None else load_coco(pair, folder, named)


class BoxPictures(Dataset[Batch]):
    """Images with boxes as batches: ``__getitems__`` takes ``(index, seed)`` each and gives a whole :class:`Batch`.

    Its images are uint8 ``(B, 3, size, size)``; its labels float32 ``(B, M, 5)``, rows of class and xyxy in pixels of
    these images. Rows without a box have the class ``PADDING``; M is at least 1. The first row of an image that a
    process was given so as to have one (seed ``NOT_COUNTED``) has ``NOT_SCORED``, and it has no boxes.

    What is drawn for an image, the others of its mosaic included, follows from index and seed.

    Args:
        images: what is read.
        size: height and width, a multiple of 32.
        augmentation: of training images; without one they are brought to ``size`` only.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: one that is no multiple of 32.
    """

    def __init__(self, images: BoxImages, size: int, augmentation: Augmentation | None = None) -> None:
        check_size(size)
        import_torchvision()
        self.images, self.size, self.augmentation = images, size, augmentation

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, drawn: list[tuple[int, int]]) -> Batch:
        samples = []
        with torch.random.fork_rng(devices=[]):
            for index, seed in drawn:
                if self.augmentation is None or seed == NOT_COUNTED:
                    samples.append(letterboxed(self._read(index), self.size).sanitised(0, 0))
                    continue
                torch.default_generator.manual_seed(mixed_seed(seed, index))
                samples.append(self.augmentation(self._read, index, len(self), self.size))
        counted = [seed != NOT_COUNTED for _, seed in drawn]
        most = max([1, *(len(each.labels) for each, wanted in zip(samples, counted, strict=True) if wanted)])
        labels = torch.zeros(len(samples), most, 5)
        labels[..., 0] = PADDING
        for row, each, wanted in zip(labels, samples, counted, strict=True):
            if wanted:
                row[: len(each.labels), 0] = each.labels.float()
                row[: len(each.labels), 1:] = each.boxes
            else:
                row[0, 0] = NOT_SCORED
        return Batch(torch.stack([each.image for each in samples]), labels)

    def _read(self, index: int) -> Sample:
        return Sample.of(self.images.read(index), self.images.boxes[index], self.images.labels[index])


def check_labels(labels: Tensor) -> None:
    """Raise unless these are labels of a batch, ``(B, M, 5)``.

    Raises:
        ValueError: another shape.
    """
    if labels.ndim != 3 or labels.shape[2] != 5:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected (B, M, 5): class and xyxy")


def targets_of(labels: Tensor) -> Targets:
    """Return the boxes of a batch's labels, ``(B, M, 5)``, as the losses take them; rows without a box are not valid.

    Raises:
        ValueError: another shape.
    """
    check_labels(labels)
    classes = labels[..., 0]
    return Targets(labels[..., 1:], classes.clamp(min=0).long(), classes >= 0)


def scored(labels: Tensor) -> Tensor:
    """Return which images of a batch's labels ``(B, M, 5)`` are scored, bool ``(B,)``.

    Raises:
        ValueError: another shape.
    """
    check_labels(labels)
    return labels[:, 0, 0] != NOT_SCORED
