"""What a model is worth: loss and accuracy on images, and how a batch of them reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rl_kernels.systems.config import Config
from rl_kernels.systems.contract import ImageShape
from rl_kernels.systems.data import loading

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Reader:
    """Reads images as models take them: on the device, standardised.

    Args:
        fabric: of the run.
        config: the run's.
        shape: of its images.
    """

    def __init__(self, fabric: Fabric, config: Config, shape: ImageShape) -> None:
        self.fabric, self.config, self.shape = fabric, config, shape
        made = (torch.tensor(each, device=fabric.device).reshape(1, -1, 1, 1) for each in (shape.mean, shape.std))
        self.mean, self.std = made

    def loader(self, pictures: loading.Pictures, order: loading.Order) -> Iterator[loading.Batch]:
        """Yield batches, as they are stored."""
        pin = self.fabric.device.type == "cuda"
        yield from loading.loader(pictures, order, self.config.data.workers, pin)

    def on_device(self, batch: loading.Batch) -> tuple[Tensor, Tensor]:
        """Return the images as the model takes them, and their labels."""
        pixels, labels = (each.to(self.fabric.device, non_blocking=True) for each in batch)
        images = (pixels.float() / 255 - self.mean) / self.std
        if self.config.runtime.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def all_of(self, pictures: loading.Pictures) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images once, in their order, and their labels."""
        order = loading.Order(len(pictures), self.config.batch_size, 0, 0, 0, 0, 1, shuffled=False)
        for batch in self.loader(pictures, order):
            images, labels = self.on_device(batch)
            counted = labels != loading.IGNORED
            yield images[counted], labels[counted]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, pictures: loading.Pictures) -> dict[str, float]:
        """Return mean cross-entropy and accuracy, over all processes."""
        from torchmetrics.aggregation import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        fabric = self.fabric
        accuracy = MulticlassAccuracy(self.shape.classes, average="micro", ignore_index=loading.IGNORED)
        accuracy, loss = accuracy.to(fabric.device), MeanMetric().to(fabric.device)
        batch_size = self.config.batch_size
        order = loading.Order(len(pictures), batch_size, 0, 0, 0, fabric.global_rank, fabric.world_size, shuffled=False)
        model.eval()
        for batch in self.loader(pictures, order):
            images, labels = self.on_device(batch)
            counted = int((labels != loading.IGNORED).sum())
            logits = model(images).float()
            if counted:
                accuracy.update(logits, labels)
                loss.update(nn.functional.cross_entropy(logits, labels, ignore_index=loading.IGNORED), weight=counted)
        return {"loss": float(loss.compute()), "accuracy": float(accuracy.compute())}
