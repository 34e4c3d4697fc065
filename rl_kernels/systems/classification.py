"""Images of one class each: how they are read, and what a model is worth that tells the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rl_kernels.systems.config import Config, Data
from rl_kernels.systems.contract import ImageShape, Reader, Reading
from rl_kernels.systems.data import loading, sets


class Classification(Reading):
    """Labels are int64 ``(B,)``, models return logits ``(B, classes)``."""

    score = "accuracy"

    def load(self, data: Data) -> sets.ImageSet:
        return sets.load(data.name, data.root, data.download)

    def split(self, config: Config, data: sets.ImageSet) -> tuple[sets.Images, sets.Images | None]:
        trained = sets.limited(data, config.data.limit).train
        return (
            sets.hold_out(trained, config.data.validation, config.seed) if config.data.validation else (trained, None)
        )

    def shape(self, config: Config, data: sets.ImageSet, trained: sets.Images) -> ImageShape:
        mean, std = loading.statistics_of(trained, data.channels)
        size = config.data.size or data.size or 224
        return ImageShape(data.channels, size, len(data.classes), tuple(mean.tolist()), tuple(std.tolist()))

    def pictures(self, config: Config, images: sets.Images, shape: ImageShape, training: bool) -> loading.Pictures:
        return loading.pictures(config.data, images, shape.size, shape.channels, training)

    @torch.no_grad()
    def evaluate(self, reader: Reader, model: nn.Module, pictures: Any) -> dict[str, float]:
        """Return mean cross-entropy and accuracy, over all processes."""
        from torchmetrics.aggregation import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        device = reader.device
        accuracy = MulticlassAccuracy(reader.shape.classes, average="micro", ignore_index=loading.IGNORED).to(device)
        loss = MeanMetric().to(device)
        model.eval()
        for images, labels in reader.share(pictures):
            counted = int((labels != loading.IGNORED).sum())
            logits = model(images).float()
            if counted:
                accuracy.update(logits, labels)
                loss.update(nn.functional.cross_entropy(logits, labels, ignore_index=loading.IGNORED), weight=counted)
        return {"loss": float(loss.compute()), "accuracy": float(accuracy.compute())}
