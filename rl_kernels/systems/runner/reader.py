"""How batches of images reach a model: on the device of the run, standardised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rl_kernels.systems.config import Config
from rl_kernels.systems.contract import ImageShape
from rl_kernels.systems.data import loading

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class FabricReader:
    """Reads images as models take them.

    Args:
        fabric: of the run.
        config: the run's.
        shape: of its images.
    """

    def __init__(self, fabric: Fabric, config: Config, shape: ImageShape) -> None:
        self.fabric, self.config, self.shape = fabric, config, shape
        self.device = fabric.device
        made = (torch.tensor(each, device=fabric.device).reshape(1, -1, 1, 1) for each in (shape.mean, shape.std))
        self.mean, self.std = made

    def loader(self, pictures: Any, order: loading.Order) -> Iterator[loading.Batch]:
        """Yield batches, as they are stored."""
        pin = self.device.type == "cuda"
        yield from loading.loader(pictures, order, self.config.data.workers, pin)

    def on_device(self, batch: loading.Batch) -> tuple[Tensor, Tensor]:
        """Return the images as the model takes them, and their labels."""
        pixels, labels = (each.to(self.device, non_blocking=True) for each in batch)
        images = pixels.float() / 255
        if self.shape.mean:
            images = (images - self.mean) / self.std
        if self.config.runtime.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def share(self, pictures: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of all images, in their order."""
        yield from self._in_order(pictures, self.fabric.global_rank, self.fabric.world_size)

    def all_of(self, pictures: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images once, in their order, and their labels."""
        yield from self._in_order(pictures, 0, 1)

    def _in_order(self, pictures: Any, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = loading.Order(len(pictures), self.config.batch_size, 0, 0, 0, rank, world, shuffled=False)
        for batch in self.loader(pictures, order):
            yield self.on_device(batch)
