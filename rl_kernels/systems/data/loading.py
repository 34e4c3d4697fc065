"""Batches of images: which, in what order, and how they were changed, all of it a function of seed, epoch and image.

Nothing here keeps a random state, so that a run that goes on in the middle of an epoch sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rl_kernels.conversion.zoo import import_torchvision
from rl_kernels.systems import config as configs
from rl_kernels.systems.data.sets import Images, opened

NOT_COUNTED = -1
"""The seed of an image that a process is given so as to have one."""
IGNORED = -100
"""Its label, which torch's losses and torchmetrics pass over."""


class Batch(NamedTuple):
    """uint8 images ``(B, channels, height, width)`` and int64 labels ``(B,)``."""

    images: Tensor
    labels: Tensor


def mixed_seed(*parts: int) -> int:
    """One seed of 63 bits out of several numbers of at least 0, as different as they are."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class Pictures(Dataset[Batch]):
    """Images as batches: ``__getitems__`` takes ``(index, seed)`` each and gives a whole :class:`Batch`.

    The seed is an epoch's: what is drawn for an image follows from both numbers, and costs nothing where none is drawn.

    Args:
        images: what is read.
        transform: takes and gives a uint8 image ``(channels, height, width)``, and draws from torch's own generator.
        resize: brings an image to the size that all must have; None where they have it.
        channels: of an image that is read from a file: 1 or 3.
    """

    def __init__(
        self,
        images: Images,
        transform: Callable[[Tensor], Tensor] | None,
        resize: Callable[[Tensor], Tensor] | None,
        channels: int,
    ) -> None:
        self.images, self.transform, self.resize, self.channels = images, transform, resize, channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, drawn: list[tuple[int, int]]) -> Batch:
        indices = [index for index, _ in drawn]
        pixels = self.images.pixels
        counted = torch.tensor([seed != NOT_COUNTED for _, seed in drawn])
        labels = self.images.labels[indices].where(counted, IGNORED)
        if pixels is not None and self.transform is None and self.resize is None:
            return Batch(pixels[indices], labels)
        changed = []
        with torch.random.fork_rng(devices=[]):
            for index, seed in drawn:
                image = self._read(index) if pixels is None else pixels[index]
                if self.resize is not None:
                    image = self.resize(image)
                if self.transform is not None:
                    torch.default_generator.manual_seed(mixed_seed(seed, index))
                    image = self.transform(image)
                changed.append(image)
        return Batch(torch.stack(changed), labels)

    def _read(self, index: int) -> Tensor:
        with opened(self.images.files[index]) as picture:
            array = np.array(picture.convert("RGB" if self.channels == 3 else "L"))
        return torch.from_numpy(array).reshape(*array.shape[:2], self.channels).permute(2, 0, 1)


class Order:
    """The batches of one epoch for one process, from one of them on: lists of ``(index, seed)``.

    Args:
        size: images.
        batch_size: images of an update, over all processes. What is left at the end is dropped, if ``shuffled``.
        seed: of the run.
        epoch: from 0.
        first: number of the batch to begin with.
        rank: of this process.
        world: number of processes.
        shuffled: in random order; else in their own.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, epoch: int, first: int, rank: int, world: int, shuffled: bool
    ) -> None:
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, epoch
        self.first, self.rank, self.world, self.shuffled = first, rank, world, shuffled
        self.batches = size // batch_size if shuffled else -(-size // batch_size)

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, seed = torch.arange(self.size), 0
        if self.shuffled:
            seed = mixed_seed(self.seed, self.epoch)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(self.size, generator=generator)
        for number in range(self.first, self.batches):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size].tolist()
            mine = whole[self.rank :: self.world]
            if not mine:  # Every process must run the model where it is sharded.
                yield [(whole[0], NOT_COUNTED)]
                continue
            yield [(index, seed) for index in mine]


def loader(pictures: Pictures, order: Order, workers: int, pin: bool) -> DataLoader[Batch]:
    """Return torch's loader over ``order``; its items are a :class:`Batch` each."""
    return DataLoader(pictures, batch_sampler=order, num_workers=workers, collate_fn=_as_it_is, pin_memory=pin)


def _as_it_is(batch: Any) -> Any:
    return batch


def augmentation(name: str, size: int) -> Callable[[Tensor], Tensor] | None:
    """Return torchvision's transforms of training images, ``size`` pixels a side; None for ``"none"``."""
    if name == "none":
        return None
    import_torchvision()
    from torchvision.transforms import v2

    crop = [v2.RandomCrop(size, padding=max(1, size // 8))]
    steps: dict[str, list[Any]] = {
        "crop": crop,
        "crop-flip": [*crop, v2.RandomHorizontalFlip()],
        "trivial": [*crop, v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()],
        "resized-crop": [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()],
    }
    return v2.Compose(steps[name])


def resizing(size: int, cropped: bool) -> Callable[[Tensor], Tensor]:
    """Return torchvision's transform to ``size`` pixels a side; ``cropped``: ImageNet's 256 of which 224 are taken."""
    import_torchvision()
    from torchvision.transforms import v2

    if not cropped:
        return v2.Resize((size, size), antialias=True)
    return v2.Compose([v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size)])


def statistics_of(images: Images, channels: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, of pixels in 0 .. 1; ImageNet's for files."""
    if images.pixels is None:
        if channels == 3:
            return torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return torch.tensor([0.449]), torch.tensor([0.226])
    pixels = images.pixels.transpose(0, 1).flatten(1).double() / 255
    return pixels.mean(1).float(), pixels.std(1).clamp(min=1e-3).float()


def pictures(data: configs.Data, images: Images, size: int, channels: int, training: bool) -> Pictures:
    """Return ``images`` as a config has them: resized, and augmented if they are trained on."""
    transform = augmentation(data.augmentation, size) if training else None
    own = images.pixels is not None and images.pixels.shape[-2:] == (size, size)
    resize = None
    if not own and not (training and data.augmentation == "resized-crop"):
        resize = resizing(size, cropped=images.pixels is None)
    return Pictures(images, transform, resize, channels)
