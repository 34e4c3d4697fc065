"""Images with boxes: how the runner reads them, and what a detector is worth."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rl_kernels.systems.config import Data
from rl_kernels.systems.contract import Batches, ImageShape, Reader, Reading
from rl_kernels.systems.detection import data as sets
from rl_kernels.systems.detection.data import BoxPictures
from rl_kernels.systems.detection.images import BoxImages, BoxSet
from rl_kernels.systems.detection.network import STRIDES
from rl_kernels.systems.detection.scoring import Scorer, Scores
from rl_kernels.systems.detection.suppression import detections

DEFAULT_SIZE = 640
"""Of files, whose sizes differ."""


class Boxes(Reading):
    """Labels are float32 ``(B, M, 5)``, as :class:`.data.BoxPictures` gives them; pixels go from 0 to 1."""

    score = "map"

    def load(self, data: Data) -> BoxSet:
        return sets.load(data.name, data.root, data.download)

    def split(self, config: Any, data: BoxSet) -> tuple[BoxImages, BoxImages | None]:
        limit = config.data.limit
        trained = data.train if limit is None else data.train.take(range(min(limit, len(data.train))))
        if not config.data.validation:
            return trained, None
        order = torch.randperm(len(trained), generator=torch.Generator().manual_seed(config.seed)).tolist()
        held = max(1, round(config.data.validation * len(order)))
        return trained.take(sorted(order[held:])), trained.take(sorted(order[:held]))

    def shape(self, config: Any, data: BoxSet, trained: BoxImages) -> ImageShape:
        # Images in memory keep their size, brought to a multiple of the last stride.
        own = DEFAULT_SIZE if trained.pixels is None else max(trained.pixels.shape[2:])
        return ImageShape(3, config.data.size or -(-own // STRIDES[-1]) * STRIDES[-1], len(data.classes))

    def pictures(self, config: Any, images: BoxImages, shape: ImageShape, training: bool) -> BoxPictures:
        return BoxPictures(images, shape.size, config.detection.augment if training else None)

    def evaluate(self, reader: Reader, model: nn.Module, pictures: Any) -> dict[str, float]:
        """Return ``map_50``, ``map``, ``map_75`` and ``mar_100``, over all processes."""
        return score(model, reader.share(pictures), reader.shape.classes).figures()


@torch.no_grad()
def score(model: nn.Module, batches: Batches, classes: int) -> Scores:
    """Score a detector on images with labels; it is left in evaluation."""
    scorer = Scorer([str(number) for number in range(classes)])
    model.eval()
    for images, labels in batches:
        scorer.update(detections(*model(images)), labels)
    return scorer.compute()
